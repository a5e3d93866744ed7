"""Which prints make pair number n of a run: a pure function of (seed, n), with no state to save."""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ifvit.data.impressions import Impressions
from ifvit.data.sources import SYNTHETIC, Print


class Pair(NamedTuple):
    print0: int  # indices into the print set
    print1: int
    genuine: bool


class _Pool:
    """Fingers to draw from, numbered in the order they first come: a draw takes as long of six thousand as of six."""

    def __init__(self, fingers: dict[tuple[str, str], list[int]]):
        self.impressions = list(fingers.values())  # of each finger, indices into the print set
        self.database = [database for database, _ in fingers]  # of each finger
        self.members = defaultdict(list)  # database -> its fingers
        self.place = []  # of each finger among its database's
        for finger, database in enumerate(self.database):
            self.place.append(len(self.members[database]))
            self.members[database].append(finger)

    def __len__(self):
        return len(self.impressions)

    def impostor(self, rng) -> Pair:
        """Prints of two fingers, four times in five of one database: else the sensor would tell them apart."""
        a = int(rng.integers(len(self)))
        near = self.members[self.database[a]]
        if rng.random() < 0.8 and len(near) > 1:
            other = int(rng.integers(len(near) - 1))
            b = near[other + (other >= self.place[a])]  # a itself is left out
        else:
            other = int(rng.integers(len(self) - 1))
            b = other + (other >= a)
        return Pair(int(rng.choice(self.impressions[a])), int(rng.choice(self.impressions[b])), False)


@dataclass(frozen=True)
class _Pools:
    """Fingers to draw from: the real ones, and the generated ones for `synthetic_share` of the pairs."""

    prints: tuple[Print, ...]
    impostor_share: float
    synthetic_share: float
    seed: int

    def __post_init__(self):
        fingers = _by_finger(self.prints)
        pools = [_Pool({k: v for k, v in fingers.items() if (k[0] == SYNTHETIC) == made}) for made in (False, True)]
        object.__setattr__(self, "pools", pools)

    def pool(self, rng) -> _Pool:
        """Where there are fingers of one kind alone, those."""
        made = rng.random() < self.synthetic_share
        real_is_there, made_is_there = (len(pool) > 1 for pool in self.pools)
        return self.pools[int(made) if real_is_there and made_is_there else int(made_is_there)]


@dataclass(frozen=True)
class DensePairs(_Pools):
    """Module 1: a print twice (two views are made of it on the device), or two fingers' prints.

    Where `impressions` tells of others of the finger that are mapped to the print, `impression_share` of the genuine
    pairs have one of these as their second print.
    """

    impression_share: float = 0.0
    impressions: Impressions | None = None

    def __getitem__(self, n: int) -> Pair:
        rng = np.random.default_rng([self.seed, 1, n])
        pool = self.pool(rng)
        if rng.random() < self.impostor_share:
            return pool.impostor(rng)
        finger = pool.impressions[rng.integers(len(pool))]
        i = int(rng.choice(finger))
        if self.impressions and rng.random() < self.impression_share and (others := self.impressions.mapped(i, finger)):
            return Pair(i, int(rng.choice(others)), True)
        return Pair(i, i, True)


@dataclass(frozen=True)
class MatchPairs(_Pools):
    """Module 2: two impressions of a finger, or of two fingers; fingers are equally likely.

    A finger with one impression is paired with itself, which the device augments twice.
    """

    def __getitem__(self, n: int) -> Pair:
        rng = np.random.default_rng([self.seed, 2, n])
        pool = self.pool(rng)
        if rng.random() < self.impostor_share:
            return pool.impostor(rng)
        impressions = pool.impressions[rng.integers(len(pool))]
        if len(impressions) == 1:
            return Pair(impressions[0], impressions[0], True)
        i, j = rng.choice(len(impressions), 2, replace=False)
        return Pair(impressions[i], impressions[j], True)


def _by_finger(prints) -> dict[tuple[str, str], list[int]]:
    """Indices of each finger's prints, fingers in the order they first come."""
    fingers = defaultdict(list)
    for i, p in enumerate(prints):
        fingers[p.identity].append(i)
    return dict(fingers)


def class_labels(prints) -> dict[tuple[str, str], int]:
    """ArcFace's class of each identity: databases in the order they first come, the fingers of each in sorted order."""
    order = {database: k for k, database in enumerate(dict.fromkeys(p.database for p in prints))}
    return {
        identity: k for k, identity in enumerate(sorted({p.identity for p in prints}, key=lambda i: (order[i[0]], i)))
    }
