"""Which pairs of prints a protocol compares. They are counted and numbered, not listed: 6,000 fingers make 18 million.

Pairs are of one database each. A genuine pair is of two impressions of a finger, an impostor pair of two fingers.
Altered prints are in no genuine pair.

A print has `identity` (database, finger), `database`, `impression` and, if need be, `altered`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int

from ifvit.data.pairs import Pair

# A permutation of so many numbers takes 16 MB. Up to there a draw is what it was before larger sets were thought of, so
# that runs which were begun then validate on the same pairs.
PERMUTED = 2_000_000
BLOCK = 1 << 16  # pairs that are looked up at once where all are gone through


@dataclass(frozen=True, eq=False)
class EveryTwo:
    """Every two of `members`, but not those of the ranks in `skipped`: pair number k, by `pairs[k]`, with i < j.

    The rank of a pair is its place among every two of the members, in lexicographic order.
    """

    members: Int[np.ndarray, " m"]  # indices of prints, ascending
    skipped: Int[np.ndarray, " s"]  # ascending

    def __len__(self) -> int:
        m = len(self.members)
        return m * (m - 1) // 2 - len(self.skipped)

    def __getitem__(self, numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 2"]:
        numbers = np.asarray(numbers)
        # The pair of rank r has the number r less the count of skipped ranks below it.
        ranks = numbers + np.searchsorted(self.skipped - np.arange(len(self.skipped)), numbers, "right")
        first = np.searchsorted(self._first_ranks, ranks, "right") - 1
        second = first + 1 + ranks - self._first_ranks[first]
        return np.stack([self.members[first], self.members[second]], axis=-1)

    @cached_property
    def _first_ranks(self) -> Int[np.ndarray, " m"]:
        """The rank of each member's first pair, the one with the member after it."""
        return _ranks(np.arange(len(self.members)), np.arange(len(self.members)) + 1, len(self.members))


@dataclass(frozen=True, eq=False)
class Comparisons:
    """The pairs of one database: both kinds have a length, and give the pairs of an array of numbers as (n, 2)."""

    database: str
    genuine: Int[np.ndarray, "g 2"]
    impostor: EveryTwo | Int[np.ndarray, "i 2"]
    impostors_in_all: int  # that the protocol makes; `impostor` may be a draw of them

    def at_most(self, count: int, seed: int) -> "Comparisons":
        """All genuine pairs, and of the impostor pairs a fixed draw that fills them up to `count`."""
        wanted = count - len(self.genuine)
        if len(self.impostor) <= wanted:
            return self
        drawn = draw(np.random.default_rng(seed), len(self.impostor), wanted)
        return replace(self, impostor=self.impostor[drawn])


def pairs_fvc(prints: Sequence[Any]) -> list[Comparisons]:
    """Within each database every genuine pair once, and for impostors the first impressions of every two fingers.

    Of 10 fingers x 8 these are 280 and 45 (Maio et al., "FVC2000", IEEE TPAMI 24(3), 2002). Impressions count in
    natural order, '10' after '9'. An altered print is a finger's first impression only when it has no other.
    """
    protocol = []
    for database, fingers in by_finger(prints).items():
        impostor = EveryTwo(np.sort([first_impression(prints, members) for members in fingers]), np.empty(0, np.int64))
        genuine = _every_two([i for i in members if not altered(prints[i])] for members in fingers)
        protocol.append(Comparisons(database, genuine, impostor, len(impostor)))
    return protocol


def pairs_all(prints: Sequence[Any]) -> list[Comparisons]:
    """Every pair within each database, but those of an altered print with another print of its finger."""
    protocol = []
    for database, fingers in by_finger(prints).items():
        members = np.sort(np.concatenate([np.array(f) for f in fingers]))
        of_a_finger = np.searchsorted(members, _every_two(fingers))
        impostor = EveryTwo(members, np.sort(_ranks(of_a_finger[:, 0], of_a_finger[:, 1], len(members))))
        genuine = _every_two([i for i in f if not altered(prints[i])] for f in fingers)
        genuine = genuine[np.lexsort(genuine.T[::-1])]
        protocol.append(Comparisons(database, genuine, impostor, len(impostor)))
    return protocol


PROTOCOLS: dict[str, Callable[[Sequence[Any]], list[Comparisons]]] = {"fvc": pairs_fvc, "all": pairs_all}


@dataclass(frozen=True, eq=False)
class Pairs(Sequence[Pair]):
    """The pairs of some databases as a sequence: of each database first the genuine pairs, then the impostor pairs."""

    databases: tuple[Comparisons, ...]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number):
        if isinstance(number, slice):
            return self._listed(np.arange(*number.indices(len(self))))
        return self._listed(np.array([range(len(self))[number]]))[0]

    def __iter__(self) -> Iterator[Pair]:
        for start in range(0, len(self), BLOCK):
            yield from self[start : start + BLOCK]

    def of(self, database: str, genuine: bool) -> slice:
        """The numbers of the pairs of one database and one kind."""
        kind = 2 * [d.database for d in self.databases].index(database) + (not genuine)
        return slice(int(self._starts[kind]), int(self._starts[kind + 1]))

    def blocks(self, numbers: slice) -> Iterator[tuple[slice, Int[np.ndarray, "n 2"]]]:
        """Both prints of each pair, some numbers after the other, of one database and one kind at once."""
        first, last, _ = numbers.indices(len(self))
        starts = self._starts.tolist()
        for kind, start, stop in zip(self._kinds, starts, starts[1:]):
            for at in range(max(first, start), min(last, stop), BLOCK):
                block = slice(at, min(at + BLOCK, last, stop))
                yield block, kind[np.arange(block.start - start, block.stop - start)]

    def _listed(self, numbers: Int[np.ndarray, " n"]) -> list[Pair]:
        genuine = np.searchsorted(self._starts, numbers, "right") % 2 == 1
        return [Pair(i, j, g) for (i, j), g in zip(take(self._kinds, numbers).tolist(), genuine.tolist())]

    @cached_property
    def _kinds(self) -> list[EveryTwo | np.ndarray]:
        return [kind for d in self.databases for kind in (d.genuine, d.impostor)]

    @cached_property
    def _starts(self) -> Int[np.ndarray, " starts"]:
        return np.cumsum([0, *map(len, self._kinds)])


def take(kinds: Sequence[EveryTwo | np.ndarray], numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 2"]:
    """The pairs of these numbers, where all pairs of `kinds` are numbered through."""
    starts = np.cumsum([0, *map(len, kinds)])
    kind = np.searchsorted(starts, numbers, "right") - 1
    pairs = np.empty((len(numbers), 2), np.int64)
    for k in np.unique(kind):
        pairs[kind == k] = kinds[k][numbers[kind == k] - starts[k]]
    return pairs


def draw(rng: np.random.Generator, of: int, count: int) -> Int[np.ndarray, " n"]:
    """`count` of the numbers below `of`, all of them where there are not so many; ascending."""
    if of <= PERMUTED:
        return np.sort(rng.permutation(of)[:count])
    return np.sort(rng.choice(of, min(count, of), replace=False, shuffle=False))


def first_impression(prints: Sequence[Any], members: Iterable[int]) -> int:
    """Of a finger's prints the one that its impostor pairs are made with."""
    return min(members, key=lambda i: (altered(prints[i]), _natural(prints[i].impression)))


def by_finger(prints: Sequence[Any]) -> dict[str, list[list[int]]]:
    """database -> the indices of each finger's prints; databases and fingers in the order they first come."""
    databases: dict[str, dict[tuple, list[int]]] = {}
    for i, p in enumerate(prints):
        databases.setdefault(p.database, {}).setdefault(p.identity, []).append(i)
    return {database: list(fingers.values()) for database, fingers in databases.items()}


def _every_two(groups: Iterable[list[int]]) -> Int[np.ndarray, "n 2"]:
    """Every two of each group's members."""
    pairs = [np.array(group)[_two_of(len(group))] for group in groups if len(group) > 1]
    return np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)


@lru_cache
def _two_of(count: int) -> Int[np.ndarray, "n 2"]:
    return np.stack(np.triu_indices(count, 1), axis=1)


def _ranks(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " n"]:
    """The places of the pairs (first, second) among every two of `count` things, in lexicographic order."""
    return first * (2 * count - first - 1) // 2 + second - first - 1


def altered(impression: Any) -> bool:
    """Whether a print is one of SOCOFing's alterations."""
    return getattr(impression, "altered", False)


def _natural(impression: str | int) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(impression))]
