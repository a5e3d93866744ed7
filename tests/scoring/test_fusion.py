"""The fusion of Module 2's scores: what it weighs, how it holds to what is known, and what its ratio means."""

import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.pixels.agreement import LOGISTIC
from ifvit.scoring import rates
from ifvit.scoring.fusion import HELD, PRIOR, Fusion, evidence, fit_fusion

SLOPE, OF_OVERLAP, BIAS = LOGISTIC


def scores(ridge_odds, cos_global, cos_local):
    """Scores of pairs whose ridges alone tell the given log-odds, at half an overlap."""
    overlap = np.full(len(ridge_odds), 0.5)
    ridges = np.exp((np.asarray(ridge_odds) - OF_OVERLAP * overlap - BIAS) / SLOPE) - 0.01
    found = {"ridges": ridges, "overlap": overlap, "global": np.asarray(cos_global), "local": np.asarray(cos_local)}
    return {k: v.astype(np.float32) for k, v in found.items()}


def drawn(count=4000, seed=0, apart=3.0):
    """Log-odds of genuine pairs are normal about apart²/2, of impostors about −apart²/2: each its own true ratio."""
    rng = np.random.default_rng(seed)
    genuine = np.arange(count) % 2 == 0
    odds = np.where(genuine, 1, -1) * apart**2 / 2 + apart * rng.normal(size=count)
    return genuine, odds, rng


def test_ratios_that_are_right_stay_as_they_are():
    genuine, odds, rng = drawn(20_000)
    noise = 1.001 - np.exp(-rng.normal(2, 0.5, (2, len(odds)))).clip(0.01, 1)
    fusion = fit_fusion(scores(odds, *noise), genuine)
    assert fusion.features == ("log_global", "log_local", "log_clear", "overlap") and fusion.checked
    assert fusion.weights[2] == pytest.approx(SLOPE, rel=0.1) and max(fusion.weights[:2]) < 0.1
    np.testing.assert_allclose(fusion.log_odds(scores(odds, *noise)), odds, atol=1.5)


def test_a_part_that_speaks_against_genuine_pairs_weighs_nothing():
    genuine, odds, _ = drawn()
    wrong = np.where(genuine, 0.5, 0.9)
    assert fit_fusion(scores(odds, wrong, wrong), genuine).weights[:2] == (0.0, 0.0)


def test_few_fingers_that_it_separates_without_an_error_do_not_carry_it_away():
    genuine, odds, rng = drawn(24, apart=6.0)
    perfect = np.where(genuine, 0.99, 0.2) + rng.normal(0, 0.001, 24)
    fusion = fit_fusion(scores(odds, perfect, perfect), genuine)
    assert fusion.weights[2] == pytest.approx(PRIOR[0] * SLOPE, rel=0.2)
    assert max(fusion.weights[:2]) < 1  # unheld, nothing would bound them


def test_a_cosine_that_tells_more_than_the_ridges_is_heeded():
    genuine, odds, rng = drawn()
    told = 1.001 - np.exp(-np.where(genuine, 4, 2) - rng.normal(0, 0.3, len(odds)))
    found = scores(np.zeros(len(odds)), told, np.full(len(odds), 0.5))
    fusion = fit_fusion(found, genuine)
    fused = fusion.score(found)
    assert fusion.weights[0] > 0.5 and rates.equal_error_rate(fused[genuine], fused[~genuine]) < 0.01
    assert rates.equal_error_rate(evidence(found)[genuine], evidence(found)[~genuine]) < 0.01


def test_what_holds_in_one_database_alone_is_held_back_where_databases_are_named():
    """The local cosine tells all in the first database, and nothing in the others."""
    genuine, odds, rng = drawn(3000, apart=2.0)
    databases = np.repeat(["A", "B", "C"], 1000)
    local = np.where((databases == "A") & genuine, 0.999, rng.uniform(0.3, 0.999, 3000))
    found = scores(odds, np.full(3000, 0.5), local)
    free, held = (fit_fusion(found, genuine, d).weights[1] for d in (np.repeat("A", 3000), databases))
    assert held <= free and HELD > 0


def test_without_module_1_the_cosines_alone_are_weighed():
    genuine, odds, rng = drawn()
    found = {k: np.where(genuine, 0.95, 0.6) + rng.normal(0, 0.04, len(odds)) for k in ("global", "local")}
    found = {k: v.clip(-1, 1) for k, v in found.items()}
    fusion = fit_fusion(found, genuine)
    assert fusion.features == ("log_global", "log_local") and not fusion.checked and max(fusion.weights) > 0


def test_the_papers_sum_ranks_pairs_as_the_paper_does():
    genuine, odds, rng = drawn()
    found = scores(odds, rng.uniform(-1, 1, len(odds)), np.where(genuine, 0.8, 0.2) + rng.normal(0, 0.1, len(odds)))
    fusion = fit_fusion(found, genuine, paper=0.6)
    total = 0.6 * found["global"] + 0.4 * found["local"]
    order = np.argsort(total)
    assert (np.diff(fusion.log_odds(found)[order]) >= -1e-6).all() and not fusion.checked


def test_what_a_checkpoint_stores_comes_back():
    genuine, odds, _ = drawn(100)
    found = scores(odds, np.full(100, 0.5), np.full(100, 0.5))
    fusion = fit_fusion(found, genuine)
    told = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(fusion).items()}
    assert Fusion.of_metadata(told) == fusion
    earlier = Fusion.of_metadata({"weights": [1.0, 2.0, 3.0, 4.0], "bias": 0.5, "impostor_scores": [0.9, 0.1]})
    assert earlier.features == ("global", "local", "agreement", "matches") and not earlier.checked


def test_a_rate_below_three_in_the_number_of_impostors_is_none_that_can_be_shown():
    assert Fusion((), 0.0, tuple(np.linspace(1, 0, 600))).least_fmr == pytest.approx(0.005)
    assert Fusion((), 0.0, ()).least_fmr == 1


def test_a_threshold_rises_below_one_in_the_number_of_impostors_as_their_tail_does():
    """Log-odds of the tail are exponential: one of 1,000 lies at −3 + ln 1,000, one of 10,000 ln 10 above it."""
    rng = np.random.default_rng(2)
    impostors = tuple(np.sort(1 / (1 + np.exp(3 - rng.exponential(size=1000))))[::-1])
    fusion = Fusion((1.0,), 0.0, impostors, ("log_local",))
    odds = [np.log(t / (1 - t)) for t in map(fusion.threshold, (0.003, 0.001, 0.0003, 0.0001))]
    assert (np.diff(odds) > 0.3).all()
    assert odds[3] == pytest.approx(-3 + np.log(10_000), abs=2)  # as the 100 highest tell


@pytest.mark.parametrize(
    "genuine, impostor, bits",
    [
        ([0.0], [0.0], 1.0),
        ([np.log(3)], [-np.log(3)], np.log2(4 / 3)),
        ([np.log(3)], [0.0, np.log(3)], (np.log2(4 / 3) + (1 + 2) / 2) / 2),
        ([1000.0], [-1000.0], 0.0),
    ],
)
def test_cllr_is_the_mean_cost_in_bits(genuine, impostor, bits):
    assert rates.cllr(np.array(genuine), np.array(impostor)) == pytest.approx(bits)


def test_the_least_cllr_is_that_of_the_best_calibration():
    genuine, odds, _ = drawn(2000)
    right = rates.cllr(odds[genuine], odds[~genuine])
    least = rates.min_cllr(odds[genuine], odds[~genuine])
    assert right - 0.03 < least <= right
    assert rates.min_cllr(5 * odds[genuine] + 9, 5 * odds[~genuine] + 9) == pytest.approx(least)
    assert rates.cllr(5 * odds[genuine] + 9, 5 * odds[~genuine] + 9) > 2 * right
    assert rates.min_cllr(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 0
    assert rates.min_cllr(np.ones(3), np.ones(5)) == pytest.approx(1)  # all equal: they tell nothing


def test_a_fusion_of_ridges_that_were_not_smoothed_keeps_its_threshold():
    """One impostor in a thousand had 0.131 then, and has 0.165 now."""
    before = Fusion((6.0,), 13.0, (), ("log_ridges",))
    ridges = np.linspace(0, 1, 101, dtype=np.float32)
    found = {"ridges": ridges, "global": 0 * ridges}
    odds = before.log_odds(found)
    assert before.checked and (np.diff(odds) > 0).all()
    (at,) = before.log_odds({"ridges": np.float32([0.165]), "global": np.zeros(1)})
    assert at == pytest.approx(6 * np.log(0.131 + 0.01) + 13, abs=1e-4)
    np.testing.assert_allclose(before.traced_log_odds({"ridges": jnp.asarray(ridges)}), odds, atol=1e-4)
    assert sum(before.parts(found).values()) == pytest.approx(odds)
