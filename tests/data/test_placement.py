"""Where a picture's pixels lie on the canvas, and in the networks' window: measured on dots, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.config import PRESETS, DenseConfig
from ifvit.data.images import place
from ifvit.data.placement import Placement, mapped, similarity_map, window_to_canvas
from ifvit.data.single import OnCanvas
from ifvit.pixels.geometry import apply_similarity
from ifvit.pixels.views import plain_view, to_canvas


def ridges_with_a_dot(height: int, width: int, ppi: float, x: float, y: float) -> np.ndarray:
    """A round print of concentric ridges on white, and in a small blank one black dot, the darkest place of it."""
    rows, columns = np.mgrid[:height, :width].astype(float)
    radius = np.hypot(rows - 0.45 * height, columns - 0.55 * width)
    period = 9 * ppi / 500
    grey = 200 + 40 * np.cos(2 * np.pi * radius / period)
    grey[radius > 0.35 * min(height, width)] = 255
    away = np.hypot(rows - y, columns - x)
    grey[away < 2 * period] = 240
    return np.rint(grey * (1 - np.exp(-(away**2) / (2 * (0.4 * period) ** 2)))).astype(np.uint8)


def centre_of_darkness(grey: np.ndarray) -> np.ndarray:
    """(x, y) of the dot: of what is darker than any ridge."""
    dark = np.clip(140 - grey.astype(float), 0, None)
    rows, columns = np.mgrid[: grey.shape[0], : grey.shape[1]]
    return np.array([(dark * columns).sum(), (dark * rows).sum()]) / dark.sum()


@pytest.mark.parametrize("ppi", [500, 1000, 569, 333])
@pytest.mark.parametrize("frame", [0, 7])
def test_a_dot_lies_on_the_canvas_where_the_placement_says(ppi, frame):
    height, width = round(0.6 * ppi), round(0.5 * ppi)
    x, y = 0.5 * width + 3.4, 0.6 * height - 2.7
    grey = np.pad(ridges_with_a_dot(height, width, ppi, x, y), frame, constant_values=150)  # is cut off again
    canvas, _, placement = place(grey, ppi)
    found = np.linalg.inv(placement.to_canvas) @ [*centre_of_darkness(canvas), 1]
    np.testing.assert_allclose(found[:2], (x + frame, y + frame), atol=0.1)
    assert min(placement.cut) >= frame


@pytest.mark.parametrize("degrees", [37.0, 90.0, -150.0])
def test_a_dot_of_a_turned_print_lies_where_its_placement_says(degrees):
    x, y = 0.5 * 250 + 3.4, 0.6 * 300 - 2.7
    one = OnCanvas("drawn", *place(ridges_with_a_dot(300, 250, 500, x, y), 500))
    turned = one.turned(degrees / 2).turned(degrees / 2)
    there = mapped(turned.placement.to_canvas, np.array([[x, y]]))[0]
    np.testing.assert_allclose(there, centre_of_darkness(turned.canvas), atol=0.15)
    middle = (len(one.canvas) - 1) / 2
    (u, v), (p, q) = there - middle, mapped(one.placement.to_canvas, np.array([[x, y]]))[0] - middle
    assert np.degrees(np.arctan2(p * v - q * u, p * u + q * v)) == pytest.approx(degrees)  # from x towards y
    assert turned.mm2 == pytest.approx(one.mm2, rel=0.05)  # thresholded twice
    lit = turned.mask.repeat(8, 0).repeat(8, 1)
    assert np.abs(turned.canvas[~lit].astype(int) - turned.canvas[0, 0]).mean() < 12  # the mask turned with the ridges


def test_a_canvas_that_cuts_a_large_print_is_placed_all_the_same():
    grey = ridges_with_a_dot(700, 640, 500, 340.0, 330.0)
    canvas, _, placement = place(grey, 500, canvas=256)
    np.testing.assert_allclose(
        mapped(placement.to_canvas, np.array([[340.0, 330.0]]))[0], centre_of_darkness(canvas), atol=0.1
    )


def test_corners_are_scaled_not_pixel_centres():
    """At 1000 ppi two pixels make one of the canvas: pixels 10 and 11, past a cut of 4, are 3 + 100 there."""
    through = Placement((4, 0), 0.5, (100, 0)).to_canvas
    np.testing.assert_allclose(mapped(through, np.array([[10.5, 0.5]])), [[103, 0]])


def test_the_window_lies_on_the_canvas_where_the_plain_view_has_it():
    config = DenseConfig(**PRESETS["smoke"][0])
    q = np.random.default_rng(0).uniform(0, config.image_size, (20, 2))
    seen = to_canvas(plain_view(config), jnp.asarray(q, jnp.float32), config.image_size)
    np.testing.assert_allclose(mapped(window_to_canvas(config), q), seen, atol=1e-3)


def test_a_similarity_is_the_same_as_a_matrix():
    t, p = np.array([0.9, 0.3, 12, -7], np.float32), np.array([[1.0, 2], [30, -4]], np.float32)
    np.testing.assert_allclose(
        mapped(similarity_map(t), p), apply_similarity(jnp.asarray(t), jnp.asarray(p)), atol=1e-5
    )
