"""Whether one system is better than another: the differences of their rates over the same pairs, with intervals.

Both are read from their scores.csv. Fingers are drawn, the same for both systems (see `intervals`), so what makes a finger
hard for both cancels out. Which prints are of one finger, the genuine pairs tell.
"""

import csv
import io
from array import array
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ifvit import intervals, rates
from ifvit.checkpoint_places import as_path
from ifvit.errors import UserError

COLUMNS = ("database", "a", "b", "genuine", "score")


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


def compare(mine: str, other: str) -> dict:
    """What against.json holds: of each database and of their mean, each rate here, there, and the difference with its interval.

    UserError when a file is missing or no scores.csv, or when the two are of other pairs.
    """
    names: dict[tuple[str, str], int] = {}
    here, there = (read(path, names).in_order() for path in (mine, other))
    _require_same_pairs(mine, here, other, there)
    finger = _fingers(here, len(names))
    databases = np.array([database for database, _ in names])
    summaries, drawn = ({}, {}), ({}, {})
    for name in sorted(set(databases)):
        mask = databases[here.pairs[:, 0]] == name
        g, i = here.genuine & mask, ~here.genuine & mask
        for scores, summary, draws in zip((here, there), summaries, drawn):
            summary[name] = rates.summary(scores.score[g], scores.score[i])
            draws[name] = intervals.bootstrap(scores.score[g], scores.score[i], finger[here.pairs[g, 0]], finger[here.pairs[i]])
    rows = {name: _difference(*(s[name] for s in summaries), *(d[name] for d in drawn)) for name in summaries[0]}
    return {"this": mine, "other": other, "databases": rows,
            "macro": _difference(*map(rates.macro, summaries), *map(intervals.macro, drawn))}


def print_table(result: dict) -> None:
    """Differences in percentage points, a line a database."""
    shown = {"eer": "EER", "fmr100": "FMR100", "fmr1000": "FMR1000", "zerofmr": "ZeroFMR"}
    print(f"Against {result['other']}: the difference in percentage points [95 %], below zero where there are fewer errors here")
    print(f"{'database':20s}" + "".join(f"{name:>22s}" for name in shown.values()))
    for name, row in [*result["databases"].items(), ("macro", result["macro"])]:
        cells = (f"{100 * row[k]['difference']:+.2f} [{100 * row[k]['ci'][0]:+.1f}, {100 * row[k]['ci'][1]:+.1f}]" for k in shown)
        print(f"{name:20s}" + "".join(f"{cell:>22s}" for cell in cells))


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
        header = next(rows, [])
        if any(column not in header for column in COLUMNS):
            raise UserError(f"{path} is no scores.csv, its first line does not name {','.join(COLUMNS)}; give one that "
                            "ifvit.evaluate has written.")
        database, a, b, kind, value = map(header.index, COLUMNS)
        for row in rows:
            try:
                score.append(float(row[value]))
                genuine.append(int(row[kind]))
            except (ValueError, IndexError):
                raise UserError(f"{path}: line {rows.line_num} is no pair with its score: {','.join(row)[:80]!r}. Evaluate "
                                "once more, or give another file.") from None
            for end, print_ in zip(pairs, (row[a], row[b])):
                end.append(names.setdefault((row[database], print_), len(names)))
    return Scores(np.stack([np.array(end) for end in pairs], axis=1), np.array(genuine, bool), np.array(score))


def _require_same_pairs(mine: str, here: Scores, other: str, there: Scores) -> None:
    if not np.array_equal(here.pairs, there.pairs):
        common = len(set(map(tuple, here.pairs.tolist())) & set(map(tuple, there.pairs.tolist())))
        raise UserError(f"{mine} has {len(here.pairs)} pairs and {other} {len(there.pairs)}, of which {common} are the same. "
                        "Evaluate both on the same prints, with the same --protocol and --max_pairs.")
    if n := np.count_nonzero(here.genuine != there.genuine):
        raise UserError(f"{n} pairs are genuine in one of {mine} and {other}, and impostor in the other. Evaluate both on the same prints.")


def _fingers(scores: Scores, prints: int) -> Int[np.ndarray, " prints"]:
    """The number of each print's finger: prints that genuine pairs connect are of one finger."""
    a, b = scores.pairs[scores.genuine].T
    return connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(prints, prints)), directed=False)[1]


def _difference(here: dict, there: dict, drawn_here: dict, drawn_there: dict) -> dict:
    return {name: {"this": here[name], "other": there[name], "difference": here[name] - there[name],
                   "ci": intervals.interval(drawn_here[name] - drawn_there[name])} for name in rates.RATES}
