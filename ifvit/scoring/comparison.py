"""Whether one system is better than another: the differences of their rates over the same pairs, with intervals.

Both are read from their scores.csv. Fingers are drawn, the same for both systems (see `intervals`), so what makes a
finger hard for both cancels out. Which prints are of one finger, the genuine pairs tell.
"""

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ifvit.errors import UserError
from ifvit.scoring import intervals, rates
from ifvit.scoring.scores_csv import Scores, read


def compare(mine: str, other: str) -> dict:
    """What against.json holds: each rate here, there, and the difference with its interval; by database, and the mean.

    UserError when a file is missing or no scores.csv, or when the two are of other pairs.
    """
    names: dict[tuple[str, str], int] = {}
    here, there = (read(path, names).in_order() for path in (mine, other))
    _require_same_pairs(mine, here, other, there)
    finger = _fingers(here, len(names))
    databases = sorted({database for database, _ in names})
    database = np.array([databases.index(database) for database, _ in names])[here.pairs[:, 0]]
    summaries, drawn = ({}, {}), ({}, {})
    for k, name in enumerate(databases):
        mask = database == k
        g, i = here.genuine & mask, ~here.genuine & mask
        for scores, summary, draws in zip((here, there), summaries, drawn):
            summary[name] = rates.summary(scores.score[g], scores.score[i])
            draws[name] = intervals.bootstrap(
                scores.score[g], scores.score[i], finger[here.pairs[g, 0]], finger[here.pairs[i]]
            )
    rows = {name: _difference(*(s[name] for s in summaries), *(d[name] for d in drawn)) for name in summaries[0]}
    return {
        "this": mine,
        "other": other,
        "databases": rows,
        "macro": _difference(*map(rates.macro, summaries), *map(intervals.macro, drawn)),
    }


def print_table(result: dict) -> None:
    """Differences in percentage points, a line a database."""
    shown = {"eer": "EER", "fmr100": "FMR100", "fmr1000": "FMR1000", "zerofmr": "ZeroFMR"}
    print(f"Against {result['other']}: difference in percentage points [95 %], below zero: fewer errors here")
    print(f"{'database':20s}" + "".join(f"{name:>22s}" for name in shown.values()))
    for name, row in [*result["databases"].items(), ("macro", result["macro"])]:
        cells = (
            "{:+.2f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in (row[k]["difference"], *row[k]["ci"])))
            for k in shown
        )
        print(f"{name:20s}" + "".join(f"{cell:>22s}" for cell in cells))


def _require_same_pairs(mine: str, here: Scores, other: str, there: Scores) -> None:
    if not np.array_equal(here.pairs, there.pairs):
        common = len(set(map(tuple, here.pairs.tolist())) & set(map(tuple, there.pairs.tolist())))
        raise UserError(
            f"{mine} has {len(here.pairs)} pairs and {other} {len(there.pairs)}, of which {common} are the "
            "same. Evaluate both on the same prints, with the same --protocol and --max_pairs "
            "(0 for scores of all pairs)."
        )
    if n := np.count_nonzero(here.genuine != there.genuine):
        raise UserError(
            f"{n} pairs are genuine in one of {mine} and {other}, and impostor in the other. Evaluate both "
            "on the same prints."
        )


def _fingers(scores: Scores, prints: int) -> Int[np.ndarray, " prints"]:
    """The number of each print's finger: prints that genuine pairs connect are of one finger."""
    a, b = scores.pairs[scores.genuine].T
    return connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(prints, prints)), directed=False)[1]


def _difference(here: dict, there: dict, drawn_here: dict, drawn_there: dict) -> dict:
    return {
        name: {
            "this": here[name],
            "other": there[name],
            "difference": here[name] - there[name],
            "ci": intervals.interval(drawn_here[name] - drawn_there[name]),
        }
        for name in rates.RATES
    }
