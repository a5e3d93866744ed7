"""From pairs that were compared to the fingers, or the persons, that probes are likest to."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ifvit.gallery.store import Entry


class Compared(NamedTuple):
    """An enrolled print, and how like a probe it is."""

    entry: Entry
    score: float
    llr: float  # log10 of the likelihood ratio

    def told(self) -> dict:
        e = self.entry
        return {"finger": f"{e.database}/{e.finger}", "print": e.name, "score": self.score, "llr": self.llr}


def fingers(found: Sequence[Compared]) -> list[dict]:
    """The fingers of what a probe was compared with, each by its likest print, the likest first."""
    best: dict[tuple[str, str], Compared] = {}
    for c in sorted(found, key=lambda c: -c.score):
        best.setdefault((c.entry.database, c.entry.finger), c)
    return [{"rank": n} | c.told() for n, c in enumerate(best.values(), 1)]


def persons(
    found: Sequence[Sequence[Compared]], enrolled: Mapping[tuple[str, str], int], most: float, angles: int = 1
) -> list[dict]:
    """The persons whose fingers all probes together, of one person, are likest to; the likest first.

    `found` has what each probe was compared with, at all of its angles; `enrolled` the number of each person's fingers.
    A probe may be of any of a person's fingers, and lie at any of the angles: its likelihood ratio is the mean of
    theirs. A finger that it was not compared with counts as the one that is least like it. Ratios of probes are
    multiplied, as if they told nothing of each other; none tells more than `most` (log10), what a calibration can show.
    """
    ratio = lambda c: 10 ** min(c.llr, most)
    totals: dict[tuple[str, str], float] = {person: 0.0 for some in found for person in {c.entry.person for c in some}}
    likest: dict[tuple[str, str], list[dict]] = {person: [] for person in totals}
    for n, some in enumerate(found):
        least = min(map(ratio, some))
        of: dict[tuple[str, str], dict[str, Compared]] = {person: {} for person in totals}
        for c in sorted(some, key=lambda c: -c.score):
            of[c.entry.person].setdefault(c.entry.finger, c)
        for person, best in of.items():
            others = enrolled[person] - len(best)
            mean = (sum(map(ratio, best.values())) + others * least) / enrolled[person]
            totals[person] += math.log10(mean / angles)
            likest[person] += [{"probe": n} | c.told() for c in list(best.values())[:1]]
    ranked = sorted(totals, key=lambda person: -totals[person])
    return [
        {"rank": n, "person": "/".join(p), "fingers": enrolled[p], "llr": totals[p], "likest": likest[p]}
        for n, p in enumerate(ranked, 1)
    ]
