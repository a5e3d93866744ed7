"""Prints on the device: views (pose, distortion), corruption, normalisation, ground truth.

Everything here is per print, under `vmap`, inside the jitted step. A view maps each of its pixels
to the 500 ppi canvas analytically, so that the truth between two views of a print is exact.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from ifvit.geometry import blur, cell_centres, grid_points, local_normalise, sample
from ifvit.losses import IGNORE, NO_MATCH
from ifvit.models.resnet import STRIDE

CANVAS_PPI = 500
MODES = 5  # sine modes of a distortion field
RIDGE = 9.0  # px at 500 ppi, a usual ridge period; windows below are given in ridges


class View(NamedTuple):
    """canvas = centre + matrix · (q − window's centre) + Σ amplitude · sin(frequency · q + phase), q in view px."""

    matrix: Float[Array, "2 2"]
    centre: Float[Array, "2"]
    amplitude: Float[Array, "M 2"]
    frequency: Float[Array, "M 2"]
    phase: Float[Array, "M"]


def plain_view(config) -> View:
    """The window centred on the canvas, upright, undistorted: what evaluation sees."""
    ratio = CANVAS_PPI / config.input_ppi
    centre = jnp.full(2, (config.canvas_size - 1) / 2, jnp.float32)
    zeros = jnp.zeros((MODES, 2))
    return View(jnp.eye(2) * ratio, centre, zeros, zeros, jnp.zeros(MODES))


def random_view(key, config, angle: Float[Array, ""], scale: float, shift: float) -> View:
    """A view turned by `angle` radians, scaled by up to 1 ± scale, moved by up to ± shift px at 500 ppi."""
    k_scale, k_shift, k_amp, k_dir, k_freq, k_phase = jax.random.split(key, 6)
    plain = plain_view(config)
    s = 1 + scale * jax.random.uniform(k_scale, minval=-1, maxval=1)
    c, d = jnp.cos(angle) * s, jnp.sin(angle) * s
    length = jax.random.uniform(k_freq, (MODES,), minval=120.0, maxval=400.0) * config.input_ppi / CANVAS_PPI
    towards = jax.random.uniform(k_dir, (MODES,), maxval=2 * jnp.pi)
    frequency = (2 * jnp.pi / length)[:, None] * jnp.stack([jnp.cos(towards), jnp.sin(towards)], axis=-1)
    amplitude = 1.6 * config.distortion * jax.random.normal(k_amp, (MODES, 2)) * (length[:, None] / length.max())
    return View(
        jnp.array([[c, -d], [d, c]]) @ plain.matrix,
        plain.centre + jax.random.uniform(k_shift, (2,), minval=-shift, maxval=shift),
        amplitude, frequency, jax.random.uniform(k_phase, (MODES,), maxval=2 * jnp.pi),
    )


def to_canvas(view: View, q: Float[Array, "N 2"], image_size: int) -> Float[Array, "N 2"]:
    middle = (image_size - 1) / 2
    bend = jnp.sin(q @ view.frequency.T + view.phase) @ view.amplitude
    return view.centre + (q - middle) @ view.matrix.T + bend


def to_view(view: View, p: Float[Array, "N 2"], image_size: int) -> Float[Array, "N 2"]:
    """Inverse of `to_canvas`, by fixed-point iteration: distortion moves a point far less than its wave length."""
    middle = (image_size - 1) / 2
    inverse = jnp.linalg.inv(view.matrix)
    q = middle + (p - view.centre) @ inverse.T
    return jax.lax.fori_loop(0, 6, lambda _, q: q + (p - to_canvas(view, q, image_size)) @ inverse.T, q)


def take_view(canvas: UInt8[Array, "C C"], mask8: Bool[Array, "C/8 C/8"], view: View, config,
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


def truth(view0: View, view1: View, m0: Bool[Array, "L"], m1: Bool[Array, "L"], config) -> Int[Array, "L"]:
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


def corrupt(key, image: Float[Array, "S S"], mask: Bool[Array, "S S"], config, strength: float,
            ) -> tuple[Float[Array, "S S"], Bool[Array, "S S"]]:
    """Dryness or over-pressure, sensor noise, uneven contact and contrast; sometimes a partial contact.

    Ridges are dark: a minimum filter thickens them (over-pressure), a maximum filter thins them (dryness).
    """
    size = image.shape[0]
    keys = jax.random.split(key, 9)
    ridge = RIDGE * config.input_ppi / CANVAS_PPI
    x = local_normalise(image, mask, 2 * ridge)

    thick = config.thickness * strength * _uniform(keys[0], -1, 1)
    x = x + jnp.abs(thick) * (jnp.where(thick > 0, _neighbours(x, jnp.minimum), _neighbours(x, jnp.maximum)) - x)
    x = x - 0.5 * thick  # what a local threshold would then call ridge

    amount = config.noise * strength * jax.random.uniform(keys[1], (4,)) ** 2
    perlin = _smooth_noise(keys[2], size, (0.6 * ridge, 1.5 * ridge, 4 * ridge))
    x = x + 1.2 * amount[0] * perlin + 0.8 * amount[1] * jax.random.normal(keys[3], x.shape)
    pores = _smooth_noise(keys[4], size, (0.3 * ridge,))
    x = x + 2.0 * amount[2] * jax.nn.relu(pores - 0.8)  # bright specks, on ridges where it is dry
    x = x * jnp.exp(0.8 * amount[3] * _smooth_noise(keys[5], size, (3 * ridge,)))

    # partial contact: an ellipse of the finger, its border ragged
    k_use, k_place, k_axes, k_edge = jax.random.split(keys[6], 4)
    yx = jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"), axis=-1) / size - 0.5
    axes = jax.random.uniform(k_axes, (2,), minval=0.25, maxval=0.55)
    place = jax.random.uniform(k_place, (2,), minval=-0.2, maxval=0.2)
    ragged = 0.25 * _smooth_noise(k_edge, size, (4 * ridge,))
    contact = (((yx - place) / axes) ** 2).sum(-1) < 1 + ragged
    use = jax.random.uniform(k_use) < 0.7 * config.partial
    kept = mask & (contact | ~use)
    mask = jnp.where(kept.mean() > 0.08, kept, mask)

    soft = jax.random.uniform(keys[7]) * strength
    x = jnp.where(jax.random.uniform(keys[8]) < 0.3, (1 - soft) * x + soft * blur(x, 0.18 * ridge), x)
    return x, mask


def normalise(images: Float[Array, "B S S"], masks: Bool[Array, "B S S"], config) -> Float[Array, "B S S 1"]:
    """What both networks see: local mean and deviation over a ridge, nothing outside the foreground.

    The background becomes 0 everywhere, so no corner gives away how a print was turned.
    """
    return local_normalise(images, masks, 0.9 * RIDGE * config.input_ppi / CANVAS_PPI)[..., None]


class DensePair(NamedTuple):
    image0: Float[Array, "B S S 1"]
    image1: Float[Array, "B S S 1"]
    mask0: Bool[Array, "B S S"]
    mask1: Bool[Array, "B S S"]
    labels: Int[Array, "B L"]


def dense_pair(keys, batch: dict, config, cell_mask, known_warp_only: bool = False) -> DensePair:
    """Module 1's input: two views of print a with their truth, or of a and b, where nothing matches.

    `keys` (B,); `batch` has `canvas0`, `canvas1` (B C C) uint8, `mask0`, `mask1` (B C/8 C/8) bool and
    `genuine` (B,) bool; a genuine pair has the same print twice. With `known_warp_only` views are
    not corrupted: pose and distortion alone.
    """
    rotation = math.radians(config.rotation)
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
        view0, view1 = (jax.tree.map(lambda a: a[i], views) for i in (0, 1))
        none = jnp.where(cells[0], NO_MATCH, IGNORE)
        return x, m, jnp.where(genuine, truth(view0, view1, *cells, config), none)

    x, m, labels = jax.vmap(one)(keys, *_stacked(batch), batch["genuine"])
    image0, image1 = (normalise(x[:, i], m[:, i], config) for i in (0, 1))
    return DensePair(image0, image1, m[:, 0], m[:, 1], labels)


def match_views(keys, batch: dict, config):
    """Module 2's prints before alignment, each turned, moved and corrupted on its own: images, masks (B S S)."""
    def view(key, canvas, mask):
        k_angle, k_view, k_corrupt = jax.random.split(key, 3)
        angle = _uniform(k_angle, -1, 1) * math.radians(config.rotation)
        image, mask = take_view(canvas, mask, random_view(k_view, config, angle, 0.03, 20.0), config)
        return corrupt(k_corrupt, image, mask, config, 0.5)

    keys = jax.vmap(jax.random.split)(keys)
    x, m = jax.vmap(jax.vmap(view))(keys, *_stacked(batch))
    return x[:, 0], m[:, 0], x[:, 1], m[:, 1]


def plain_views(batch: dict, config):
    """Both prints of each pair as they are: images, masks (B S S), in the order of `match_views`."""
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


def _smooth_noise(key, size: int, lengths: tuple[float, ...]):
    """Lattice noise of unit variance, an octave a `length` px (Perlin 1985), smooth between lattice points."""
    total = 0.0
    for i, length in enumerate(lengths):
        n = max(2, int(np.ceil(size / length)))
        lattice = jax.random.normal(jax.random.fold_in(key, i), (n, n))
        total = total + jax.image.resize(lattice, (size, size), "cubic")
    return total / math.sqrt(len(lengths))
