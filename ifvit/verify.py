"""Compares two prints: same finger or not.

python -m ifvit.verify A B --checkpoint ./checkpoints/matcher/matcher_ckpt [--picture out.png]
python -m ifvit.verify --pairs FILE.csv --out scores.csv    # many pairs in one start
"""

import csv
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ifvit import cli
from ifvit.errors import UserError
from ifvit.evaluate import check_ppi
from ifvit.files import whole
from ifvit.matcher import Matcher, Picture
from ifvit.paths import cache_dir, resolve, resolve_data

log = logging.getLogger("ifvit")
COLUMNS = ("a", "b", "score", "decision", "matches", "reason")
AT_ONCE = 16  # pairs
KEPT = 256  # decoded prints in memory: one that is compared with many is decoded once


@dataclass(frozen=True)
class Args:
    """Compares two prints with a trained matcher, or many pairs of a list."""

    a: Annotated[str, tyro.conf.Positional] = ""
    """one print"""
    b: Annotated[str, tyro.conf.Positional] = ""
    """the other"""
    checkpoint: str | None = None
    """Module 2's final checkpoint, or one of Module 1 [./checkpoints/matcher/matcher_ckpt, else `pretrained`, the
    package's Module 1]"""
    fmr: float = 0.001
    """false match rate to decide at, by the checkpoint's calibration; Module 1 has that of the packaged weights. Below
    three in the number of the calibration's impostor pairs it is an estimate"""
    picture: str = ""
    """PNG that shows why: both prints with their matches, one laid on the other, the parts of the score"""
    turned: bool = False
    """the prints may lie at any angle to each other, not only within 60° or so: eight are tried (docs/figures.md)"""
    json: bool = False
    """print {"score", "decision", "matches", "threshold", "probability", "llr", "least_fmr"} as JSON"""
    ppi: float | Literal["auto"] | None = None
    """resolution of both prints, whatever files and sets tell; `auto`: what they tell, unless the ridges differ"""
    ridges: Literal["dark", "light"] = "dark"
    """in both images; `light` of sensors that show them white on black"""
    pairs: str = ""
    """CSV file with the columns a and b in place of A and B: paths, from its own folder"""
    out: str = ""
    """CSV file for --pairs: a, b, score, decision, matches, and the reason where a pair was not compared"""

    def run(self) -> int:
        self.check()
        if self.json:
            cli.log_to_stderr()
        if self.pairs:
            return self.compare_list()

        cli.use_compilation_cache(cache_dir() / "compiled")
        matcher = Matcher.load(self.checkpoint)
        a, b = (matcher.read(Picture(path, self.ppi, self.ridges)) for path in (self.a, self.b))
        if self.picture:
            found = matcher.draw(a, b, resolve(self.picture), self.fmr, self.turned)
        else:
            found = matcher.compare(a, b, self.fmr, self.turned)
        if self.json:
            told = {k: getattr(found, k) for k in ("score", "decision", "threshold", "probability", "llr")}
            print(json.dumps(told | {"matches": len(found.matches), "least_fmr": matcher.least_fmr}))
        else:
            print(
                f"score {found.score:.4f}, {found.decision} (threshold {found.threshold:.4f} at FMR {self.fmr:g}), "
                f"{len(found.matches)} matches, log10 of the likelihood ratio {found.llr:+.1f}"
            )
            if self.fmr < matcher.least_fmr:
                log.info(
                    "The calibration shows rates from %.2g on: the threshold at FMR %g is an estimate.",
                    matcher.least_fmr,
                    self.fmr,
                )
        return 0

    def check(self) -> None:
        """UserError for flags that do not fit; before anything is read."""
        if not 0 < self.fmr < 1:
            raise UserError(f"--fmr is {self.fmr}; give a rate between 0 and 1, such as 0.001.")
        check_ppi(self.ppi)
        if not self.pairs:
            if not (self.a and self.b):
                raise UserError(
                    "Two prints are needed: python -m ifvit.verify A B, or --pairs FILE.csv for many pairs."
                )
            if self.out:
                raise UserError("--out is for --pairs FILE.csv; of one pair the answer is printed.")
            return
        given = {"a print": self.a, "--picture": self.picture, "--json": self.json}
        if extra := [name for name, value in given.items() if value]:
            raise UserError(f"--pairs and {extra[0]} are given; leave one of them out.")
        if not self.out:
            raise UserError("--pairs needs --out, the CSV file that the scores are written to.")
        if os.path.isdir(resolve(self.out)):
            raise UserError(f"--out {self.out} is a folder; give the path of a file in it, such as scores.csv.")
        if os.path.realpath(resolve_data(self.pairs)) == os.path.realpath(resolve(self.out)):
            raise UserError(f"--out {self.out} is the list of pairs itself; give another file.")

    def compare_list(self) -> int:
        """Writes --out; UserError at the end where pairs could not be compared, the first of them named."""
        from ifvit.bar import bar
        from ifvit.data import pair_list
        from ifvit.devices.sharding import use_cpu_cores

        path = resolve_data(self.pairs)
        rows = pair_list.read(path)
        use_cpu_cores()
        cli.use_compilation_cache(cache_dir() / "compiled")
        matcher = Matcher.load(self.checkpoint)

        @functools.lru_cache(KEPT)
        def read(name: str):
            return matcher.read(Picture(pair_list.beside(path, name), self.ppi, self.ridges))

        def answers(some: list[pair_list.Row]) -> Iterator[tuple]:
            known = [_both(read, row) for row in some]
            found = iter(
                matcher.compare_many([k for k in known if not isinstance(k, str)], self.fmr, AT_ONCE, self.turned)
            )
            for why in known:
                if isinstance(why, str):
                    yield "", "", "", why
                else:
                    c = next(found)
                    yield f"{c.score:.9g}", c.decision, len(c.matches), ""

        out = Path(resolve(self.out))
        out.parent.mkdir(parents=True, exist_ok=True)
        matching, refused = 0, []
        with (
            whole(out) as part,
            part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
            bar("comparing", len(rows), "pair") as shown,
        ):
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for at in range(0, len(rows), AT_ONCE):
                some = rows[at : at + AT_ONCE]
                for row, answer in zip(some, answers(some)):
                    writer.writerow((row.a, row.b, *answer))
                    matching += answer[1] == "match"
                    refused += [answer[3]] if answer[3] else []
                shown.update(len(some))
        compared = len(rows) - len(refused)
        print(f"{compared} of {len(rows)} pairs compared, {matching} match at FMR {self.fmr:g}; scores: {self.out}")
        if refused:
            raise UserError(
                f"{len(refused)} of {len(rows)} pairs were not compared; the first, {refused[0]} The column reason of "
                f"{self.out} tells why of each."
            )
        return 0


def _both(read: Callable[[str], object], row) -> tuple | str:
    """Both prints of a row, or why they cannot be compared."""
    if not (row.a and row.b):
        return f"line {row.line}: it names no {'second' if row.a else 'first'} print."
    try:
        return read(row.a), read(row.b)
    except UserError as e:
        return f"line {row.line}: {e}"


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.verify"))
