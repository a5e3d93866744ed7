"""Prints on the device: views (pose, distortion), corruption, normalisation, ground truth.

Everything here is per print, under `vmap`, inside the jitted step. A view maps each of its pixels
to the 500 ppi canvas analytically, so that the truth between two views of a print is exact.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from ifvit.config import Settings
from ifvit.geometry import blur, cell_centres, exact, grid_points, local_normalise, sample
from ifvit.losses import IGNORE, NO_MATCH
from ifvit.models.resnet import STRIDE

CANVAS_PPI = 500
MODES = 5  # sine modes of a distortion field
RIDGE = 9.0  # px at 500 ppi, a usual ridge period; windows below are given in ridges


class View(NamedTuple):
    """canvas = centre + matrix · (q − window's centre) + Σ amplitude · sin(frequency · q + phase), q in view px."""

    matrix: Float[Array, "2 2"]     # a rotation and a scale
    centre: Float[Array, "2"]
    amplitude: Float[Array, "M 2"]
    frequency: Float[Array, "M 2"]
    phase: Float[Array, " M"]


def plain_view(config: Settings) -> View:
    """The window centred on the canvas, upright, undistorted: what evaluation sees."""
    ratio = CANVAS_PPI / config.input_ppi
    centre = jnp.full(2, (config.canvas_size - 1) / 2, jnp.float32)
    zeros = jnp.zeros((MODES, 2))
    return View(jnp.eye(2) * ratio, centre, zeros, zeros, jnp.zeros(MODES))


@exact
def random_view(key: Key[Array, ""], config: Settings, angle: Float[Array, ""], scale: float | Float[Array, ""],
                shift: float | Float[Array, ""]) -> View:
    """A view turned by `angle` radians, scaled by up to 1 ± scale, moved by up to ± shift px at 500 ppi."""
    # one draw for everything: each draw is a threefry of its own, and half a second of compilation
    u = jax.random.uniform(key, (3 + 5 * MODES,), minval=-1, maxval=1)
    modes = u[3:].reshape(5, MODES)
    plain = plain_view(config)
    s = 1 + scale * u[0]
    c, d = jnp.cos(angle) * s, jnp.sin(angle) * s
    length = (260.0 + 140.0 * modes[0]) * config.input_ppi / CANVAS_PPI
    towards = jnp.pi * modes[1]
    frequency = (2 * jnp.pi / length)[:, None] * jnp.stack([jnp.cos(towards), jnp.sin(towards)], axis=-1)
    amplitude = 2.8 * config.distortion * modes[2:4].T * (length[:, None] / length.max())
    return View(jnp.array([[c, -d], [d, c]]) @ plain.matrix, plain.centre + shift * u[1:3],
                amplitude, frequency, jnp.pi * modes[4])


@exact
def to_canvas(view: View, q: Float[Array, "N 2"], image_size: int) -> Float[Array, "N 2"]:
    middle = (image_size - 1) / 2
    bend = jnp.sin(q @ view.frequency.T + view.phase) @ view.amplitude
    return view.centre + (q - middle) @ view.matrix.T + bend


@exact
def to_view(view: View, p: Float[Array, "N 2"], image_size: int) -> Float[Array, "N 2"]:
    """Inverse of `to_canvas`, by fixed-point iteration: distortion moves a point far less than its wave length."""
    middle = (image_size - 1) / 2
    inverse = view.matrix.T / (view.matrix[0] ** 2).sum()  # of a rotation and a scale
    q = middle + (p - view.centre) @ inverse.T
    return jax.lax.fori_loop(0, 6, lambda _, q: q + (p - to_canvas(view, q, image_size)) @ inverse.T, q)


def take_view(canvas: UInt8[Array, "C C"], mask8: Bool[Array, "C/8 C/8"], view: View, config: Settings,
              ) -> tuple[Float[Array, "S S"], Bool[Array, "S S"]]:
    """Canvas and its foreground, at 1/8 of the resolution -> the view's pixels (0 … 1) and foreground."""
    size, ratio = config.image_size, CANVAS_PPI / config.input_ppi
    xy = to_canvas(view, jnp.asarray(grid_points(size)), size)
    image = canvas.astype(jnp.float32) / 255
    if ratio > 1.5:  # half a sample's width: no aliasing of what the window cannot hold
        background = image[0, 0]
        image = blur(image - background, 0.45 * math.sqrt(ratio**2 - 1)) + background
    pixels = sample(image, xy, image[0, 0])
    inside = sample(mask8.astype(jnp.float32), (xy - 3.5) / 8, 0.0) > 0.5
    return pixels.reshape(size, size), inside.reshape(size, size)


def truth(view0: View, view1: View, m0: Bool[Array, " L"], m1: Bool[Array, " L"], config: Settings) -> Int[Array, " L"]:
    """Labels of `losses`: cell centres of either view warped to the other, mutual nearest cells match."""
    size, side = config.image_size, config.image_size // STRIDE
    centres = jnp.asarray(cell_centres(size, STRIDE))

    def nearest(source, target, mask):
        q = to_view(target, to_canvas(source, centres, size), size)
        cell = jnp.round((q - (STRIDE - 1) / 2) / STRIDE).astype(jnp.int32)
        inside = ((cell >= 0) & (cell < side)).all(-1)
        index = jnp.where(inside, cell[:, 1] * side + cell[:, 0], 0)
        return index, inside & mask[index]

    j, seen = nearest(view0, view1, m1)
    i, back = nearest(view1, view0, m0)
    mutual = seen & back[j] & (i[j] == jnp.arange(side * side))
    return jnp.where(~m0, IGNORE, jnp.where(mutual, j, jnp.where(seen, IGNORE, NO_MATCH)))


def corrupt(key: Key[Array, ""], image: Float[Array, "S S"], mask: Bool[Array, "S S"], config: Settings,
            strength: float | Float[Array, ""]) -> tuple[Float[Array, "S S"], Bool[Array, "S S"]]:
    """Dryness or over-pressure, sensor noise, uneven contact and contrast; sometimes a partial contact.

    Ridges are dark: a minimum filter thickens them (over-pressure), a maximum filter thins them (dryness).
    """
    size = image.shape[0]
    ridge = RIDGE * config.input_ppi / CANVAS_PPI
    k_uniform, k_normal = jax.random.split(key)
    u = jax.random.uniform(k_uniform, (12,))
    octaves = [0.6 * ridge, 1.5 * ridge, 4 * ridge, 0.3 * ridge, 3 * ridge, 4 * ridge]
    perlin0, perlin1, perlin2, pores, contrast, ragged, white = _noises(k_normal, size, octaves)
    x = local_normalise(image, mask, 2 * ridge)

    thick = config.thickness * strength * (2 * u[0] - 1)
    x = x + jnp.abs(thick) * (jnp.where(thick > 0, _neighbours(x, jnp.minimum), _neighbours(x, jnp.maximum)) - x)
    x = x - 0.5 * thick  # what a local threshold would then call ridge

    amount = config.noise * strength * u[1:5] ** 2
    x = x + 0.7 * amount[0] * (perlin0 + perlin1 + perlin2) + 0.8 * amount[1] * white
    x = x + 2.0 * amount[2] * jax.nn.relu(pores - 0.8)  # bright specks, on ridges where it is dry
    x = x * jnp.exp(0.8 * amount[3] * contrast)

    # partial contact: an ellipse of the finger, its border ragged
    yx = jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"), axis=-1) / size - 0.5
    axes, place = 0.25 + 0.3 * u[5:7], 0.4 * u[7:9] - 0.2
    contact = (((yx - place) / axes) ** 2).sum(-1) < 1 + 0.25 * ragged
    kept = mask & (contact | (u[9] > 0.7 * config.partial))
    mask = jnp.where(kept.mean() > 0.08, kept, mask)

    soft = jnp.where(u[10] < 0.3, u[11] * strength, 0.0)
    return (1 - soft) * x + soft * blur(x, 0.18 * ridge), mask


def normalise(images: Float[Array, "B S S"], masks: Bool[Array, "B S S"], config: Settings) -> Float[Array, "B S S 1"]:
    """What both networks see: local mean and deviation over a ridge, nothing outside the foreground.

    The background becomes 0 everywhere, so no corner gives away how a print was turned.
    """
    return local_normalise(images, masks, 0.9 * RIDGE * config.input_ppi / CANVAS_PPI)[..., None]


# image and foreground of print 0, image and foreground of print 1
Views = tuple[Float[Array, "B S S"], Bool[Array, "B S S"], Float[Array, "B S S"], Bool[Array, "B S S"]]


class DensePair(NamedTuple):
    image0: Float[Array, "B S S 1"]
    image1: Float[Array, "B S S 1"]
    mask0: Bool[Array, "B S S"]
    mask1: Bool[Array, "B S S"]
    labels: Int[Array, "B L"]


def dense_pair(keys: Key[Array, " B"], batch: dict, config: Settings, cell_mask: Callable, known_warp_only: bool = False) -> DensePair:
    """Module 1's input: two views of print a with their truth, or of a and b, where nothing matches.

    `keys` (B,); `batch` has `canvas0`, `canvas1` (B C C) uint8, `mask0`, `mask1` (B C/8 C/8) bool and
    `genuine` (B,) bool; a genuine pair has the same print twice. With `known_warp_only` views are
    not corrupted: pose and distortion alone.
    """
    rotation = jnp.radians(config.rotation)
    # of view 0 and view 1: the second is turned, scaled, moved and corrupted more
    scale, shift, strength = (jnp.array(v) for v in ((0.03, 0.08), (10.0, 45.0), (0.6, 1.0)))

    def one(key, canvases, masks, genuine):
        k_turn, k_views = jax.random.split(key)
        turn = jax.random.uniform(k_turn, (2,), minval=-1, maxval=1) * jnp.array([math.radians(15), rotation])

        def view(key, canvas, mask, angle, scale, shift, strength):
            k_view, k_corrupt = jax.random.split(key)
            v = random_view(k_view, config, angle, scale, shift)
            x, m = take_view(canvas, mask, v, config)
            return v, *((x, m) if known_warp_only else corrupt(k_corrupt, x, m, config, strength))

        views, x, m = jax.vmap(view)(jax.random.split(k_views), canvases, masks, jnp.cumsum(turn), scale, shift,
                                     strength)
        cells = cell_mask(m)
        view0, view1 = (jax.tree.map(lambda a, i=i: a[i], views) for i in (0, 1))
        none = jnp.where(cells[0], NO_MATCH, IGNORE)
        return x, m, jnp.where(genuine, truth(view0, view1, *cells, config), none)

    x, m, labels = jax.vmap(one)(keys, *_stacked(batch), batch["genuine"])
    image0, image1 = (normalise(x[:, i], m[:, i], config) for i in (0, 1))
    return DensePair(image0, image1, m[:, 0], m[:, 1], labels)


def match_views(keys: Key[Array, " B"], batch: dict, config: Settings) -> Views:
    """Module 2's prints before alignment, each turned, moved and corrupted on its own."""
    def view(key, canvas, mask):
        k_angle, k_view, k_corrupt = jax.random.split(key, 3)
        angle = _uniform(k_angle, -1, 1) * jnp.radians(config.rotation)
        image, mask = take_view(canvas, mask, random_view(k_view, config, angle, 0.03, 20.0), config)
        return corrupt(k_corrupt, image, mask, config, 0.5)

    keys = jax.vmap(jax.random.split)(keys)
    x, m = jax.vmap(jax.vmap(view))(keys, *_stacked(batch))
    return x[:, 0], m[:, 0], x[:, 1], m[:, 1]


def plain_views(batch: dict, config: Settings) -> Views:
    """Both prints of each pair as they are."""
    view = plain_view(config)
    x, m = jax.vmap(jax.vmap(lambda canvas, mask: take_view(canvas, mask, view, config)))(*_stacked(batch))
    return x[:, 0], m[:, 0], x[:, 1], m[:, 1]


def _stacked(batch: dict):
    """Canvases and masks (B 2 …): a pair stays together, so a batch split over devices needs no exchange."""
    return (jnp.stack([batch["canvas0"], batch["canvas1"]], axis=1),
            jnp.stack([batch["mask0"], batch["mask1"]], axis=1))


def _uniform(key, lo, hi):
    return jax.random.uniform(key, minval=lo, maxval=hi)


def _neighbours(x, pick):
    """`pick` (minimum or maximum) over the 3 × 3 cross."""
    p = jnp.pad(x, 1, mode="edge")
    return pick(pick(pick(p[:-2, 1:-1], p[2:, 1:-1]), pick(p[1:-1, :-2], p[1:-1, 2:])), x)


def _noises(key, size: int, lengths: list[float]) -> list[Float[Array, "S S"]]:
    """Lattice noise of unit variance (Perlin 1985) with each of `lengths` px between lattice points; last, white noise.

    One draw for all, as in `random_view`.
    """
    sides = [max(2, int(np.ceil(size / length))) for length in lengths]
    ends = np.cumsum([n * n for n in sides])
    z = jax.random.normal(key, (int(ends[-1]) + size * size,))
    lattices = [z[end - n * n : end].reshape(n, n) for n, end in zip(sides, ends)]
    return [jax.image.resize(x, (size, size), "cubic") for x in lattices] + [z[ends[-1] :].reshape(size, size)]
