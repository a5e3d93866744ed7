"""Prints that the networks' window cuts: the wider window, and what is told in px of the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.config import DenseConfig, MatchConfig, Traced, preset
from ifvit.data.placement import mapped, similarity_map, window_to_canvas
from ifvit.models.networks import dense_network, match_network
from ifvit.pixels.wide import in_window, looked_at, widened
from ifvit.scoring import scores
from ifvit.scoring.scores import dense_scores, match_scores
from ifvit.window import CUT, cuts, share_seen

SMOKE = preset("smoke", DenseConfig).replace(wide_window=1.5)


@pytest.mark.parametrize("name, side", [("cpu", 288), ("paper", 168), ("quick", None), ("smoke", None)])
def test_the_wider_window_of_each_preset(name, side):
    config = preset(name, DenseConfig)
    wide = widened(config, config.wide_window)
    assert (wide and wide.image_size) == side
    if wide:  # matches for its area, and all else as it was
        assert wide.alignment_matches == round(config.alignment_matches * (side / config.image_size) ** 2)
        assert wide.replace(image_size=config.image_size, alignment_matches=config.alignment_matches) == config


def test_it_is_no_wider_than_the_canvas_and_keeps_the_scalars():
    config = preset("smoke", DenseConfig)  # a canvas of 256 px is 102.4 of the network's
    assert widened(config, 2.0).image_size == 96
    traced = widened(Traced(config, {"inlier_radius": 7.0}), 2.0)
    assert traced.image_size == 96 and traced.inlier_radius == 7.0


def test_a_print_is_cut_where_too_little_of_it_is_seen():
    config = preset("cpu", DenseConfig)  # 320 of 512 px are seen, 40 of 64 cells
    mask = np.zeros((3, 64, 64), bool)
    mask[0] = True
    mask[1, 12:52, 12:52] = True
    np.testing.assert_allclose(share_seen(mask, config), [(40 / 64) ** 2, 1, 1])
    assert cuts(mask, config).tolist() == [True, False, False]
    mask[2, 12:52, 4:52] = True  # 8 of 48 columns, 17 %, lie outside
    assert CUT < 8 / 48 and cuts(mask[2], config)
    mask[2, :, 4:6] = False  # 6 of 46, 13 %
    assert CUT > 6 / 46 and not cuts(mask[2], config)


@pytest.mark.run
def test_a_registration_in_the_wider_window_is_told_in_px_of_the_other():
    """Each in its own window's px, both lead to the same points of the canvas."""
    wide = widened(SMOKE, 1.5)
    state, batch = jax.jit(dense_network(SMOKE).init)(jax.random.key(0)), canvases()
    net = dense_network(SMOKE)
    seen, _ = jax.jit(lambda s, b: looked_at(net, s, b, wide))(state, batch)
    seen = seen._replace(similarity=jnp.array([[0.8, 0.6, 12.0, -7.0]] * 2))
    seen, told = jax.device_get((seen, in_window(seen, wide, SMOKE)))
    there, here = window_to_canvas(wide), window_to_canvas(SMOKE)
    for one, other in ((seen.points0, told.points0), (seen.points1, told.points1)):
        np.testing.assert_allclose(mapped(there, one[0]), mapped(here, other[0]), atol=1e-3)
    through = [w @ similarity_map(x.similarity[0]) @ np.linalg.inv(w) for w, x in ((there, seen), (here, told))]
    np.testing.assert_allclose(*through, atol=1e-3)


def canvases():
    rng = np.random.default_rng(0)
    return {f"canvas{n}": rng.integers(0, 255, (2, 256, 256), np.uint8) for n in (0, 1)} | {
        f"mask{n}": np.ones((2, 32, 32), bool) for n in (0, 1)
    }


@pytest.mark.run
@pytest.mark.parametrize("module", ["dense", "match"])
def test_large_prints_that_were_prepared_alone_have_the_scores_of_their_canvases(module):
    net, batch = dense_network(SMOKE), canvases()
    state = module1 = jax.jit(net.init)(jax.random.key(0))
    how = dense_scores(net, SMOKE, SMOKE.wide_window)
    if module == "match":
        config = preset("smoke", MatchConfig)
        matcher = match_network(config, 2)
        how = match_scores(matcher, net, config, True, SMOKE.wide_window)
        state = (*jax.jit(matcher.init)(jax.random.key(1)), module1)
    rows = [
        jax.jit(how.wide.prepare)(*state, {"canvas": batch[f"canvas{n}"], "mask": batch[f"mask{n}"]}) for n in (0, 1)
    ]
    found = jax.jit(how.wide.score)(*state, scores.paired(*rows))
    expected = jax.jit(how.wide.score)(*state, batch)
    narrow = jax.jit(how.score)(*state, batch)
    assert found.keys() == expected.keys() == narrow.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)
    assert not np.allclose(found["overlap"], narrow["overlap"]) or not np.allclose(found["ridges"], narrow["ridges"])
