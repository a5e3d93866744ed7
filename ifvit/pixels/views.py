"""Prints on the device: poses and distortion, what the networks see, and the truth between two views.

Everything here is per print, under `vmap`, inside the jitted step. A view maps each of its pixels
to the 500 ppi canvas analytically, so that the truth between two views of a print is exact. Two impressions of a
finger come with maps between their canvases.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI, MAP_STEP, MASK_CELL, RIDGE, STRIDE
from ifvit.devices.batch_axes import batch_axes
from ifvit.models.cells import cell_mask
from ifvit.models.losses import IGNORE, NO_MATCH
from ifvit.pixels.corruption import corrupt, draws
from ifvit.pixels.geometry import blur, cell_centres, exact, local_normalise, sample, through_map

MODES = 5  # sine modes of a distortion field


class View(NamedTuple):
    """canvas = centre + matrix · (q − window's centre) + Σ amplitude · sin(frequency · q + phase), q in view px."""

    matrix: Float[Array, "2 2"]  # a rotation and a scale
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


def turned(view: View, degrees: float | Float[Array, ""]) -> View:
    """Of a print that was turned by so many degrees from x towards y, about the view's centre."""
    a = -jnp.radians(degrees)
    turn = jnp.array([[jnp.cos(a), -jnp.sin(a)], [jnp.sin(a), jnp.cos(a)]])
    return view._replace(matrix=turn @ view.matrix)


@exact
def random_view(
    key: Key[Array, ""],
    config: Settings,
    angle: Float[Array, ""],
    scale: float | Float[Array, ""],
    shift: float | Float[Array, ""],
) -> View:
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
    return View(
        jnp.array([[c, -d], [d, c]]) @ plain.matrix,
        plain.centre + shift * u[1:3],
        amplitude,
        frequency,
        jnp.pi * modes[4],
    )


@exact
def zoomed(key: Key[Array, ""], views: View, config: Settings) -> View:
    """Both views of a pair, leaves (2 …), enlarged or shrunk alike by up to exp(± zoom)."""
    by = jnp.exp(config.zoom * _uniform(jax.random.fold_in(key, 1), -1, 1))
    return views._replace(matrix=views.matrix * by)


@exact
def to_canvas(view: View, q: Float[Array, "N 2"], image_size: int) -> Float[Array, "N 2"]:
    middle = (image_size - 1) / 2
    bend = jnp.sin(q @ view.frequency.T + view.phase) @ view.amplitude
    return view.centre + (q - middle) @ view.matrix.T + bend


@exact
def pixels_to_canvas(view: View, image_size: int) -> Float[Array, "N 2"]:
    """`to_canvas` of every pixel, row by row: by sin(x + y) = sin x cos y + cos x sin y few sines serve all."""
    along = jnp.arange(image_size, dtype=jnp.float32)
    x, y = along[:, None] * view.frequency[:, 0], along[:, None] * view.frequency[:, 1] + view.phase
    columns = jnp.concatenate([jnp.sin(x), jnp.cos(x)], axis=1)
    rows = jnp.concatenate([jnp.cos(y), jnp.sin(y)], axis=1)
    bend = jnp.einsum("ym,mk,xm->yxk", rows, jnp.concatenate([view.amplitude] * 2), columns)
    u = along - (image_size - 1) / 2
    turned = u[:, None] * view.matrix[:, 0] + u[:, None, None] * view.matrix[:, 1]
    return (view.centre + turned + bend).reshape(-1, 2)


@exact
def to_view(view: View, p: Float[Array, "N 2"], image_size: int) -> Float[Array, "N 2"]:
    """Inverse of `to_canvas`, by fixed-point iteration: distortion moves a point far less than its wave length."""
    middle = (image_size - 1) / 2
    inverse = view.matrix.T / (view.matrix[0] ** 2).sum()  # of a rotation and a scale
    q = middle + (p - view.centre) @ inverse.T
    return jax.lax.fori_loop(0, 6, lambda _, q: q + (p - to_canvas(view, q, image_size)) @ inverse.T, q)


def take_view(
    canvas: UInt8[Array, "C C"],
    mask8: Bool[Array, "C/8 C/8"],
    view: View,
    config: Settings,
) -> tuple[Float[Array, "S S"], Bool[Array, "S S"]]:
    """Canvas and its foreground, at 1/8 of the resolution -> the view's pixels (0 … 1) and foreground."""
    size, ratio = config.image_size, CANVAS_PPI / config.input_ppi
    xy = pixels_to_canvas(view, size)
    image = canvas.astype(jnp.float32) / 255
    if ratio > 1.5:  # half a sample's width: no aliasing of what the window cannot hold
        background = image[0, 0]
        image = blur(image - background, 0.45 * math.sqrt(ratio**2 - 1)) + background
    pixels = sample(image, xy, image[0, 0])
    inside = sample(mask8.astype(jnp.float32), (xy - (MASK_CELL - 1) / 2) / MASK_CELL, 0.0) > 0.5
    return pixels.reshape(size, size), inside.reshape(size, size)


def truth(
    view0: View,
    view1: View,
    m0: Bool[Array, " L"],
    m1: Bool[Array, " L"],
    config: Settings,
    maps: tuple[Float[Array, "G G 2"], Float[Array, "G G 2"]] | None = None,
) -> Int[Array, " L"]:
    """Labels of `losses`: cell centres of either view warped to the other, mutual nearest cells match.

    `maps`: from canvas 0 to canvas 1 and back (`data.impressions`); None where both views are of one canvas.
    """
    size, side = config.image_size, config.image_size // STRIDE
    centres = jnp.asarray(cell_centres(size, STRIDE))

    def nearest(source, target, mask, between):
        p = to_canvas(source, centres, size)
        q = to_view(target, p if between is None else through_map(between, p, MAP_STEP), size)
        cell = jnp.round((q - (STRIDE - 1) / 2) / STRIDE).astype(jnp.int32)
        inside = ((cell >= 0) & (cell < side)).all(-1)
        index = jnp.where(inside, cell[:, 1] * side + cell[:, 0], 0)
        return index, inside & mask[index]

    map01, map10 = maps or (None, None)
    j, seen = nearest(view0, view1, m1, map01)
    i, back = nearest(view1, view0, m0, map10)
    mutual = seen & back[j] & (i[j] == jnp.arange(side * side))
    return jnp.where(~m0, IGNORE, jnp.where(mutual, j, jnp.where(seen, IGNORE, NO_MATCH)))


def normalise(images: Float[Array, "B S S"], masks: Bool[Array, "B S S"], config: Settings) -> Float[Array, "B S S 1"]:
    """What both networks see: local mean and deviation over a ridge, nothing outside the foreground.

    The background becomes 0 everywhere, so no corner gives away how a print was turned.
    """
    return local_normalise(images, masks, 0.9 * RIDGE * config.input_ppi / CANVAS_PPI)[..., None]


class Views(NamedTuple):
    """Both windows of each pair, before normalisation, and their foreground."""

    image0: Float[Array, "B S S"]
    mask0: Bool[Array, "B S S"]
    image1: Float[Array, "B S S"]
    mask1: Bool[Array, "B S S"]


class DensePair(NamedTuple):
    image0: Float[Array, "B S S 1"]
    image1: Float[Array, "B S S 1"]
    mask0: Bool[Array, "B S S"]
    mask1: Bool[Array, "B S S"]
    labels: Int[Array, "B L"]


def dense_views(
    keys: Key[Array, " B"], batch: dict, config: Settings
) -> tuple[View, Float[Array, "B 2 S S 1"], Bool[Array, "B 2 S S"]]:
    """Two views of each pair's prints (leaves B 2 …), and what is seen by them, corrupted and normalised."""
    rotation = jnp.radians(config.rotation)
    # of view 0 and view 1: the second is turned, scaled, moved and corrupted more
    scale, shift, strength = (jnp.array(v) for v in ((0.03, 0.08), (10.0, 45.0), (0.6, 1.0)))

    def drawn(key):
        k_turn, k_views = jax.random.split(key)
        turn = jax.random.uniform(k_turn, (2,), minval=-1, maxval=1) * jnp.array([math.radians(15), rotation])

        def of_view(key, angle, scale, shift):
            k_view, k_corrupt = jax.random.split(key)
            return random_view(k_view, config, angle, scale, shift), draws(k_corrupt, config)

        views, noises = jax.vmap(of_view)(jax.random.split(k_views), jnp.cumsum(turn), scale, shift)
        return zoomed(key, views, config), noises

    def seen(canvas, mask, view, noise, strength):
        x, m = corrupt(noise, *take_view(canvas, mask, view, config), config, strength)
        return normalise(x[None], m[None], config)[0], m

    views, noises = jax.vmap(drawn)(keys)
    strengths = jnp.broadcast_to(strength, (keys.shape[0], 2))
    return views, *each_print(seen, *stacked(batch), views, noises, strengths)


def dense_pair(keys: Key[Array, " B"], batch: dict, config: Settings) -> DensePair:
    """Module 1's input: two views of one finger with their truth, or of two fingers, where nothing matches.

    `keys` (B,); `batch` has `canvas0`, `canvas1` (B C C) uint8, `mask0`, `mask1` (B C/8 C/8) bool and
    `genuine` (B,) bool. Without `map01`, `map10` (B G G 2) float32 in it a genuine pair has the same print twice; with
    them it may have two impressions, and they map the canvases (`data.impressions`).
    """
    views, image, m = dense_views(keys, batch, config)

    def labels(view, m, genuine, maps):
        view0, view1 = (jax.tree.map(lambda a, i=i: a[i], view) for i in (0, 1))
        cells = cell_mask(m)
        none = jnp.where(cells[0], NO_MATCH, IGNORE)
        return jnp.where(genuine, truth(view0, view1, *cells, config, maps), none)

    maps = (batch["map01"], batch["map10"]) if "map01" in batch else None
    truths = jax.vmap(labels)(views, m, batch["genuine"], maps)
    return DensePair(image[:, 0], image[:, 1], m[:, 0], m[:, 1], truths)


def match_views(keys: Key[Array, " B"], batch: dict, config: Settings) -> Views:
    """Module 2's prints before alignment, each turned, moved and corrupted on its own."""

    def drawn(key):
        k_angle, k_view, k_corrupt = jax.random.split(key, 3)
        angle = _uniform(k_angle, -1, 1) * jnp.radians(config.rotation)
        return random_view(k_view, config, angle, 0.03, 20.0), draws(k_corrupt, config)

    def seen(canvas, mask, view, noise):
        return corrupt(noise, *take_view(canvas, mask, view, config), config, 0.5)

    views, noises = jax.vmap(jax.vmap(drawn))(jax.vmap(jax.random.split)(keys))
    views = jax.vmap(lambda key, pair: zoomed(key, pair, config))(keys, views)
    x, m = each_print(seen, *stacked(batch), views, noises)
    return Views(x[:, 0], m[:, 0], x[:, 1], m[:, 1])


def each_print(seen, *prints):
    """`seen` of each print, given trees whose leaves are (B 2 …).

    A training step on a CPU takes print by print: one print's pixels stay in the cache, and XLA, which would repeat
    the draws at every pixel, finds them done. All else takes the prints at once.
    """
    if jax.default_backend() != "cpu" or not batch_axes():
        return jax.vmap(jax.vmap(seen))(*prints)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), prints)
    found = jax.lax.map(lambda one: seen(*one), flat)
    return jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), found)


def plain_views(batch: dict, config: Settings) -> Views:
    """Both prints of each pair as they are."""
    canvases, masks = stacked(batch)
    x, m = jax.vmap(lambda canvas, mask: plain_prints(canvas, mask, config))(canvases, masks)
    return Views(x[:, 0], m[:, 0], x[:, 1], m[:, 1])


def plain_prints(
    canvases: UInt8[Array, "N C C"],
    masks: Bool[Array, "N C/8 C/8"],
    config: Settings,
    degrees: float | Float[Array, ""] | None = None,
) -> tuple[Float[Array, "N S S"], Bool[Array, "N S S"]]:
    """Prints as they are, or turned: their windows, before normalisation, and their foreground."""
    view = plain_view(config) if degrees is None else turned(plain_view(config), degrees)
    return jax.vmap(lambda canvas, mask: take_view(canvas, mask, view, config))(canvases, masks)


def stacked(batch: dict):
    """Canvases and masks (B 2 …): a pair stays together, so a batch split over devices needs no exchange."""
    return (
        jnp.stack([batch["canvas0"], batch["canvas1"]], axis=1),
        jnp.stack([batch["mask0"], batch["mask1"]], axis=1),
    )


def _uniform(key, lo, hi):
    return jax.random.uniform(key, minval=lo, maxval=hi)
