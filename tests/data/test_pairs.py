"""Which prints make a pair, and that batches are a pure function of (seed, step), however many processes read."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ifvit.data.canvases import Files
from ifvit.data.impressions import Impressions, canvas_points
from ifvit.data.loader import PairSource, batches, example, fixed_batches
from ifvit.data.pairs import DensePairs, MatchPairs, Pair, class_labels
from ifvit.data.prepare import PrintSet
from ifvit.data.sources import SYNTHETIC, Print


def impressions(database, finger, count):
    return [Print(f"/{database}/{finger}_{i}.png", database, finger, str(i), 500) for i in range(count)]


PRINTS = tuple(p for d in "AB" for f in "123" for p in impressions(d, f, 2)) + tuple(impressions("A", "4", 12))
FINGERS = [p.identity for p in PRINTS]
KINDS = [
    lambda seed=0, share=0.25: DensePairs(PRINTS, share, 0.0, seed),
    lambda seed=0, share=0.25: MatchPairs(PRINTS, share, 0.0, seed),
]
of_either_module = pytest.mark.parametrize("kind", KINDS, ids=["module1", "module2"])


@pytest.fixture(scope="module")
def print_set(tmp_path_factory):
    """Canvases of 8 px whose grey level is the print's number."""
    folder = tmp_path_factory.mktemp("prints")
    canvases = np.broadcast_to(np.arange(len(PRINTS), dtype=np.uint8)[:, None, None], (len(PRINTS), 8, 8))
    np.save(folder / "canvas.npy", canvases)
    np.save(folder / "mask.npy", np.ones((len(PRINTS), 1, 1), bool))
    rows = tuple((0, row) for row in range(len(PRINTS)))
    return PrintSet(PRINTS, rows, (Files(str(folder / "canvas.npy"), str(folder / "mask.npy")),))


# --- pairs ----------------------------------------------------------------------------------------


@of_either_module
def test_a_pair_is_a_pure_function_of_seed_and_number(kind):
    one, two = kind(), kind()
    forwards = [one[n] for n in range(50)]
    assert [two[n] for n in reversed(range(50))] == forwards[::-1]
    assert forwards != [kind(seed=1)[n] for n in range(50)]
    assert len(set(forwards)) > 20


@of_either_module
def test_genuine_pairs_are_of_one_finger_and_impostor_pairs_of_two_in_the_share_asked_for(kind):
    pairs = [kind()[n] for n in range(2000)]
    for a, b, genuine in pairs:
        assert genuine == (FINGERS[a] == FINGERS[b])
    # three standard deviations of a binomial share
    assert np.mean([not p.genuine for p in pairs]) == pytest.approx(0.25, abs=3 * np.sqrt(0.25 * 0.75 / 2000))


def test_module_1_sees_the_same_print_twice_and_module_2_two_impressions():
    for n in range(300):
        a, b, genuine = KINDS[0]()[n]
        assert (a == b) == genuine
        a, b, genuine = KINDS[1]()[n]
        assert a != b


def test_a_finger_of_one_impression_is_paired_with_itself():
    prints = (*impressions("A", "1", 1), *impressions("A", "2", 1))
    pairs = MatchPairs(prints, 0.0, 0.0, 0)
    assert {pairs[n] for n in range(30)} == {Pair(0, 0, True), Pair(1, 1, True)}


@of_either_module
def test_fingers_are_equally_likely_however_many_impressions_they_have(kind):
    pairs = kind(share=0.0)
    counts = Counter(FINGERS[pairs[n].print0] for n in range(2100))
    assert len(counts) == 7
    assert all(abs(count - 300) < 4 * np.sqrt(2100 / 7 * 6 / 7) for count in counts.values())


@of_either_module
def test_four_impostor_pairs_in_five_at_least_are_of_one_database(kind):
    """Database A has 4 fingers and B 3. Else the sensor would tell the two prints apart.

    With A drawn (4/7) a free choice stays in A for 3 of 6, with B (3/7) for 2 of 6: 0.8 + 0.2 · 3/7.
    """
    pairs = kind(share=0.9)
    impostors = [p for p in (pairs[n] for n in range(2000)) if not p.genuine]
    same = np.mean([FINGERS[p.print0][0] == FINGERS[p.print1][0] for p in impostors])
    assert same == pytest.approx(0.8 + 0.2 * (4 / 7 * 3 / 6 + 3 / 7 * 2 / 6), abs=0.03)


@pytest.mark.parametrize("make", [DensePairs, MatchPairs])
def test_generated_fingers_are_drawn_in_their_share_and_never_against_real_ones(make):
    prints = PRINTS[:6] + tuple(p for f in "123" for p in impressions(SYNTHETIC, f, 2))
    pairs = make(prints, 0.5, 0.3, 0)
    made = [[prints[i].database == SYNTHETIC for i in (p.print0, p.print1)] for p in (pairs[n] for n in range(1000))]
    assert all(a == b for a, b in made)
    assert np.mean(made) == pytest.approx(0.3, abs=0.05)
    assert all(make(prints[:6], 0.5, 0.3, 0)[n].print0 < 6 for n in range(50))  # where there are none
    only_made = tuple(replace(p, database=SYNTHETIC) for p in prints[:6])
    assert make(only_made, 0.5, 0.0, 0)[0].print0 < 6  # where there are no others


MADE = tuple(p for f in "123" for p in impressions(SYNTHETIC, f, 4)) + PRINTS
KNOWN = Impressions(MADE, 64)


@pytest.mark.parametrize("known", [None, KNOWN], ids=["nothing is mapped", "no share is asked for"])
def test_without_a_share_of_two_impressions_module_1_has_the_pairs_that_it_had_before_there_were_such(known):
    pairs = DensePairs(PRINTS, 0.3, 0.0, 7, 0.0, known)
    fingers = {}
    for i, p in enumerate(PRINTS):
        fingers.setdefault(p.identity, []).append(i)
    for n in range(300):
        rng = np.random.default_rng([7, 1, n])
        rng.random()  # whether generated
        if rng.random() < 0.3:
            assert not pairs[n].genuine
            continue
        i = int(rng.choice(list(fingers.values())[rng.integers(len(fingers))]))
        assert pairs[n] == (i, i, True)


def test_the_share_of_genuine_pairs_that_have_two_impressions_is_the_one_asked_for():
    """Of generated fingers; of real ones no map is known, and they show one print twice."""
    plain, pairs = DensePairs(MADE, 0.25, 0.5, 0), DensePairs(MADE, 0.25, 0.5, 0, 0.4, KNOWN)
    made, seconds = [], Counter()
    for n in range(4000):
        before, (a, b, genuine) = plain[n], pairs[n]
        if not genuine:
            assert (a, b, genuine) == before
            continue
        assert a == before.print0 and MADE[a].identity == MADE[b].identity
        if MADE[a].database == SYNTHETIC:
            made.append(a != b)
            seconds[a, b] += a != b
        else:
            assert a == b
    assert np.mean(made) == pytest.approx(0.4, abs=3 * np.sqrt(0.4 * 0.6 / len(made)))
    assert len(+seconds) == 3 * 4 * 3  # every ordered pair of a finger's impressions


def plain_impostor(rng, fingers: dict) -> Pair:
    """As it was written first: the other fingers are listed, and one of the list is drawn."""
    identities = list(fingers)
    a = identities[rng.integers(len(identities))]
    near = [f for f in identities if f[0] == a[0] and f != a] if rng.random() < 0.8 else []
    others = near or [f for f in identities if f != a]
    b = others[rng.integers(len(others))]
    return Pair(int(rng.choice(fingers[a])), int(rng.choice(fingers[b])), False)


@pytest.mark.parametrize("number, make", [(1, DensePairs), (2, MatchPairs)])
def test_impostors_are_those_that_lists_of_the_other_fingers_gave(number, make):
    """So a run that was begun when they were listed goes on with the same pairs."""
    prints = PRINTS + tuple(impressions("C", "1", 3))  # a database of one finger has nobody near it
    fingers = {}
    for i, p in enumerate(prints):
        fingers.setdefault(p.identity, []).append(i)
    pairs = make(prints, 1.0, 0.0, 5)
    for n in range(300):
        rng = np.random.default_rng([5, number, n])
        rng.random(2)  # whether generated, whether impostor
        assert pairs[n] == plain_impostor(rng, fingers)


# --- identity -------------------------------------------------------------------------------------


def test_mistake_10_ten_fingers_of_a_person_are_ten_classes_and_impostors_to_each_other():
    names = [
        f"1_{hand}_{finger}" for hand in ("left", "right") for finger in ("thumb", "index", "middle", "ring", "little")
    ]
    prints = tuple(p for name in names for p in impressions("SOCOFing", name, 2))
    labels = class_labels(prints)
    assert sorted(labels.values()) == list(range(10))
    pairs = MatchPairs(prints, 0.5, 0.0, 0)
    for n in range(200):
        a, b, genuine = pairs[n]
        assert genuine == (prints[a].finger == prints[b].finger)
        assert genuine == (labels[prints[a].identity] == labels[prints[b].identity])


def test_finger_1_of_two_databases_is_two_classes_in_an_order_that_files_do_not_change():
    labels = class_labels(PRINTS)
    assert labels["A", "1"] != labels["B", "1"] and len(labels) == 7
    assert class_labels(PRINTS[::-1]) == labels


# --- batches --------------------------------------------------------------------------------------


def source(print_set, start=0, stop=4, process=0, processes=1, seed=0):
    return PairSource(print_set, KINDS[1](seed), class_labels(PRINTS), 4, start, stop, process, processes)


def content(examples):
    return [{k: np.asarray(v).tolist() for k, v in e.items()} for e in examples]


def test_an_example_holds_the_canvases_masks_truth_and_classes_of_its_pair_as_numbers(print_set):
    """Mistake 6, too: strings cannot enter a jitted step."""
    e = example(print_set, Pair(2, 7, False), {FINGERS[2]: 5})
    assert (e["canvas0"] == 2).all() and (e["canvas1"] == 7).all() and e["canvas0"].dtype == np.uint8
    assert e["mask0"].shape == (1, 1) and not e["genuine"]
    assert e["label0"] == 5 and e["label1"] == -1  # a finger that is no class
    assert all(np.asarray(v).dtype.kind in "biu" for v in e.values())


def test_step_s_of_batch_size_4_holds_the_pairs_4s_to_4s_plus_3(print_set):
    reader, pairs = source(print_set), KINDS[1]()
    assert len(reader) == 16
    for i in range(16):
        assert (reader[i]["canvas0"] == pairs[i].print0).all() and (reader[i]["canvas1"] == pairs[i].print1).all()


def test_two_processes_read_the_halves_of_the_batches_that_one_reads(print_set):
    whole = content(source(print_set)[i] for i in range(16))
    halves = [source(print_set, process=p, processes=2) for p in range(2)]
    assert [len(h) for h in halves] == [8, 8]
    for step in range(4):
        together = [h[2 * step + k] for h in halves for k in range(2)]
        assert content(together) == whole[4 * step : 4 * step + 4]


def test_a_resume_reads_on_where_the_unbroken_run_does(print_set):
    whole, rest = source(print_set), source(print_set, start=3)
    assert len(rest) == 4
    assert content(rest[i] for i in range(4)) == content(whole[i] for i in range(12, 16))


def test_where_impressions_are_mapped_every_example_has_maps(print_set):
    reader = PairSource(print_set, KINDS[0](), {}, 4, 0, 1, 0, 1, 1, Impressions(PRINTS, 8))
    assert {"map01", "map10"} == reader[0].keys() - source(print_set)[0].keys()
    (batch,) = batches(reader, workers=0)
    for name in ("map01", "map10"):
        np.testing.assert_array_equal(batch[name], np.broadcast_to(canvas_points(8), (4, 2, 2, 2)))


def test_grain_gives_the_same_batches_in_order(print_set):
    reader = source(print_set)
    stacked = list(batches(reader, workers=0))
    assert len(stacked) == 4 and stacked[0]["canvas0"].shape == (4, 8, 8)
    examples = [{k: v[row] for k, v in batch.items()} for batch in stacked for row in range(4)]
    assert content(examples) == content(reader[i] for i in range(16))


def test_a_list_of_pairs_is_filled_up_to_whole_batches_that_say_how_many_count(print_set):
    pairs = [Pair(i, i, True) for i in range(5)]
    (first, all_four), (last, one) = fixed_batches(print_set, pairs, 4)
    assert (all_four, one) == (4, 1)
    assert first["canvas0"][:, 0, 0].tolist() == [0, 1, 2, 3] and last["canvas0"][:, 0, 0].tolist() == [4] * 4
