"""Scores every pair of one or more databases with a trained checkpoint, and writes rates, scores and a DET plot.

python -m ifvit.evaluate --checkpoint ./checkpoints/matcher/matcher_ckpt --dataset_root DIR --out OUT
python -m ifvit.evaluate --out OUT --against OTHER/scores.csv    # is one better than another, on the same pairs
"""

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ifvit import cli
from ifvit.errors import UserError
from ifvit.files import whole, write_whole
from ifvit.matcher import DEFAULT
from ifvit.paths import cache_dir

if TYPE_CHECKING:
    from ifvit.data.prepare import PrintSet
    from ifvit.scoring.scorer import Scorer

log = logging.getLogger("ifvit")
DRAW_SEED = 6000  # the same impostor pairs whenever a database is evaluated with the same --max_pairs
MOST_IMPOSTORS = 1_000_000  # pairs of a database that are compared without --max_pairs
MANY = 100_000  # pairs: more than an hour on two cores
PAIRS_PER_SECOND = 20  # on two cores, about


@dataclass(frozen=True)
class Args:
    """Evaluates a checkpoint of either module on folders of prints."""

    checkpoint: str = ""
    """of Module 2 (fused score), or of Module 1 (the score says how well the ridges agree once registered); left out,
    `pretrained`, the package's Module 1, unless ./checkpoints/matcher/matcher_ckpt is there"""
    dataset_root: tuple[str, ...] = ()
    """folders of prints; every database in them is evaluated on its own"""
    out: str = "./evaluation"
    """folder for report.html, metrics.json, scores.csv, det.png, cmc.png, histogram.png, matches.png"""
    protocol: Literal["fvc", "all"] = "fvc"
    """fvc: every genuine pair once, first impressions for impostors; all: every pair"""
    max_pairs: int | None = None
    """of a database: all genuine pairs, and a fixed draw of its impostor pairs that fills them up; 0: all; left out,
    at most 1,000,000 impostor pairs"""
    peers: tuple[str, ...] = ()
    """CSV files of other systems' scores, columns genuine (0 or 1) and score: their DET curves go into the report"""
    against: str = ""
    """scores.csv of the same pairs: the differences to it with intervals; without --checkpoint, of --out's"""
    batch_size: int = 16
    """pairs at once"""
    ppi: float | Literal["auto"] | None = None
    """resolution of all prints, whatever files and sets tell; `auto`: what they tell, unless the ridges tell another"""
    ridges: Literal["dark", "light"] = "dark"
    """in the prints' images; `light` of sensors that show them white on black"""
    names: str = ""
    """how to read paths below the folder, without extension: '{database}/{finger}_{impression}' [known sets' names]"""

    def run(self) -> int:
        args = self.or_packaged()
        if args is not self:
            return args.run()
        self.check()
        if self.checkpoint:
            self.score()
        if self.against:
            self.compare()
        return 0

    def or_packaged(self) -> "Args":
        """These flags; with the packaged weights where prints are given, and no checkpoint is given or was trained."""
        from ifvit.checkpoint import PRETRAINED, or_packaged

        if self.checkpoint or not self.dataset_root:
            return self
        packaged = replace(self, checkpoint=PRETRAINED)
        packaged.check()  # before it is said what is used
        return packaged if or_packaged(None, DEFAULT) == PRETRAINED else self

    def check(self) -> None:
        """UserError for flags that do not fit; before anything is read."""
        if not (self.checkpoint and self.dataset_root) and (self.checkpoint or self.dataset_root or not self.against):
            raise UserError(
                "--checkpoint and --dataset_root are both needed to score prints; with --against alone, "
                "the scores that lie in --out are compared."
            )
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; give at least 1.")
        if self.max_pairs not in (None, 0) and self.max_pairs < 2:
            raise UserError(f"--max_pairs is {self.max_pairs}; give at least 2, or 0 for all.")
        check_ppi(self.ppi)
        if self.peers:
            from ifvit.scoring import report

            report.peers(self.peers)
        if self.against:
            from ifvit.checkpoint.places import as_path
            from ifvit.scoring.scores_csv import scores_in

            mine = str(as_path(self.out) / "scores.csv")  # overwritten where prints are scored
            if os.path.realpath(scores_in(self.against)) == os.path.realpath(mine):
                raise UserError(
                    f"--against {self.against} lies in --out itself; give another evaluation's scores, or "
                    "another --out."
                )
            if not self.checkpoint:
                scores_in(self.out)

    def compare(self) -> None:
        from ifvit.checkpoint.places import as_path, written_here
        from ifvit.scoring import comparison
        from ifvit.scoring.scores_csv import scores_in

        result = comparison.compare(scores_in(self.out), scores_in(self.against))
        comparison.print_table(result)
        with written_here(as_path(self.out) / "against.json") as file:
            write_whole(file, json.dumps(result, indent=1) + "\n")

    def score(self) -> None:
        from ifvit.checkpoint.places import as_path, written_here
        from ifvit.data.gather import local_root
        from ifvit.data.prepare import decoded, prepare
        from ifvit.data.sources import read
        from ifvit.data.split import require_fingers
        from ifvit.data.summary import summarise
        from ifvit.devices.sharding import use_cpu_cores
        from ifvit.scoring.scorer import Scorer

        use_cpu_cores()
        cli.use_compilation_cache(cache_dir() / "compiled")
        scorer = Scorer.from_checkpoint(self.checkpoint)
        reading = read([local_root(r) for r in self.dataset_root], self.ppi, self.ridges, self.names)
        require_fingers(reading.prints)
        warn_of_known_prints(scorer.config.dataset_root, scorer.trained_on, self.dataset_root, reading.prints)
        prints = prepare(reading.prints, scorer.config.canvas_size, scorer.config.max_broken, cache_dir(), apart=True)
        found = decoded(reading.prints, scorer.config.canvas_size, cache_dir())
        lines = summarise(reading, found, prints.prints).lines()
        for line in lines:
            log.info("%s", line)
        command = shlex.join(["python", "-m", "ifvit.evaluate", *sys.argv[1:]])
        told = {"Checkpoint": scorer.card(), "Prints": lines, "Command": [command]}
        with written_here(as_path(self.out)) as out:
            result = evaluate(scorer, prints, out, self.protocol, self.batch_size, self.max_pairs, self.peers, told)
        print_table(result)
        few = [name for name, row in result["databases"].items() if row["impostor"] < 1000]
        if few and self.protocol == "fvc":
            print(
                f"(A false match rate of 0.1 % cannot be seen in fewer than 1000 impostor pairs, as of {few[0]}; "
                "--protocol all compares every pair.)"
            )


def warn_of_known_prints(trained_roots, trained_on, roots, prints) -> None:
    """Warns where prints lie in folders that a checkpoint was trained on, or are copies of files of its sample."""
    from ifvit.data.contents import known
    from ifvit.data.gather import overlap

    if overlap(trained_roots, roots) or known(trained_on, prints):
        log.warning(
            "⚠ The checkpoint was trained on prints of %s: it knows all fingers but those held out then, and scores of "
            "known fingers say little of others. train_all's own evaluation is of those held out.",
            ", ".join(trained_roots),
        )


def check_ppi(ppi: float | Literal["auto"] | None) -> None:
    """UserError for a resolution that no print has."""
    if ppi not in (None, "auto") and not 0 < ppi <= 5000:  # NaN neither
        raise UserError(f"--ppi is {ppi}; give a resolution in pixels an inch, such as 500, or auto.")


def evaluate(
    scorer: "Scorer",
    prints: "PrintSet",
    out: Path,
    protocol: str = "fvc",
    batch_size: int = 16,
    max_pairs: int | None = None,
    peers: Sequence[str] = (),
    told: Mapping[str, Sequence[str]] | None = None,
    first: Sequence[str] = (),
) -> dict:
    """Scores the protocol's pairs of every database; writes the files of `out`; returns what metrics.json holds.

    `max_pairs`: of a database; as many of its impostor pairs are drawn as fill its genuine ones up; None: at most
    MOST_IMPOSTORS, 0: all. `peers`: files of other systems' scores for the report, `told`: more lines of it by their
    heading, `first`: sections that it begins with. Databases without genuine or without impostor pairs are left out,
    and named in the log; UserError when none is left.
    """
    import jax

    from ifvit.data.protocols import PROTOCOLS, Pairs
    from ifvit.models.template import Template
    from ifvit.scoring import identification, intervals, plots, rates, report, scores_csv

    pairs = Pairs(_limited(_usable(PROTOCOLS[protocol](prints.prints)), max_pairs))
    _announce(pairs, protocol)
    if jax.process_index() == 0:  # all score, one writes
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{out} is no folder, and a file is in the way; give another --out.") from None
    # What is not written is let go: of 18 million pairs 72 MB each.
    found = scorer.score(prints, pairs, batch_size)
    scores = {k: v for k, v in found.items() if k in (*scores_csv.COLUMNS, "log_odds")}
    finger = _numbered_fingers(prints.prints)
    rows, drawn, curves = {}, {}, {}
    for database in sorted(pairs.databases, key=lambda d: d.database):
        name = database.database
        genuine, impostor = (scores["score"][pairs.of(name, kind)] for kind in (True, False))
        rows[name] = rates.summary(genuine, impostor)
        if "log_odds" in scores:
            odds = [rates.thinned(scores["log_odds"][pairs.of(name, kind)]) for kind in (True, False)]
            rows[name] |= {"cllr": rates.cllr(*odds), "min_cllr": rates.min_cllr(*odds)}
        if len(database.impostor) < database.impostors_in_all:
            rows[name]["impostors_in_all"] = database.impostors_in_all
        drawn[name] = intervals.bootstrap(
            genuine, impostor, finger[database.genuine[:, 0]], intervals.Fingers(finger, database.impostor)
        )
        rows[name] |= intervals.of(drawn[name])
        if protocol == "all" and "impostors_in_all" not in rows[name]:
            by_fvc = _of_first_impressions(pairs, name, prints.prints)
            rows[name]["eer_fvc"] = rates.equal_error_rate(genuine, impostor[by_fvc])
            rows[name] |= identification.by_scores(prints.prints, pairs, name, scores["score"])
        curves[name] = rates.det_curve(genuine, impostor, rates.POINTS)[1:]
    if isinstance(getattr(scorer, "template", None), Template):  # a stand-in may have none
        for name, told_of in identification.template_rates(scorer, prints, pairs, batch_size).items():
            rows[name] |= told_of
    macro = rates.macro(rows) | intervals.of(intervals.macro(drawn))
    for key in ("eer_fvc", "cllr", "min_cllr", "eer_template", "rank1_template", "rank1"):
        if all(key in row for row in rows.values()):
            macro[key] = float(np.mean([row[key] for row in rows.values()]))
    result = {"macro": macro, "databases": rows, "protocol": protocol}
    if jax.process_index() > 0:
        return result

    with (
        whole(out / "scores.csv") as part,
        part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        scores_csv.write(file, prints.prints, pairs, scores)
    plots.det(out / "det.png", curves | report.peers(peers))
    if cmc := identification.curves(rows):
        plots.cmc(out / "cmc.png", cmc)
    of_kind = {kind: [pairs.of(d.database, kind) for d in pairs.databases] for kind in (True, False)}
    plots.histogram(
        out / "histogram.png",
        *(np.concatenate([scores["score"][part] for part in of_kind[kind]]) for kind in (True, False)),
    )
    numbers = np.concatenate([np.arange(part.start, part.stop) for part in of_kind[True]])
    typical = numbers[np.argsort(scores["score"][numbers], kind="stable")[len(numbers) // 2]]
    scorer.picture(prints, pairs[int(typical)], out / "matches.png")
    errors = report.worst_errors(scorer, prints, pairs, np.asarray(scores["score"], np.float64))
    report.of_evaluation(out, result, first, errors, told or {})
    write_whole(out / "metrics.json", json.dumps(result, indent=1) + "\n")  # last: all is there
    return result


def _usable(databases: list) -> list:
    """The databases that have pairs of both kinds; those left out are named in the log, UserError when none is left."""
    usable = [d for d in databases if len(d.genuine) and len(d.impostor)]
    left_out = ", ".join(
        f"{d.database} ({len(d.genuine)} genuine, {len(d.impostor)} impostor)"
        for d in sorted(databases, key=lambda d: d.database)
        if d not in usable
    )
    if not usable:
        raise UserError(
            f"No database has both genuine and impostor pairs: {left_out}; give two fingers or more of one, "
            "with two impressions or more."
        )
    if left_out:
        log.warning("Not evaluated, without genuine or without impostor pairs: %s", left_out)
    return usable


def _limited(databases: list, max_pairs: int | None) -> tuple:
    """With a draw of the impostor pairs where there are more than `max_pairs` pairs, or MOST_IMPOSTORS of them."""
    if max_pairs == 0:
        return tuple(databases)
    fullest = max(databases, key=lambda d: len(d.genuine))
    if max_pairs and len(fullest.genuine) >= max_pairs:
        raise UserError(
            f"--max_pairs is {max_pairs}, and {fullest.database} alone has {len(fullest.genuine)} genuine "
            "pairs, which are all compared; give more than that."
        )
    limited = tuple(d.at_most(max_pairs or len(d.genuine) + MOST_IMPOSTORS, DRAW_SEED) for d in databases)
    for d in limited:
        if len(d.impostor) < d.impostors_in_all:
            log.info(
                "%s: %s of %s impostor pairs are compared, a fixed draw; --max_pairs 0 compares all",
                d.database,
                f"{len(d.impostor):,}",
                f"{d.impostors_in_all:,}",
            )
    return limited


def _announce(pairs, protocol: str) -> None:
    """How many pairs there are, where that means hours."""
    if len(pairs) > MANY:
        hours = len(pairs) / PAIRS_PER_SECOND / 3600
        log.warning(
            "⚠ Protocol %s makes %s pairs, which take about %s on two cores (%d pairs a second), less on an "
            "accelerator; ifvit.evaluate --max_pairs N compares all genuine pairs and a draw of the impostor "
            "pairs, N of a database in all.",
            protocol,
            f"{len(pairs):,}",
            f"{hours / 24:.0f} days" if hours > 72 else f"{hours:.0f} hours",
            PAIRS_PER_SECOND,
        )


def _numbered_fingers(prints) -> np.ndarray:
    """The number of each print's finger."""
    numbers: dict[tuple, int] = {}
    return np.array([numbers.setdefault(p.identity, len(numbers)) for p in prints], np.int32)


def _of_first_impressions(pairs, database: str, prints) -> np.ndarray:
    """Which of a database's impostor pairs the protocol of the FVC compares."""
    from ifvit.data.protocols import by_finger, first_impression

    first = np.zeros(len(prints), bool)
    first[[first_impression(prints, members) for members in by_finger(prints)[database]]] = True
    return np.concatenate([first[ij].all(axis=1) for _, ij in pairs.blocks(pairs.of(database, False))])


def print_table(result: dict) -> None:
    """Rates in per cent with their 95 % intervals, a line a database."""
    from ifvit.scoring import report

    rates = {"eer": "EER", "fmr100": "FMR100", "fmr1000": "FMR1000", "zerofmr": "ZeroFMR"}
    both = "eer_fvc" in result["macro"]
    print(
        f"{'database':20s}"
        + "".join(f"{name + ' [95 %]':>23s}" for name in rates.values())
        + f" {'AUC':>7s} {'genuine':>8s} {'impostor':>9s}"
        + both * f" {'EER, FVC':>9s}"
    )
    for name, row in [*result["databases"].items(), ("macro", result["macro"])]:
        cells = (f"{row[k]:.2%} [{100 * row[f'{k}_ci'][0]:.1f}, {100 * row[f'{k}_ci'][1]:.1f}]" for k in rates)
        counts = f"{row['genuine']:8d} {row['impostor']:9d}" if "genuine" in row else " " * 18
        counts += f" {row['eer_fvc']:9.2%}" if both else ""
        print((f"{name:20s}" + "".join(f"{cell:>23s}" for cell in cells) + f" {row['auc']:7.4f} {counts}").rstrip())
    macro = result["macro"]
    if "cllr" in macro:
        print("Cllr {cllr:.3f} bits, {min_cllr:.3f} if calibrated on these prints; macro".format(**macro))
    if "eer_template" in macro:
        print(report.of_templates(macro))
    if "rank1" in macro:
        print("Identification by scores, first impressions enrolled: rank-1 {rank1:.1%}; macro".format(**macro))


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.evaluate", huge_pages=True))
