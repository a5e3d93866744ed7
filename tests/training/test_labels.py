"""What of a pair Module 2 learns from: which registrations are to be trusted, whose frame is shifted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.config import PRESETS, MatchConfig
from ifvit.models.matcher import Embeddings
from ifvit.models.networks import Network
from ifvit.training import step
from ifvit.training.state import TrainState, optimizer
from ifvit.training.step import frame_shifts, match_step

CONFIG = MatchConfig(**PRESETS["smoke"][1]).replace(
    image_size=32, roi_size=16, canvas_size=64, batch_size=3, min_matches=2, deformed=False
)
SURE, UNSURE, IMPOSTOR = range(3)  # pairs: 16 matches, 4 matches, 4 matches
VECTORS = np.array([[[1.0, 0], [0.8, 0.6]], [[1, 0], [0, 1]], [[1, 0], [0.6, 0.8]]], np.float32)  # of both prints


def module1(params, stats, image0, image1, mask0, mask1, train, method):
    """Every cell matches itself in the first pair, four in the corners in the others."""
    corners = jnp.isin(jnp.arange(16), jnp.array([0, 3, 12, 15]))
    sure = jnp.stack([jnp.ones(16, bool), corners, corners])
    return jnp.where(jnp.eye(16, dtype=bool) & sure[:, :, None], -0.1, -9.0), stats


def step_of(config, aligner=True):
    """The metrics of a step of a network whose embeddings are VECTORS, and what it was given."""
    given = {}

    def network(params, stats, pair, shift, train):
        given.update(shift=shift)
        e0, e1 = params["vectors"][:, 0], params["vectors"][:, 1]
        cells = jnp.ones((3, 16), bool)
        log_conf = jnp.log(jnp.array([0.5, 0.25, 0.125]))[:, None, None] + jnp.zeros((3, 16, 16))
        return Embeddings(e0, e1, e0, e1, log_conf, cells), stats

    rng = np.random.default_rng(0)
    canvas, mask = rng.integers(0, 255, (3, 64, 64), np.uint8), np.ones((3, 8, 8), bool)
    batch = dict(canvas0=canvas, canvas1=canvas, mask0=mask, mask1=mask, genuine=np.array([True, True, False]))
    batch |= dict(label0=np.array([0, 1, 0], np.int32), label1=np.array([0, 1, 1], np.int32))
    params = {"vectors": jnp.asarray(VECTORS)} | {f"arcface_{k}": jnp.eye(2) for k in ("global", "local")}
    tx = optimizer(config, 0.0)
    one_step = match_step(Network(None, network), Network(None, module1) if aligner else None, config)
    state = TrainState(params, {}, tx.init(params), jnp.int32(0))
    _, metrics = jax.jit(one_step)(state, batch, jnp.float32(1e-3), ({}, {}))
    return {k: float(v) for k, v in metrics.items()}, given


def arcface(cosines, target, config):
    """The loss of one embedding, by its cosines with both centres."""
    logits = config.arcface_scale * np.array(cosines, float)
    theta = np.arccos(np.clip(cosines[target], -1 + 1e-6, 1 - 1e-6))
    logits[target] = config.arcface_scale * np.cos(theta + config.arcface_margin)
    return np.logaddexp(*logits) - logits[target]


@pytest.mark.run
def test_a_genuine_pair_of_few_matches_teaches_nothing_and_an_impostor_pair_does():
    """Its cosine is 0; without it L_E is the mean of 1 − 0.8 and of 0.6 over the margin."""
    config = CONFIG.replace(label_matches=12, dense_loss="nll", embedding_margin=0.4)
    (all_count, _), (sure_count, _) = step_of(config.replace(label_matches=0)), step_of(config)
    assert all_count["l_e"] == pytest.approx((0.2 + 1.0 + 0.2) / 3, abs=1e-5)
    assert sure_count["l_e"] == pytest.approx((0.2 + 0.2) / 2, abs=1e-5)
    some = np.float32(
        1 - 1e-6
    )  # L_D: a mean over the matches, and one over the impostors' cells, which are sure of some match
    assert all_count["l_d"] == pytest.approx((np.log(2) + np.log(4)) / 2 - np.log1p(-some), rel=1e-4)
    assert sure_count["l_d"] == pytest.approx(np.log(2) - np.log1p(-some), rel=1e-4)
    of = {
        pair: [arcface(v, label, config) for v, label in zip(VECTORS[pair], labels)]
        for pair, labels in ((SURE, (0, 0)), (UNSURE, (1, 1)), (IMPOSTOR, (0, 1)))
    }
    first = lambda *pairs: np.mean([of[p][0] for p in pairs])
    second = lambda *pairs: np.mean([of[p][1] for p in pairs])
    assert all_count["l_a"] == pytest.approx((first(0, 1, 2) + second(0, 1, 2)) / 2, rel=1e-3)
    assert sure_count["l_a"] == pytest.approx((first(0, 2) + second(0, 2)) / 2, rel=1e-3)
    assert sure_count["aligned"] == all_count["aligned"] == 1


@pytest.mark.run
def test_laid_as_the_ridges_agree_a_genuine_pair_that_does_not_register_teaches_nothing(monkeypatch):
    """All have matches enough; of the second and the third pair the ridges are not the same."""
    registered, matches = jnp.array([True, False, False]), jnp.full(3, 16)
    monkeypatch.setattr(step, "aligned_pair", lambda *_: (None, registered, matches))
    config = CONFIG.replace(label_matches=12, dense_loss="nll", embedding_margin=0.4)
    by_matches, by_ridges = (step_of(config.replace(deformed=deformed))[0] for deformed in (False, True))
    assert by_matches["l_e"] == pytest.approx((0.2 + 1.0 + 0.2) / 3, abs=1e-5)
    assert by_ridges["l_e"] == pytest.approx((0.2 + 0.2) / 2, abs=1e-5)
    assert by_ridges["aligned"] == by_matches["aligned"] == 0.5


def test_without_module_1_all_pairs_count():
    few, none = (step_of(CONFIG.replace(label_matches=n), aligner=False)[0] for n in (12, 0))
    assert few == none and few["l_e"] > 0 and few["l_a"] > 0 and few["l_d"] == 0


def test_a_frame_is_shifted_by_whole_cells_of_either_sign_or_not_at_all():
    shifts = np.asarray(jax.jit(lambda keys: frame_shifts(keys, 2))(jax.random.split(jax.random.key(0), 200)))
    assert sorted(set(shifts[:, 0])) == sorted(set(shifts[:, 1])) == [-2, -1, 0, 1, 2]
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.3
    assert step_of(CONFIG.replace(frame_shift=0))[1]["shift"] is None
    assert step_of(CONFIG.replace(frame_shift=2))[1]["shift"].shape == (3, 2)
