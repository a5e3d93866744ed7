"""Templates of prints, of a network that nobody has trained."""

import jax
import numpy as np
import pytest

from ifvit.config import DenseConfig, MatchConfig, preset
from ifvit.data.placement import Placement
from ifvit.data.single import Canvases, OnCanvas
from ifvit.errors import UserError
from ifvit.models.networks import match_network
from ifvit.scoring.scorer import Scorer

CONFIG = preset("smoke", MatchConfig)  # a window of 64 px at 200 ppi, of a canvas of 256


def scorer(config, module="matcher"):
    params, stats = ({}, {}) if module == "dense_reg" else jax.jit(match_network(config, 3).init)(jax.random.key(0))
    return Scorer(module, config, params, stats, None, None, 3, None)


@pytest.fixture(scope="module")
def ours():
    return scorer(CONFIG)


@pytest.fixture(scope="module")
def prints():
    """Three prints of ridges of a width of their own; the second fills a quarter of the window, the last is blank."""
    rows, columns = np.mgrid[:256, :256]
    some = []
    for n, size in enumerate((20, 10, 0)):
        mask = np.zeros((32, 32), bool)
        mask[6 : 6 + size, 8 : 8 + size] = True
        inside = np.kron(mask, np.ones((8, 8), bool))
        grey = np.where(inside, 128 + 100 * np.sin(2 * np.pi * (columns + n * rows) / 11), 255).astype(np.uint8)
        some.append(OnCanvas(f"print {n}", grey, mask, Placement()))
    return Canvases(some)


@pytest.mark.run
def test_a_template_is_a_unit_row_a_print_and_turn_in_their_order(ours, prints):
    rows, share = ours.templates(prints, 2, (0.0, 20.0))
    assert rows.shape == (3, 2, CONFIG.embedding_size) and rows.dtype == share.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=2), [[1, 1], [1, 1], [0, 0]], atol=1e-4)
    np.testing.assert_allclose(share, [1, 0.25, 0], atol=0.02)  # 160 and 80 px of the canvas make 64 and 32
    alone, _ = ours.templates(Canvases(prints.some[1:2]), 1)
    np.testing.assert_allclose(alone[0, 0], rows[1, 0], atol=1e-5)
    turned, _ = ours.templates(prints, 3, (20.0,))
    np.testing.assert_allclose(turned[:, 0], rows[:, 1], atol=1e-5)
    assert abs(rows[0, 0] - rows[0, 1]).max() > 1e-4


def test_no_prints_have_no_templates(ours):
    rows, share = ours.templates(Canvases([]), 4, (0.0, 10.0))
    assert rows.shape == (0, 2, CONFIG.embedding_size) and share.shape == (0,)


@pytest.mark.run
@pytest.mark.parametrize(
    "other, told",
    [
        (lambda: scorer(CONFIG.replace(loss_template=0.0)), "This checkpoint of Module 2"),
        (lambda: scorer(preset("smoke", DenseConfig), "dense_reg"), "This Module 1"),
    ],
)
def test_a_checkpoint_that_makes_no_template_says_how_to_get_one(prints, other, told):
    with pytest.raises(UserError, match=f"{told} makes no template of one print; train Module 2 with loss_template"):
        other().templates(prints, 2)
