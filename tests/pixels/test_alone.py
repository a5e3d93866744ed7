"""Prints without a partner: their own pose, in training and after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.config import PRESETS, MatchConfig
from ifvit.pixels.alone import SHIFT, centred, middle, own_prints, own_views

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


def test_what_is_centred_moves_by_whole_pixels_and_nothing_comes_in():
    image, mask = np.arange(64, dtype=np.float32).reshape(8, 8), np.zeros((8, 8), bool)
    mask[0:2, 6:8] = True  # its middle at (6.5, 0.5), the picture's at (3.5, 3.5): 3 to the left, 3 down
    moved, inside = centred(jnp.asarray(image), jnp.asarray(mask), jnp.zeros(2))
    np.testing.assert_array_equal(np.asarray(moved)[3:, :5], image[:5, 3:])
    np.testing.assert_array_equal(np.argwhere(inside), [[3, 3], [3, 4], [4, 3], [4, 4]])
    assert not np.asarray(moved)[:3].any() and not np.asarray(moved)[:, 5:].any()
    _, inside = centred(jnp.asarray(image), jnp.asarray(mask), jnp.array([1.0, -2.0]))
    np.testing.assert_array_equal(np.argwhere(inside)[0], [1, 4])


@pytest.mark.run
def test_in_training_a_print_lies_about_its_own_middle_whatever_part_of_it_touches_and_never_the_same():
    config = CONFIG.replace(partial=1.0)
    (canvas0, mask0), (canvas1, mask1) = canvases(87.5, 151.5, 64), canvases(143.5, 119.5, 56)
    batch = {k: np.repeat(v, 6, 0) for k, v in dict(canvas0=canvas0, canvas1=canvas1, mask0=mask0, mask1=mask1).items()}
    alone = quickly(lambda keys: own_views(keys, batch, config))(jax.random.split(jax.random.key(0), 6))
    assert alone.image.shape == (6, 2, 64, 64, 1) and not np.asarray(alone.image)[~np.asarray(alone.mask)].any()
    masks = np.asarray(alone.mask).reshape(12, 64, 64)
    off = np.array([middle(jnp.asarray(m)) for m in masks]) - 31.5
    most = SHIFT * config.input_ppi / 500 + 1  # whole pixels
    assert abs(off).max() < most and off.std() > 0.2 * most
    assert len({m.tobytes() for m in masks}) == 12 and masks.mean((1, 2)).std() > 0.01
