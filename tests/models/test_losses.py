"""The losses against loops over their definitions."""

import math

import jax
import numpy as np
import pytest

from ifvit.models import losses, matching
from ifvit.models.losses import IGNORE, NO_MATCH
from ifvit.models.matching import log_dual_softmax

log_dual_softmax, cosine_embedding_loss = jax.jit(matching.log_dual_softmax), jax.jit(losses.cosine_embedding_loss)
focal_loss, nll_loss, arcface_loss = (jax.jit(f) for f in (losses.focal_loss, losses.nll_loss, losses.arcface_loss))

# --- L_D ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """A genuine pair (one cell unknown, one hidden, one without a match) and an impostor pair; 4 and 5 cells."""
    rng = np.random.default_rng(0)
    m0, m1 = np.ones((2, 4), bool), np.ones((2, 5), bool)
    m0[0, 3], m1[1, 0] = False, False
    labels = np.array([[2, NO_MATCH, IGNORE, IGNORE], [NO_MATCH] * 4])
    log_conf = log_dual_softmax(rng.normal(0, 2, (2, 4, 5)).astype(np.float32), m0, m1)
    return np.array(log_conf), labels, m0, m1


def focal_by_loop(log_conf, labels, m0, m1, alpha=0.25, gamma=2.0):
    """LoFTR's `compute_coarse_loss`, dense supervision: one α for positives and negatives."""
    positive, negative = [], []
    for b, i, j in np.ndindex(log_conf.shape):
        p = min(max(math.exp(log_conf[b, i, j]), 1e-6), 1 - 1e-6)
        if labels[b, i] == j:
            positive.append(-alpha * (1 - p) ** gamma * math.log(p))
        elif labels[b, i] != IGNORE and m0[b, i] and m1[b, j]:
            negative.append(-alpha * p**gamma * math.log(1 - p))
    return np.mean(positive or [0]) + np.mean(negative or [0])


def test_the_focal_loss_is_loftrs_over_foreground_cells_of_known_truth(batch):
    assert focal_loss(*batch) == pytest.approx(focal_by_loop(*batch), rel=1e-4)


def test_the_focal_loss_by_hand():
    """One cell with p = 1/2 to its match and 1/4 to another: ¼·¼·ln 2 + ¼·¹⁄₁₆·ln(4/3)."""
    log_conf = np.log(np.array([[[0.5, 0.25]]]))
    expected = 0.25 * 0.25 * math.log(2) + 0.25 * 0.0625 * math.log(4 / 3)
    all_cells = np.ones((1, 1), bool), np.ones((1, 2), bool)
    assert focal_loss(log_conf, np.array([[0]]), *all_cells) == pytest.approx(expected, rel=1e-5)


def test_a_confidence_of_zero_is_clamped_at_a_millionth():
    log_conf = np.full((1, 1, 1), -1e9)
    one = np.ones((1, 1), bool)
    expected = 0.25 * (1 - 1e-6) ** 2 * math.log(1e6)
    assert focal_loss(log_conf, np.array([[0]]), one, one) == pytest.approx(expected, rel=1e-5)


def test_the_likelihood_loss_is_of_the_match_or_of_no_match_at_all(batch):
    log_conf, labels, m0, m1 = batch
    picked, unmatched = [], []
    for b, i in np.ndindex(labels.shape):
        if labels[b, i] >= 0:
            picked.append(-log_conf[b, i, labels[b, i]])
        elif labels[b, i] == NO_MATCH and m0[b, i]:
            unmatched.append(-math.log(1 - sum(math.exp(v) for v in log_conf[b, i])))
    assert len(picked) == 1 and len(unmatched) == 5
    assert nll_loss(*batch) == pytest.approx(np.mean(picked) + np.mean(unmatched), rel=1e-4)


@pytest.mark.parametrize("loss", [focal_loss, nll_loss])
def test_unknown_and_hidden_cells_count_for_nothing(batch, loss):
    log_conf, labels, m0, m1 = batch
    other = log_conf.copy()
    other[0, 2] = -3.0  # the cell of unknown truth
    assert loss(other, labels, m0, m1) == loss(log_conf, labels, m0, m1)
    nothing_known = np.full_like(labels, IGNORE)
    assert loss(log_conf, nothing_known, m0, m1) == 0


@pytest.mark.parametrize("loss", [focal_loss, nll_loss])
def test_mistake_8_an_impostor_pair_costs_what_confidence_it_is_given(loss):
    labels, cells = np.full((1, 2), NO_MATCH), np.ones((1, 2), bool)
    sure, unsure = (np.log(np.full((1, 2, 2), p)) for p in (0.4, 0.01))
    assert loss(sure, labels, cells, cells) > 10 * loss(unsure, labels, cells, cells) > 0
    gradient = jax.grad(lambda x: loss(x, labels, cells, cells))(sure)
    assert (np.asarray(gradient) > 0).all()


@pytest.mark.parametrize("loss", [focal_loss, nll_loss])
def test_mistake_8_an_impostor_pair_in_the_batch_does_not_dilute_the_matches(loss):
    """What a match gains by more confidence is the same with and without it."""
    conf = np.log([[[0.3, 0.1], [0.1, 0.6]], [[0.2, 0.2], [0.1, 0.1]]])
    labels, cells = np.array([[0, 1], [NO_MATCH] * 2]), np.ones((2, 2), bool)
    alone, beside = (np.asarray(jax.grad(loss)(conf[:n], labels[:n], cells[:n], cells[:n])) for n in (1, 2))
    np.testing.assert_allclose(beside[0, [0, 1], [0, 1]], alone[0, [0, 1], [0, 1]], rtol=1e-5)
    assert (beside[0, [0, 1], [0, 1]] < -0.01).all()


@pytest.mark.parametrize("loss", [focal_loss, nll_loss])
def test_gradients_are_finite_where_everything_is_masked(loss):
    labels, none = np.full((1, 3), IGNORE), np.zeros((1, 3), bool)
    grad = jax.jit(jax.grad(lambda s: loss(log_dual_softmax(s, none, none), labels, none, none)))(np.ones((1, 3, 3)))
    assert np.isfinite(grad).all()


# --- L_E ------------------------------------------------------------------------------------------


def test_the_embedding_loss_by_hand():
    """Cosines 0.6 (genuine: 0.4), 0.6 and 0 (impostors at margin 0.4: 0.2 and 0): mean 0.2."""
    e0 = np.array([[1.0, 0], [1, 0], [1, 0]])
    e1 = np.array([[0.6, 0.8], [0.6, -0.8], [0, 1]])
    genuine = np.array([True, False, False])
    assert cosine_embedding_loss(e0, e1, genuine, 0.4) == pytest.approx(0.2, abs=1e-6)
    counts = np.array([True, False, True])
    assert cosine_embedding_loss(e0, e1, genuine, 0.4, counts) == pytest.approx((0.4 + 0) / 2, abs=1e-6)


# --- L_A ------------------------------------------------------------------------------------------


def arcface_by_loop(e, weight, labels, margin, scale):
    """InsightFace's ArcFace: cos(θ + m), continued by cos θ − m sin m past θ = π − m."""
    losses = []
    for x, label in zip(e, labels):
        if label < 0:
            continue
        logits = []
        for k in range(weight.shape[1]):
            theta = math.acos(x @ weight[:, k] / np.linalg.norm(weight[:, k]))
            if k == label:
                past = theta > math.pi - margin
                logits.append(math.cos(theta) - margin * math.sin(margin) if past else math.cos(theta + margin))
            else:
                logits.append(math.cos(theta))
        logits = scale * np.array(logits)
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
    return np.mean(losses)


def test_arcface_turns_the_true_class_by_the_margin():
    rng = np.random.default_rng(3)
    e = rng.normal(size=(6, 5))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    weight = 7 * rng.normal(size=(5, 4))  # of any length
    labels = np.array([0, 1, 2, 3, 0, 1])
    for margin, scale in ((0.4, 64.0), (0.4, 4.0), (0.0, 1.0)):
        expected = arcface_by_loop(e, weight, labels, margin, scale)
        assert arcface_loss(e, weight, labels, margin, scale) == pytest.approx(expected, rel=1e-4)


APART = np.array([[1.0, 0, 0], [0, 0, 1]]).T  # the second class at a right angle to all of `at_angle`


def at_angle(theta):
    """An embedding at the angle θ from the first class of APART."""
    return np.array([[math.cos(theta), math.sin(theta), 0]])


@pytest.mark.parametrize("theta", [0.3, math.pi - 0.41, math.pi - 0.39, math.pi - 0.1])
def test_arcface_on_either_side_of_pi_less_the_margin(theta):
    turned = math.cos(theta + 0.4) if theta < math.pi - 0.4 else math.cos(theta) - 0.4 * math.sin(0.4)
    expected = math.log(1 + math.exp(-4 * turned))
    assert arcface_loss(at_angle(theta), APART, np.array([0]), 0.4, 4.0) == pytest.approx(expected, rel=1e-4)


def test_arcface_falls_as_the_embedding_nears_its_class_even_from_behind():
    values = [arcface_loss(at_angle(t), APART, np.array([0]), 0.4, 4.0) for t in np.linspace(math.pi - 0.02, 0.02, 30)]
    assert (np.diff(values) < 0).all()


def test_a_finger_without_a_class_counts_for_nothing_in_arcface():
    e = np.concatenate([at_angle(0.1), at_angle(1.1)])
    one = arcface_loss(e[:1], APART, np.array([1]), 0.4, 8.0)
    assert arcface_loss(e, APART, np.array([1, -1]), 0.4, 8.0) == pytest.approx(float(one), rel=1e-6)
    assert arcface_loss(e, APART, np.array([-1, -1]), 0.4, 8.0) == 0


def test_the_gradient_of_arcface_is_finite_at_and_opposite_to_the_class():
    gradient = jax.jit(jax.grad(losses.arcface_loss, argnums=(0, 1)))
    for angle in (0, math.pi):
        grads = gradient(at_angle(angle), APART, np.array([0]), 0.4, 64.0)
        assert all(np.isfinite(g).all() for g in grads)
