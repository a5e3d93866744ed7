"""The dual softmax is a product of two softmaxes; a match is mutual, above the threshold, away from the border."""

import jax
import numpy as np
import pytest

from ifvit.models import matching

similarity, log_dual_softmax = jax.jit(matching.similarity), jax.jit(matching.log_dual_softmax)
mutual_matches = jax.jit(matching.mutual_matches, static_argnums=(1, 3, 4))
ALL = np.ones((1, 4), bool)


@pytest.fixture(scope="module")
def confidences():
    """Random log confidences of two pairs, grids of 4 × 5 cells, some of either image hidden."""
    rng = np.random.default_rng(0)
    sim = rng.normal(0, 4, (2, 20, 20)).astype(np.float32)
    m0, m1 = rng.random((2, 2, 20)) < 0.8
    return np.array(log_dual_softmax(sim, m0, m1)), sim, m0, m1


def test_similarity_is_of_features_over_root_d_at_temperature_a_tenth():
    rng = np.random.default_rng(1)
    f0, f1 = rng.normal(size=(1, 3, 16)), rng.normal(size=(1, 5, 16))
    expected = [[[(f0[0, i] / 4) @ (f1[0, j] / 4) / 0.1 for j in range(5)] for i in range(3)]]
    np.testing.assert_allclose(similarity(f0, f1), expected, rtol=1e-4)


def test_similarity_with_a_learned_scale_is_that_times_the_cosine():
    rng = np.random.default_rng(2)
    f0, f1 = rng.normal(size=(1, 3, 16)), rng.normal(size=(1, 5, 16))
    cosine = f0[0] @ f1[0].T / np.linalg.norm(f0[0], axis=1)[:, None] / np.linalg.norm(f1[0], axis=1)
    np.testing.assert_allclose(similarity(f0, f1, np.log(20.0))[0], 20 * cosine, rtol=1e-4)


def test_the_dual_softmax_is_the_product_of_the_softmaxes_over_unmasked_rows_and_columns(confidences):
    log_conf, sim, m0, m1 = confidences
    for b in range(2):
        e = np.exp(np.float64(sim[b])) * m0[b][:, None] * m1[b]
        expected = e / np.maximum(e.sum(1, keepdims=True), 1e-300) * e / np.maximum(e.sum(0, keepdims=True), 1e-300)
        np.testing.assert_allclose(np.exp(log_conf[b]), expected, rtol=1e-4, atol=1e-12)


def test_mistake_4_the_dual_softmax_is_not_its_square_root():
    """By hand: equal similarities of 2 × 2 cells give 1/2 · 1/2; a root would give 1/2."""
    log_conf = log_dual_softmax(np.zeros((1, 2, 2), np.float32), ALL[:, :2], ALL[:, :2])
    np.testing.assert_allclose(np.exp(log_conf), 0.25, rtol=1e-6)


def test_mistake_4_a_confidence_of_0_19_is_no_match_at_the_threshold_0_2_and_one_of_0_21_is():
    """Similarity log a on the diagonal of 3 × 3 cells, 0 off it: each confidence there is (a / (a + 2))²."""
    for conf, matched in ((0.19, False), (0.21, True)):
        a = 2 * np.sqrt(conf) / (1 - np.sqrt(conf))
        log_conf = log_dual_softmax(np.log(1 + (a - 1) * np.eye(3, dtype=np.float32))[None], ALL[:, :3], ALL[:, :3])
        found = mutual_matches(log_conf, 3, 0.2, 0, (1, 3))
        np.testing.assert_array_equal(found.valid, matched)
        np.testing.assert_allclose(found.confidence, conf if matched else 0, rtol=1e-5)


def brute_force(conf, threshold, border, grid):
    """(cell0, cell1, confidence), best first, by looking at every pair of cells."""

    def inside(cell):
        row, col = divmod(cell, grid[1])
        return border <= row < grid[0] - border and border <= col < grid[1] - border

    found = [
        (i, j, conf[i, j])
        for i in range(conf.shape[0])
        for j in range(conf.shape[1])
        if conf[i, j] > threshold
        and inside(i)
        and inside(j)
        and all(conf[i, k] < conf[i, j] for k in range(conf.shape[1]) if k != j)
        and all(conf[k, j] < conf[i, j] for k in range(conf.shape[0]) if k != i)
    ]
    return sorted(found, key=lambda m: -m[2])


@pytest.mark.parametrize(
    "threshold, border, count", [(0.0, 0, 20), (0.3, 0, 20), (0.1, 1, 20), (0.0, 0, 3), (0.0, 0, 99)]
)
def test_mistake_4_matches_are_mutual_above_the_threshold_and_inside_the_border(confidences, threshold, border, count):
    log_conf = confidences[0]
    found = jax.tree.map(np.asarray, mutual_matches(log_conf, count, threshold, border, (4, 5)))
    for b in range(2):
        expected = brute_force(np.exp(log_conf[b]), threshold, border, (4, 5))[:count]
        assert 0 < len(expected) < 20
        ours = list(zip(found.cell0[b], found.cell1[b], found.confidence[b]))
        assert found.valid[b].sum() == len(expected) and found.valid[b, : len(expected)].all()  # the valid come first
        assert [m[:2] for m in ours[: len(expected)]] == [m[:2] for m in expected]
        np.testing.assert_allclose([m[2] for m in ours[: len(expected)]], [m[2] for m in expected], rtol=1e-4)


def test_a_pair_without_a_common_cell_has_no_match_even_at_threshold_0():
    none = np.zeros((1, 4), bool)
    log_conf = log_dual_softmax(np.ones((1, 4, 4), np.float32), ALL, none)
    assert (np.asarray(log_conf) <= -1e9).all()
    assert not mutual_matches(log_conf, 4, 0.0, 0, (2, 2)).valid.any()


def test_gradients_stay_finite_where_everything_is_masked():
    none = np.zeros((1, 4), bool)
    grad = jax.grad(lambda s: log_dual_softmax(s, none, none).sum())(np.ones((1, 4, 4), np.float32))
    assert np.isfinite(grad).all()
