"""Intervals by bootstrap over fingers, against pairs that are really repeated, and against chance itself."""

import csv
import tracemalloc

import numpy as np
import pytest

from ifvit.data.protocols import pairs_all
from ifvit.data.sources import Print
from ifvit.errors import UserError
from ifvit.scoring import comparison, intervals, rates
from ifvit.scoring.scores_csv import scores_in


def database(fingers=8, impressions=3, seed=0, decimals=1):
    """Scores of all pairs, and whose they are: (genuine, impostor, genuine_fingers, impostor_fingers).

    Some fingers are harder than others.
    """
    rng = np.random.default_rng(seed)
    finger = np.repeat(np.arange(fingers), impressions)
    i, j = np.triu_indices(len(finger), 1)
    same, ease = finger[i] == finger[j], rng.normal(0, 0.7, fingers)
    score = np.round(rng.normal(0, 1, len(i)) + same * (1.5 + ease[finger[i]]), decimals)
    return score[same], score[~same], finger[i][same], np.stack([finger[i], finger[j]], 1)[~same]


def repeated(weights, genuine, impostor, genuine_fingers, impostor_fingers):
    """The scores of a draw, each pair as often as it is drawn."""
    return (
        np.repeat(genuine, weights[genuine_fingers]),
        np.repeat(impostor, weights[impostor_fingers[:, 0]] * weights[impostor_fingers[:, 1]]),
    )


@pytest.mark.parametrize("decimals", [0, 1, 9])  # many ties, some, none
def test_the_rates_of_weighted_pairs_are_those_of_repeated_pairs(decimals):
    data = database(decimals=decimals)
    weights = np.random.default_rng(1).multinomial(8, np.full(8, 1 / 8), size=50).astype(np.int32)
    found = intervals._Rates(*data).of(weights)
    for n, w in enumerate(weights):
        wanted = rates.summary(*repeated(w, *data))
        assert {k: found[k][n] for k in rates.RATES} == pytest.approx({k: wanted[k] for k in rates.RATES}, abs=1e-12)


def test_pairs_are_weighed_some_after_the_other(monkeypatch):
    """Of blocks and rows that end anywhere nothing is lost, nor counted twice."""
    data, weights = database(), np.random.default_rng(1).multinomial(8, np.full(8, 1 / 8), size=50).astype(np.int32)
    wanted = intervals._Rates(*data).of(weights)
    for name, value in {"BLOCK": 31, "ROWS": 7, "DRAWS_AT_ONCE": 11}.items():
        monkeypatch.setattr(intervals, name, value)
    found = intervals._Rates(*data).of(weights)
    for name in rates.RATES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-12)


def test_fingers_may_be_looked_up_as_they_are_needed():
    prints = [Print(f"{f}_{i}", "DB", str(f), str(i), 500.0) for f in range(6) for i in range(3)]
    (pairs,) = pairs_all(prints)
    finger = np.repeat(np.arange(6) * 2 + 1, 3)  # 1, 3, ... 11
    impostor = pairs.impostor[np.arange(len(pairs.impostor))]
    rng = np.random.default_rng(0)
    scores = rng.normal(1, 1, len(pairs.genuine)), rng.normal(0, 1, len(impostor))
    genuine_fingers = finger[pairs.genuine[:, 0]]
    listed = intervals.bootstrap(*scores, genuine_fingers, finger[impostor])
    looked_up = intervals.bootstrap(*scores, genuine_fingers, intervals.Fingers(finger, pairs.impostor))
    for name in rates.RATES:
        np.testing.assert_array_equal(looked_up[name], listed[name])


def test_of_millions_of_pairs_little_more_is_in_memory_than_their_scores(monkeypatch):
    for name, value in {"THRESHOLDS": 90, "DRAWS": 4, "BLOCK": 1 << 14}.items():
        monkeypatch.setattr(intervals, name, value)
    prints = [Print(f"{f}_{i}", "DB", str(f), str(i), 500.0) for f in range(200) for i in range(10)]
    (pairs,) = pairs_all(prints)
    finger = np.repeat(np.arange(200), 10)
    rng = np.random.default_rng(0)
    scores = rng.random(len(pairs.genuine)), rng.random(len(pairs.impostor))
    tracemalloc.start()
    intervals.bootstrap(*scores, finger[pairs.genuine[:, 0]], intervals.Fingers(finger, pairs.impostor))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (
        len(pairs.impostor) == 1_990_000 and peak < 30e6
    )  # bytes: once the scores take 16, once two fingers a pair 32


def test_each_finger_once_gives_the_rates_themselves():
    data = database()
    wanted = rates.summary(*data[:2])
    for name, values in intervals._Rates(*data).of(np.ones((1, 8), np.int32)).items():
        assert values[0] == pytest.approx(wanted[name], abs=1e-12)


def test_of_very_many_scores_a_sample_of_thresholds_gives_nearly_the_rates():
    rng = np.random.default_rng(0)
    genuine, impostor = rng.normal(2.5, 1, 30_000), rng.normal(0, 1, 90_000)
    one_finger = np.zeros(30_000, int), np.zeros((90_000, 2), int)
    found = intervals._Rates(genuine, impostor, *one_finger).of(np.ones((1, 1), np.int32))
    wanted = rates.summary(genuine, impostor)
    for name in rates.RATES:
        assert found[name][0] == pytest.approx(wanted[name], abs=1e-3)


def test_a_draw_of_two_fingers_that_are_one_is_made_again():
    drawn = intervals.bootstrap(np.array([0.9, 0.4]), np.array([0.5]), np.array([0, 1]), np.array([[0, 1]]))
    assert set(drawn["fmr100"]) == {0.5} and len(drawn["fmr100"]) == intervals.DRAWS


def test_fingers_are_told_by_any_numbers():
    genuine, impostor, a, b = database()
    for name, values in intervals.bootstrap(genuine, impostor, a, b).items():
        np.testing.assert_array_equal(values, intervals.bootstrap(genuine, impostor, 7 * a + 2, 7 * b + 2)[name])


def test_an_interval_is_as_wide_as_other_fingers_would_scatter_the_rate():
    """The genuine pairs of a finger all fail or none does.

    With a tenth of F fingers failing, the FNMR scatters by √(0.1 · 0.9 / F).
    """
    fingers, per_finger = 50, 10
    genuine = np.repeat(np.arange(fingers) >= 5, per_finger).astype(float)
    i, j = np.triu_indices(fingers, 1)
    whose = np.repeat(np.arange(fingers), per_finger)
    drawn = intervals.bootstrap(genuine, np.full(len(i), 0.5), whose, np.stack([i, j], 1))
    expected = np.sqrt(0.1 * 0.9 / fingers)  # and not √(0.1 · 0.9 / 500), as if pairs were independent
    assert np.std(drawn["fmr100"]) == pytest.approx(expected, rel=0.1)
    low, high = intervals.interval(drawn["fmr100"])
    assert low < 0.1 < high and high - low == pytest.approx(2 * 1.96 * expected, rel=0.2)


def test_the_mean_of_two_databases_is_surer_than_one_of_them():
    """Of equal and independent ones by √2, even where the draws of the two are the same."""
    drawn = intervals.bootstrap(*database(fingers=30))
    both = intervals.macro({"a": drawn, "b": drawn})
    assert np.std(both["eer"]) == pytest.approx(np.std(drawn["eer"]) / np.sqrt(2), rel=0.15)


# --- two systems


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["database", "a", "b", "genuine", "score", "global", "local", "matches"])
        writer.writerows([*row, "", "", 0] for row in rows)
    return str(path)


def rows_of(database, fingers=12, impressions=3, seed=0, better=0.0):
    """Lines of a scores.csv: what is hard for one system is for the other, `better` sets the genuine scores apart."""
    rng = np.random.default_rng(seed)
    finger = np.repeat(np.arange(fingers), impressions)
    i, j = np.triu_indices(len(finger), 1)
    same, ease = finger[i] == finger[j], rng.normal(0, 1, fingers)
    score = rng.normal(0, 1, len(i)) + same * (2 + ease[finger[i]] + better)
    name = [f"{f}_{k % impressions + 1}.png" for k, f in enumerate(finger)]
    return [[database, name[a], name[b], int(g), f"{s:.9g}"] for a, b, g, s in zip(i, j, same, score)]


def scores_of(rows, database, kind):
    return np.array([float(r[4]) for r in rows if r[0] == database and r[3] == kind])


def test_the_difference_of_two_systems_is_that_of_their_rates(tmp_path):
    mine = rows_of("DB1", seed=1, better=0.5) + rows_of("DB2", seed=2, better=0.5)
    theirs = rows_of("DB1", seed=3) + rows_of("DB2", seed=4)
    found = comparison.compare(write(tmp_path / "mine.csv", mine), write(tmp_path / "theirs.csv", theirs))
    assert set(found["databases"]) == {"DB1", "DB2"}
    for rate in rates.RATES:
        differences = []
        for name in ("DB1", "DB2"):
            here, there = (
                rates.summary(*(scores_of(rows, name, kind) for kind in (1, 0)))[rate] for rows in (mine, theirs)
            )
            row = found["databases"][name][rate]
            assert (row["this"], row["other"], row["difference"]) == (here, there, here - there)
            assert row["ci"][0] <= row["ci"][1]
            differences.append(here - there)
        assert found["macro"][rate]["difference"] == pytest.approx(np.mean(differences))


def test_a_system_against_itself_does_not_differ_in_whatever_order_its_pairs_stand(tmp_path):
    rows = rows_of("DB1")
    turned = [[d, b, a, g, s] for d, a, b, g, s in rows[::-1]]
    found = comparison.compare(write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", turned))
    for row in (*found["databases"]["DB1"].values(), *found["macro"].values()):
        assert row["difference"] == 0 and row["ci"] == [0, 0]


def test_what_is_hard_for_both_systems_cancels_out(tmp_path):
    """A difference of pairs is far surer than the rates themselves: a little better for every finger is better."""
    worse, better = rows_of("DB1", fingers=30, seed=5), rows_of("DB1", fingers=30, seed=5, better=0.4)
    paired = comparison.compare(write(tmp_path / "a.csv", better), write(tmp_path / "b.csv", worse))["macro"]["eer"]
    assert paired["ci"][1] < 0 and paired["difference"] < 0
    genuine, impostor = (scores_of(worse, "DB1", kind) for kind in (1, 0))
    fingers = [np.array([[int(r[c].split("_")[0]) for c in (1, 2)] for r in worse if r[3] == kind]) for kind in (1, 0)]
    low, high = intervals.interval(intervals.bootstrap(genuine, impostor, fingers[0][:, 0], fingers[1])["eer"])
    assert paired["ci"][1] - paired["ci"][0] < (high - low) / 2


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda rows: rows[:-4], "has 210 pairs and .* 206, of which 206 are the same"),
        (lambda rows: [["DB9", *r[1:]] for r in rows], "0 are the same"),
        (
            lambda rows: [[*r[:3], 1 - r[3], r[4]] if n == 5 else r for n, r in enumerate(rows)],
            "1 pairs are genuine in one",
        ),
        (lambda rows: [*rows[:3], ["DB1", "a", "b", "1", "high"]], "b.csv is no scores.csv, line 5 of it is no pair"),
        (lambda rows: [[*rows[0][:3], "yes", "0.5"]], "line 2 of it is no pair"),
        (lambda rows: [], "b.csv holds no pair"),
    ],
)
def test_scores_of_other_pairs_are_refused(tmp_path, change, told):
    rows = rows_of("DB1", fingers=7)  # 21 · 20 / 2 = 210 pairs
    mine, theirs = write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", change(rows))
    with pytest.raises(UserError, match=told):
        comparison.compare(mine, theirs)


def test_what_is_no_evaluation_is_refused(tmp_path):
    mine = write(tmp_path / "a.csv", rows_of("DB1"))
    for content in (b"a,b\n1,2\n", b"", b"\x89PNG\0" + 200_000 * b"\xff"):
        (tmp_path / "notes.csv").write_bytes(content)
        with pytest.raises(UserError, match="notes.csv is no scores.csv, its first line"):
            comparison.compare(mine, str(tmp_path / "notes.csv"))
    with pytest.raises(UserError, match="There are no scores at .*nowhere"):
        scores_in(str(tmp_path / "nowhere"))
    assert scores_in(str(tmp_path / "a.csv")) == mine
    write(tmp_path / "out/scores.csv", rows_of("DB1"))
    assert scores_in(str(tmp_path / "out")) == str(tmp_path / "out/scores.csv")
