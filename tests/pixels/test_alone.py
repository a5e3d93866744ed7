"""Prints without a partner: their own pose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.config import PRESETS, MatchConfig
from ifvit.pixels.alone import middle, own_prints

CONFIG = MatchConfig(**PRESETS["smoke"][1])  # 200 ppi, window of 64 px, canvas of 256


def quickly(f):
    """`f` compiled with little optimisation: these pictures are small."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def canvases(x, y, half=40):
    """A square print of ridges with its middle at (x, y) of the canvas, and its mask at 1/8."""
    rows, columns = np.mgrid[:256, :256]
    inside = (abs(columns - x) < half) & (abs(rows - y) < half)
    grey = np.where(inside, 128 + 100 * np.sin(2 * np.pi * ((columns - x) + 0.3 * (rows - y)) / 12), 255)
    return grey.astype(np.uint8)[None], inside.reshape(32, 8, 32, 8).all((1, 3))[None]


@pytest.fixture(scope="module")
def seen():
    run = quickly(lambda canvas, mask, degrees: own_prints(canvas, mask, degrees, CONFIG))
    return lambda where, degrees=0.0: jax.tree.map(np.asarray, run(*canvases(*where), np.float32(degrees)))


def test_a_print_is_seen_about_the_middle_of_its_foreground(seen):
    here, there = seen((127.5, 127.5)), seen((87.5, 151.5))
    np.testing.assert_array_equal(here.mask, there.mask)
    np.testing.assert_allclose(here.image, there.image, atol=1e-3)
    np.testing.assert_allclose(middle(jnp.asarray(here.mask[0])), [31.5, 31.5], atol=0.5)


def test_a_print_is_turned_from_x_towards_y(seen):
    """By 90°: what lay to the right of the middle then lies below it."""
    plain, turned = (seen((103.5, 135.5), degrees).image[0, 6:-6, 6:-6, 0] for degrees in (0, 90))
    np.testing.assert_allclose(turned, np.rot90(plain, -1), atol=0.02)
    assert abs(plain - turned).max() > 1


def test_a_middle_is_the_mean_of_the_foregrounds_points_or_the_pictures_without_any():
    mask = np.zeros((4, 6), bool)
    assert middle(jnp.asarray(mask)).tolist() == [2.5, 1.5]
    mask[1, 2], mask[3, 3] = True, True
    assert middle(jnp.asarray(mask)).tolist() == [2.5, 2.0]
