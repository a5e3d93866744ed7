"""Which pairs a protocol compares: against plain lists of them, and for sets whose lists would fill the memory."""

import itertools
import random
import tracemalloc
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest

from ifvit.data.pairs import Pair
from ifvit.data.prepare import PrintSet
from ifvit.data.protocols import PERMUTED, PROTOCOLS, Pairs, draw, pairs_all, pairs_fvc
from ifvit.data.sources import Print
from ifvit.training.match import VALIDATION_SEED, balanced_pairs


def print_of(database, finger, impression, altered=False):
    return Print(f"/{database}/{finger}_{impression}.png", database, finger, impression, 500, altered)


def fvc_fingers(database="DB1", fingers=10, impressions=8):
    return [print_of(database, str(f), str(i)) for f in range(1, fingers + 1) for i in range(1, impressions + 1)]


def listed(databases) -> list[Pair]:
    return list(Pairs(tuple(databases)))


def every_pair(prints) -> list[Pair]:
    """Protocol `all`, plainly."""
    pairs = []
    for i, j in itertools.combinations(range(len(prints)), 2):
        a, b = prints[i], prints[j]
        genuine = a.identity == b.identity
        if a.database == b.database and not (genuine and (a.altered or b.altered)):
            pairs.append(Pair(i, j, genuine))
    return pairs


def mixed_prints(seed) -> list[Print]:
    """Fingers of one to several impressions, of three databases, some altered, in no order."""
    some = random.Random(seed)
    return [
        print_of(some.choice("ABC"), str(some.randrange(9)), str(some.randrange(99)), some.random() < 0.2)
        for _ in range(60)
    ]


def test_the_fvc_protocol_makes_280_genuine_and_45_impostor_pairs_of_10_fingers_by_8():
    prints = fvc_fingers()
    pairs = listed(pairs_fvc(prints))
    assert sum(genuine for *_, genuine in pairs) == 280
    assert len(pairs) == 280 + 45
    assert len({(i, j) for i, j, _ in pairs}) == len(pairs) and all(i < j for i, j, _ in pairs)
    for i, j, genuine in pairs:
        assert genuine == (prints[i].identity == prints[j].identity)
        assert genuine or prints[i].impression == prints[j].impression == "1"


def test_two_databases_never_meet():
    prints = fvc_fingers("DB1") + fvc_fingers("DB2")
    assert len(listed(pairs_fvc(prints))) == 2 * (280 + 45)
    assert len(listed(pairs_all(prints))) == 2 * (80 * 79 // 2)
    assert all(prints[i].database == prints[j].database for i, j, _ in listed(pairs_all(prints)))


def test_impression_10_comes_after_9():
    prints = [print_of("DB", finger, number) for finger in "ab" for number in ("10", "9")]
    assert listed(pairs_fvc(prints)) == [(0, 1, True), (2, 3, True), (1, 3, False)]


def test_altered_prints_are_in_no_genuine_pair():
    prints = [print_of("DB", "a", "0", True), *(print_of("DB", *name) for name in ("a1", "b1", "b2"))]
    assert listed(pairs_fvc(prints)) == [(2, 3, True), (1, 2, False)]
    assert listed(pairs_all(prints)) == [(2, 3, True), (0, 2, False), (0, 3, False), (1, 2, False), (1, 3, False)]


@pytest.mark.parametrize("seed", range(5))
def test_protocol_all_makes_every_pair_once_however_fingers_are_mixed(seed):
    prints = mixed_prints(seed)
    pairs, wanted = listed(pairs_all(prints)), every_pair(prints)
    assert sorted(pairs) == sorted(wanted) and len(pairs) == len(wanted)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pairs_are_a_sequence_like_the_list_of_them(protocol):
    pairs = Pairs(tuple(PROTOCOLS[protocol](mixed_prints(7))))
    plain = list(pairs)
    assert len(pairs) == len(plain) > 100
    assert pairs[5:9] == plain[5:9] and pairs[::-7] == plain[::-7]
    assert [pairs[0], pairs[-1], pairs[np.int64(3)]] == [plain[0], plain[-1], plain[3]]
    with pytest.raises(IndexError):
        pairs[len(plain)]
    for d in pairs.databases:
        assert all(p.genuine for p in pairs[pairs.of(d.database, True)])
        assert not any(p.genuine for p in pairs[pairs.of(d.database, False)])
    assert sum(len(pairs[pairs.of(d.database, kind)]) for d in pairs.databases for kind in (True, False)) == len(plain)


@pytest.mark.parametrize("numbers", [slice(None), slice(40, 200), slice(3, 3), slice(90, 10**6)])
def test_blocks_are_the_pairs_in_order_each_of_one_database_and_one_kind(monkeypatch, numbers):
    monkeypatch.setattr("ifvit.data.protocols.BLOCK", 7)
    pairs = Pairs(tuple(pairs_all(mixed_prints(7))))
    plain, found = list(pairs), []
    for block, ij in pairs.blocks(numbers):
        assert plain[block] == [Pair(i, j, plain[block.start].genuine) for i, j in ij.tolist()] and len(ij) <= 7
        found += range(block.start, block.stop)
    assert found == list(range(*numbers.indices(len(pairs))))


@pytest.mark.parametrize(
    "fingers, impressions, protocol, genuine, impostor",
    [
        (6000, 1, "fvc", 0, 17_997_000),  # 6000 · 5999 / 2
        (600, 10, "fvc", 27_000, 179_700),  # 600 · 45; 600 · 599 / 2
        (600, 10, "all", 27_000, 17_970_000),
    ],
)
def test_millions_of_pairs_are_counted_and_looked_up_without_a_list(fingers, impressions, protocol, genuine, impostor):
    prints = fvc_fingers("DB", fingers, impressions)
    tracemalloc.start()
    (database,) = PROTOCOLS[protocol](prints)
    pairs = Pairs((database,))
    middle, last = pairs[len(pairs) // 2], pairs[-1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(database.genuine), len(database.impostor)) == (genuine, impostor)
    assert peak < 20e6  # bytes; eighteen million pairs in a list are two thousand
    assert not middle.genuine and prints[middle.print0].identity != prints[middle.print1].identity
    two_last = (6000 - impressions - 1, 5999) if protocol == "all" else (6000 - 2 * impressions, 6000 - impressions)
    assert last == (*two_last, False)


def test_a_limit_keeps_all_genuine_pairs_and_draws_the_same_impostors_each_time():
    prints = fvc_fingers("DB", 40, 4)
    (whole,) = pairs_all(prints)
    first, second = (whole.at_most(1000, 5) for _ in range(2))
    pairs = listed([first])
    assert len(pairs) == len(set(pairs)) == 1000 and pairs == listed([second]) != listed([whole.at_most(1000, 6)])
    assert set(pairs) <= set(every_pair(prints))
    assert sum(p.genuine for p in pairs) == 40 * 6
    assert first.impostors_in_all == len(whole.impostor) == 160 * 159 // 2 - 240
    uses = Counter(i for p in pairs if not p.genuine for i in p[:2])
    assert len(uses) > 150  # of 160 prints: drawn from all of them
    assert whole.at_most(10**6, 5) is whole


@pytest.mark.parametrize("of", [0, 5, PERMUTED, PERMUTED + 1, 10**12])
def test_a_draw_takes_none_twice_and_all_where_there_are_too_few(of):
    drawn = draw(np.random.default_rng(0), of, 50)
    assert len(drawn) == min(of, 50) and (np.diff(drawn) > 0).all()
    assert all(0 <= k < of for k in drawn)


# --- the pairs that validate a run


def plain_balanced_pairs(prints, count):
    """As it was written when every pair was listed."""
    rng = np.random.default_rng(VALIDATION_SEED)
    databases = dict.fromkeys(p.database for p in prints)
    every = [p for d in databases for p in every_pair(prints) if prints[p.print0].database == d]
    genuine, impostor = ([p for p in every if p.genuine == kind] for kind in (True, False))
    first = min(len(genuine), count // 2)
    chosen = [genuine[i] for i in sorted(rng.permutation(len(genuine))[:first])]
    return chosen + [impostor[i] for i in sorted(rng.permutation(len(impostor))[: count - first])]


@pytest.mark.parametrize("count", [0, 7, 64, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_validates_on_the_pairs_that_a_list_of_all_gave(seed, count):
    prints = mixed_prints(seed)
    assert balanced_pairs(Mock(PrintSet, prints=tuple(prints)), count) == plain_balanced_pairs(prints, count)


def test_a_run_of_six_thousand_fingers_validates_without_a_list_of_all_pairs():
    prints = fvc_fingers("DB", 3000, 2)
    tracemalloc.start()
    pairs = balanced_pairs(Mock(PrintSet, prints=tuple(prints)), 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert len(set(pairs)) == 512 and sum(p.genuine for p in pairs) == 256
    assert all(p.genuine == (prints[p.print0].identity == prints[p.print1].identity) for p in pairs)
