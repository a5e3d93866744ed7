"""Error rates against hand calculations and the plain O(n^2) definitions."""

import numpy as np
import pytest

from ifvit.errors import UserError
from ifvit.scoring import rates


def brute_force(genuine, impostor):
    """FMR and FNMR at every threshold that can differ, pair by pair."""
    thresholds = [*sorted({*genuine, *impostor}), np.inf]
    fmr = [sum(s >= t for s in impostor) / len(impostor) for t in thresholds]
    fnmr = [sum(s < t for s in genuine) / len(genuine) for t in thresholds]
    return np.array(fmr), np.array(fnmr)


def brute_force_eer(genuine, impostor):
    fmr, fnmr = brute_force(genuine, impostor)
    t1 = max(t for t in range(len(fmr)) if fnmr[t] <= fmr[t])
    t2 = min(t for t in range(len(fmr)) if fnmr[t] >= fmr[t])
    if fnmr[t1] + fmr[t1] <= fmr[t2] + fnmr[t2]:
        low, high = fnmr[t1], fmr[t1]
    else:
        low, high = fmr[t2], fnmr[t2]
    return (low + high) / 2


def test_eer_where_a_threshold_makes_the_rates_equal():
    # At 0.5: one impostor of four accepted (0.6), one genuine of four refused (0.4).
    assert rates.equal_error_rate([0.4, 0.7, 0.8, 0.9], [0.1, 0.2, 0.3, 0.6]) == 0.25


def test_eer_is_the_middle_of_the_closest_interval_where_none_does():
    # FMR, FNMR at .3: 2/3, 0; at .5: 1/3, 0; at .6: 1/3, 1/2; at .9: 0, 1/2.
    # t1 = .5 with [0, 1/3] (sum 1/3) beats t2 = .6 with [1/3, 1/2] (sum 5/6): (0 + 1/3) / 2.
    assert rates.equal_error_rate([0.5, 0.9], [0.1, 0.3, 0.6]) == pytest.approx(1 / 6)


def test_eer_takes_the_upper_interval_when_its_sum_is_lower():
    # FMR, FNMR at .5: 1, 0 (sum 1); above it: 0, 1/4 (sum 1/4): (0 + 1/4) / 2.
    assert rates.equal_error_rate([0.5, 0.9, 0.9, 0.9], [0.5, 0.5]) == 0.125


@pytest.mark.parametrize(
    "genuine, impostor, eer, auc",
    [
        ([0.8, 0.9], [0.1, 0.2], 0.0, 1.0),  # separable
        ([0.1, 0.2], [0.8, 0.9], 1.0, 0.0),  # reversed
        ([0.5, 0.5], [0.5, 0.5, 0.5], 0.5, 0.5),  # all equal
    ],
)
def test_extremes(genuine, impostor, eer, auc):
    assert rates.equal_error_rate(genuine, impostor) == eer
    assert rates.auc(genuine, impostor) == auc


def test_fmr100_lets_exactly_one_impostor_of_a_hundred_pass():
    impostor = np.arange(100) / 100  # the second highest is 0.98
    genuine = [0.97, 0.98, 0.985, 0.995]
    assert rates.fnmr_at_fmr(genuine, impostor, 0.01) == 0.5  # 0.97 and the tie at 0.98 are refused
    assert rates.fnmr_at_fmr(genuine, impostor, 0.001) == 0.75  # no impostor may pass: above 0.99
    assert rates.fnmr_at_fmr(genuine, impostor, 1) == 0


def test_tied_impostors_pass_together_or_not_at_all():
    impostor = [0.9] * 2 + [0.1] * 98  # 2 % at 0.9: too many for 1 %
    assert rates.fnmr_at_fmr([0.5, 0.9, 0.95], impostor, 0.01) == pytest.approx(2 / 3)
    assert rates.fnmr_at_fmr([0.5, 0.9, 0.95], impostor, 0.02) == 0


def test_auc_counts_a_tie_one_half():
    # 0.5 beats 0.1, ties 0.5, loses to 0.7; 0.7 beats two, ties one: (1.5 + 2.5) / 6.
    assert rates.auc([0.5, 0.7], [0.1, 0.5, 0.7]) == pytest.approx(4 / 6)


def test_det_curve_by_hand():
    thresholds, fmr, fnmr = rates.det_curve([2, 3], [1, 2])
    assert list(thresholds[:3]) == [1, 2, 3] and thresholds[3] > 3
    assert list(fmr) == [1, 0.5, 0, 0]
    assert list(fnmr) == [0, 0, 0.5, 1]


@pytest.mark.parametrize("levels", [5, 50, 100_000])  # many ties, some, hardly any
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definitions_on_random_scores(levels, seed):
    rng = np.random.default_rng(seed)
    genuine = rng.integers(levels // 4, levels, 60) / levels
    impostor = rng.integers(0, 3 * levels // 4, 150) / levels
    fmr, fnmr = brute_force(genuine, impostor)

    _, fmr_t, fnmr_t = rates.det_curve(genuine, impostor)
    np.testing.assert_array_equal(fmr_t, fmr)
    np.testing.assert_array_equal(fnmr_t, fnmr)
    assert rates.equal_error_rate(genuine, impostor) == pytest.approx(brute_force_eer(genuine, impostor), abs=1e-15)
    for target in (0, 0.001, 0.01, 0.1, 1):
        assert rates.fnmr_at_fmr(genuine, impostor, target) == min(fnmr[fmr <= target])
    wins = [(g > i) + (g == i) / 2 for g in genuine for i in impostor]
    assert rates.auc(genuine, impostor) == pytest.approx(np.mean(wins), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("target", [0, 0.01, 0.1, 0.5, 1])
def test_deciding_by_the_threshold_gives_the_rates_it_was_chosen_for(dtype, target):
    rng = np.random.default_rng(7)
    genuine = np.round(rng.normal(1, 1, 80), 1).astype(dtype)
    impostor = np.round(rng.normal(0, 1, 200), 1).astype(dtype)
    threshold = rates.threshold_at_fmr(impostor, target)
    assert np.mean(impostor >= threshold) <= target
    if target < 1:
        assert np.mean(genuine < threshold) == rates.fnmr_at_fmr(genuine, impostor, target)


def test_summary_and_its_mean_over_databases():
    perfect = rates.summary([0.8, 0.9], [0.1, 0.2, 0.3])
    assert perfect == {"eer": 0, "fmr100": 0, "fmr1000": 0, "zerofmr": 0, "auc": 1, "genuine": 2, "impostor": 3}
    equal = rates.summary([0.5], [0.5])
    assert equal == {"eer": 0.5, "fmr100": 1, "fmr1000": 1, "zerofmr": 1, "auc": 0.5, "genuine": 1, "impostor": 1}
    means = {"eer": 0.25, "fmr100": 0.5, "fmr1000": 0.5, "zerofmr": 0.5, "auc": 0.75}
    assert rates.macro({"a": perfect, "b": equal}) == means


@pytest.mark.parametrize("genuine, impostor", [([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([1.0], [0.0, np.inf])])
def test_no_scores_and_no_numbers_are_refused(genuine, impostor):
    for rate in (rates.summary, rates.auc, rates.equal_error_rate, rates.det_curve):
        with pytest.raises(UserError, match="scores"):
            rate(genuine, impostor)


def test_other_nonsense_is_refused():
    with pytest.raises(UserError, match="no impostor scores"):
        rates.threshold_at_fmr([], 0.01)
    with pytest.raises(UserError, match="not within 0 to 1"):
        rates.threshold_at_fmr([0.5], 2)
    with pytest.raises(UserError, match="not within 0 to 1"):
        rates.fnmr_at_fmr([0.5], [0.5], float("nan"))
    with pytest.raises(UserError, match="no database"):
        rates.macro({})


def test_zerofmr_lets_no_impostor_pass_where_fmr1000_lets_one_of_a_thousand():
    impostor = np.arange(1000) / 1000  # the highest are 0.998 and 0.999
    found = rates.summary([0.9985, 0.9989, 0.9995, 0.5], impostor)
    assert found["fmr1000"] == 0.25  # above 0.998
    assert found["zerofmr"] == 0.75  # above 0.999


def test_a_thinned_curve_for_a_picture_has_the_same_eer_and_low_false_match_rates_of_its_own():
    rng = np.random.default_rng(0)
    scores = rng.normal(2, 1, 20_000), rng.normal(0, 1, 80_000)
    _, fmr, fnmr = rates.det_curve(*scores)
    _, thin_fmr, thin_fnmr = rates.det_curve(*scores, rates.POINTS)
    assert len(thin_fmr) < 5000 < len(fmr) == 100_001
    assert rates.eer_of_curve(thin_fmr, thin_fnmr) == rates.eer_of_curve(fmr, fnmr)
    for rate in (1e-4, 1e-3, 1e-2):
        assert thin_fnmr[thin_fmr <= rate][0] == pytest.approx(fnmr[fmr <= rate][0], rel=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("apart", [-9, 0, 1, 2, 9])  # reversed, alike, ..., separable
@pytest.mark.parametrize("decimals", [0, 1, 9])  # many ties, some, none
@pytest.mark.parametrize("points", [4, 20])
def test_a_few_points_of_a_curve_give_the_very_rates_of_all(points, decimals, apart, dtype):
    rng = np.random.default_rng(points)
    for genuine, impostor in ((1, 500), (500, 1), (70, 3000)):
        scores = [
            np.round(rng.normal(mean, 1, n), decimals).astype(dtype) for mean, n in ((apart, genuine), (0, impostor))
        ]
        found, wanted = rates.det_curve(*scores, points), rates.det_curve(*scores)
        assert {*zip(*found)} <= {*zip(*wanted)} and found[0][-1] == wanted[0][-1]
        assert rates.eer_of_curve(*found[1:]) == rates.eer_of_curve(*wanted[1:])
        for rate in rates.FALSE_MATCH_RATES.values():
            assert found[2][found[1] <= rate][0] == wanted[2][wanted[1] <= rate][0]
