"""Whose finger a print is, on the prints of an evaluation: CMC curves, and the rates of the templates of one print.

A database is a gallery: the first impression of every finger is enrolled, and the others are probes, upright as they
are; altered prints are none. A CMC curve says at rank r of how many probes the own finger is among the r likest
(ISO/IEC 19795-1, closed set).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from ifvit.data.prepare import PrintSet
from ifvit.data.protocols import Pairs, altered, by_finger, first_impression
from ifvit.scoring import rates
from ifvit.scoring.scorer import Scorer

RANKS = 20  # of a curve, at most


def cmc(likeness: Num[np.ndarray, "P F"], own: Int[np.ndarray, " P"]) -> list[float]:
    """Share of P probes whose own finger is among the r likest of F enrolled ones, r = 1 … at most RANKS.

    An own finger that is as like as others comes after them.
    """
    mine = np.take_along_axis(likeness, own[:, None], 1)
    rank = (likeness >= mine).sum(1)
    return [float((rank <= r).mean()) for r in range(1, min(likeness.shape[1], RANKS) + 1)]


def template_rates(scorer: Scorer, prints: PrintSet, pairs: Pairs, batch_size: int) -> dict[str, dict[str, Any]]:
    """A database's `eer_template`, of its pairs by the cosine of their templates, `rank1_template`, `cmc_template`."""
    rows = scorer.templates(prints, batch_size)[:, 0]
    cosines = lambda which: np.concatenate([(rows[ij[:, 0]] * rows[ij[:, 1]]).sum(1) for _, ij in pairs.blocks(which)])
    found = {}
    for database in (d.database for d in pairs.databases):
        enrolled, probes, own = gallery(prints.prints, database)
        curve = cmc(rows[probes] @ rows[enrolled].T, own)
        found[database] = {
            "eer_template": rates.equal_error_rate(*(cosines(pairs.of(database, kind)) for kind in (True, False))),
            "rank1_template": curve[0],
            "cmc_template": curve,
        }
    return found


def by_scores(prints: Sequence[Any], pairs: Pairs, database: str, score: Float[np.ndarray, " N"]) -> dict[str, Any]:
    """A database's `rank1` and `cmc` by the scores of its pairs, of which none may be left out."""
    enrolled, probes, own = gallery(prints, database)
    finger, row = np.full(len(prints), -1), np.full(len(prints), -1)
    finger[enrolled], row[probes] = np.arange(len(enrolled)), np.arange(len(probes))
    likeness = np.full((len(probes), len(enrolled)), -np.inf)
    for kind in (True, False):
        for numbers, ij in pairs.blocks(pairs.of(database, kind)):
            for a, b in ((0, 1), (1, 0)):
                asked = (row[ij[:, a]] >= 0) & (finger[ij[:, b]] >= 0)
                likeness[row[ij[asked, a]], finger[ij[asked, b]]] = score[numbers][asked]
    curve = cmc(likeness, own)
    return {"rank1": curve[0], "cmc": curve}


def curves(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """The CMC curves of an evaluation's databases by their names."""
    means = {"cmc": "", "cmc_template": ", templates"}
    return {f"{name}{said}": row[key] for name, row in rows.items() for key, said in means.items() if key in row}


def gallery(prints: Sequence[Any], database: str) -> tuple[list[int], list[int], Int[np.ndarray, " P"]]:
    """The enrolled prints of a database, its probes, and of each probe which of the enrolled is of its finger."""
    fingers = by_finger(prints)[database]
    enrolled = [first_impression(prints, members) for members in fingers]
    probes = [
        (i, n) for n, members in enumerate(fingers) for i in members if i != enrolled[n] and not altered(prints[i])
    ]
    return enrolled, [i for i, _ in probes], np.array([n for _, n in probes], np.int64)
