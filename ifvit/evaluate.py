"""Scores every pair of one or more databases with a trained checkpoint, and writes rates, scores and a DET plot.

    python -m ifvit.evaluate --checkpoint ./checkpoints/matcher/matcher_ckpt --dataset_root DIR --out OUT
"""

import csv
import json
import logging
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ifvit import cli
from ifvit.errors import UserError
from ifvit.paths import cache_dir

if TYPE_CHECKING:
    from ifvit.data.prepare import PrintSet
    from ifvit.scorer import Scorer

log = logging.getLogger("ifvit")
RATES = ("eer", "fmr100", "fmr1000", "auc")


@dataclass(frozen=True)
class Args:
    """Evaluates a checkpoint of either module on folders of prints."""

    checkpoint: str
    """of Module 2 (fused score), or of Module 1 (its registered matches are the score)"""
    dataset_root: tuple[str, ...]
    """folders of prints; every database in them is evaluated on its own"""
    out: str = "./evaluation"
    """folder for metrics.json, scores.csv, det.png, histogram.png, matches.png"""
    protocol: Literal["fvc", "all"] = "fvc"
    """fvc: every genuine pair once, first impressions for impostors; all: every pair"""
    batch_size: int = 16
    """pairs at once"""
    ppi: float | None = None
    """resolution of all prints, whatever their files and sets tell"""
    ridges: Literal["dark", "light"] = "dark"
    """in the prints' images; `light` of sensors that show them white on black"""

    def run(self) -> int:
        from ifvit.checkpoint_places import as_path, written_here
        from ifvit.data.gather import local_root, overlap
        from ifvit.data.prepare import prepare
        from ifvit.data.sources import read_roots, require_fingers
        from ifvit.scorer import Scorer
        from ifvit.training.sharding import use_cpu_cores

        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; give at least 1.")
        check_ppi(self.ppi)
        if not self.dataset_root:
            raise UserError("--dataset_root names no folder; give one or more.")
        use_cpu_cores()
        cli.use_compilation_cache(cache_dir() / "compiled")
        scorer = Scorer.from_checkpoint(self.checkpoint)
        prints = read_roots([local_root(r) for r in self.dataset_root], self.ppi, self.ridges)
        require_fingers(prints)
        if overlap(scorer.config.dataset_root, self.dataset_root):
            log.warning("⚠ The checkpoint was trained on prints of %s: it knows all fingers but those held out then, and scores of "
                        "known fingers say little of others. train_all's own evaluation is of those held out.",
                        ", ".join(scorer.config.dataset_root))
        prints = prepare(prints, scorer.config.canvas_size, scorer.config.max_broken, cache_dir(), apart=True)
        with written_here(as_path(self.out)) as out:
            print_table(evaluate(scorer, prints, out, self.protocol, self.batch_size))
        return 0


def check_ppi(ppi: float | None) -> None:
    """UserError for a resolution that no print has."""
    if ppi is not None and not 0 < ppi <= 5000:  # NaN neither
        raise UserError(f"--ppi is {ppi}; give a resolution in pixels an inch, such as 500.")


def evaluate(scorer: "Scorer", prints: "PrintSet", out: Path, protocol: str = "fvc", batch_size: int = 16) -> dict:
    """Scores the protocol's pairs of every database; writes the files of `out`; returns what metrics.json holds.

    Databases without genuine or without impostor pairs are left out, and named in the log; UserError
    when none is left.
    """
    import jax

    from ifvit import plots, rates
    from ifvit.data.pairs import Pair

    wanted = {"fvc": rates.pairs_fvc, "all": rates.pairs_all}[protocol](prints.prints)
    pairs = [Pair(i, j, bool(g)) for i, j, g in wanted]
    database = [prints.prints[p.print0].database for p in pairs]
    counts = {p.database: Counter() for p in prints.prints}  # of genuine (True) and impostor (False) pairs
    for pair, name in zip(pairs, database):
        counts[name][pair.genuine] += 1
    databases = sorted(name for name, count in counts.items() if count[True] and count[False])
    left_out = ", ".join(f"{name} ({count[True]} genuine, {count[False]} impostor)"
                         for name, count in sorted(counts.items()) if name not in databases)
    if not databases:
        raise UserError(f"No database has both genuine and impostor pairs: {left_out}; give two fingers or more of one, "
                        "with two impressions or more.")
    if left_out:
        log.warning("Not evaluated, without genuine or without impostor pairs: %s", left_out)
    if jax.process_index() == 0:  # all score, one writes
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{out} is no folder, and a file is in the way; give another --out.") from None
    pairs = [p for p, d in zip(pairs, database) if d in databases]
    database = np.array([d for d in database if d in databases])
    genuine = np.array([p.genuine for p in pairs])
    scores = scorer.score(prints, pairs, batch_size)
    rows = {name: rates.summary(scores["score"][(database == name) & genuine],
                                scores["score"][(database == name) & ~genuine]) for name in databases}
    result = {"macro": {k: v for k, v in rates.macro(rows).items() if k in RATES}, "databases": rows}
    if jax.process_index() > 0:
        return result

    _write(out / "scores.csv", lambda f: _write_scores(f, prints, pairs, database, scores))
    plots.det(out / "det.png", {name: rates.det_curve(scores["score"][(database == name) & genuine],
                                                      scores["score"][(database == name) & ~genuine])[1:]
                                for name in databases})
    plots.histogram(out / "histogram.png", scores["score"][genuine], scores["score"][~genuine])
    typical = int(np.argsort(np.where(genuine, scores["score"], np.inf))[genuine.sum() // 2])
    scorer.picture(prints, pairs[typical], out / "matches.png")
    _write(out / "metrics.json", lambda f: f.write(json.dumps(result, indent=1) + "\n"))  # last: all is there
    return result


def print_table(result: dict) -> None:
    """Rates in per cent, a line a database."""
    print(f"{'database':20s} {'EER':>7s} {'FMR100':>7s} {'FMR1000':>8s} {'AUC':>7s} {'genuine':>8s} {'impostor':>9s}")
    for name, row in [*result["databases"].items(), ("macro", result["macro"])]:
        counts = f"{row['genuine']:8d} {row['impostor']:9d}" if "genuine" in row else ""
        print(f"{name:20s} {row['eer']:7.2%} {row['fmr100']:7.2%} {row['fmr1000']:8.2%} {row['auc']:7.4f} {counts}")


def _write_scores(file, prints, pairs, database, scores) -> None:
    writer = csv.writer(file)
    writer.writerow(["database", "a", "b", "genuine", "score", "global", "local", "matches"])
    number = lambda name, i: f"{scores[name][i]:.9g}" if name in scores else ""
    used = {k for pair in pairs for k in pair[:2]}
    names = Counter((prints.prints[k].database, Path(prints.prints[k].path).name) for k in used)
    alike = {database for (database, _), count in names.items() if count > 1}  # a folder a finger: its name belongs to it
    for i, pair in enumerate(pairs):
        a, b = ("/".join(Path(prints.prints[k].path).parts[-2 if database[i] in alike else -1:]) for k in pair[:2])
        writer.writerow([database[i], a, b, int(pair.genuine), number("score", i), number("global", i),
                         number("local", i), int(scores["matches"][i])])


def _write(path: Path, write) -> None:
    """A file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        write(file)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.evaluate"))
