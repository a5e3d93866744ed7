"""scores.csv: the scores of an evaluation, a line a pair of prints."""

import csv
import io
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TextIO

import numpy as np
from jaxtyping import Bool, Float, Int

from ifvit.checkpoint.places import as_path
from ifvit.data.protocols import Pairs
from ifvit.data.sources import Print
from ifvit.errors import UserError

COLUMNS = ("database", "a", "b", "genuine", "score", "global", "local", "matches")
READ = COLUMNS[:5]
END = "\r\n"  # of a line


@dataclass(frozen=True)
class Scores:
    """A scores.csv: its prints are numbered by (database, name), in both files of a comparison alike."""

    pairs: Int[np.ndarray, "n 2"]
    genuine: Bool[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]

    def in_order(self) -> "Scores":
        """Sorted by pair; which print of a pair comes first does not matter."""
        ends = np.sort(self.pairs, axis=1)
        order = np.lexsort(ends.T[::-1])
        return Scores(ends[order], self.genuine[order], self.score[order])


def write(file: TextIO, prints: Sequence[Print], pairs: Pairs, scores: dict[str, np.ndarray]) -> None:
    """A line a pair, in the order of the pairs, as the csv module writes it; what was not scored is empty."""
    file.write(",".join(COLUMNS) + END)
    scored = [k for k in ("score", "global", "local") if k in scores]
    values = ",".join("%.9g" if k in scored else "" for k in ("score", "global", "local"))
    name = {i: _field(n) for i, n in _names(prints, pairs).items()}
    for d in pairs.databases:
        for genuine in (True, False):
            line = _field(d.database).replace("%", "%%") + f",%s,%s,{genuine:d},{values},%d{END}"
            for numbers, ij in pairs.blocks(pairs.of(d.database, genuine)):
                a, b = ([name[i] for i in side.tolist()] for side in ij.T)
                numeric = (scores[k][numbers].tolist() for k in scored)
                matches = scores["matches"][numbers].astype(int).tolist()
                # One text of many lines: a line at a time takes three times as long.
                file.write(line * len(ij) % tuple(chain.from_iterable(zip(a, b, *numeric, matches))))


def _field(text: str) -> str:
    """A text as the csv module writes it beside others: in quotes where it must be."""
    row = io.StringIO()
    csv.writer(row, lineterminator=END).writerow((text, ""))
    return row.getvalue().removesuffix("," + END)


def _names(prints: Sequence[Print], pairs: Pairs) -> dict[int, str]:
    """Of each print that is compared as much of its path's end as tells the prints of its database apart: in folders of
    fingers their names belong to it."""
    used = np.zeros(len(prints), bool)
    for _, ij in pairs.blocks(slice(None)):
        used[ij] = True
    parts = {int(i): Path(prints[i].path).parts for i in np.flatnonzero(used)}
    names = {}
    for d in pairs.databases:
        mine = [i for i in parts if prints[i].database == d.database]
        for depth in range(1, max(len(parts[i]) for i in mine) + 1):
            some = {i: "/".join(parts[i][-depth:]) for i in mine}
            if len(set(some.values())) == len(mine):
                break
        names |= some
    return names


def scores_in(path: str) -> str:
    """The scores.csv of an evaluation, by its own path or by that of its folder; UserError where there is none."""
    there = as_path(path)
    file = there / "scores.csv" if there.is_dir() else there
    if not file.exists():
        raise UserError(f"There are no scores at {path}; give the scores.csv of an evaluation.")
    return str(file)


def read(path: str, names: dict[tuple[str, str], int]) -> Scores:
    """A scores.csv; `names` numbers the prints by database and name, and is added to."""
    pairs, genuine, score = [array("q"), array("q")], array("b"), array("d")
    with as_path(path).open("rb") as file:
        rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", "replace", newline=""))
        try:
            database, a, b, kind, value = map(next(rows).index, READ)
            for row in rows:
                score.append(float(row[value]))
                genuine.append(("0", "1").index(row[kind]))
                for end, name in zip(pairs, (row[a], row[b])):
                    end.append(names.setdefault((row[database], name), len(names)))
        except (ValueError, IndexError, StopIteration, csv.Error):
            what = f"its first line does not name {','.join(READ)}"
            if rows.line_num > 1:
                what = f"line {rows.line_num} of it is no pair with its score"
            raise UserError(f"{path} is no scores.csv, {what}; give one that ifvit.evaluate has written.") from None
    if not score:
        raise UserError(f"{path} holds no pair; give the scores.csv of an evaluation.")
    return Scores(np.array(pairs, np.int64).T, np.array(genuine, bool), np.array(score))
