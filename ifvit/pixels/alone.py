"""Prints without a partner, for their templates: upright as they are, the middle of the foreground in the window's."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI, MASK_CELL
from ifvit.models.matcher import Alone
from ifvit.pixels.corruption import corrupt, draws
from ifvit.pixels.geometry import exact
from ifvit.pixels.views import each_print, normalise, plain_view, random_view, stacked, take_view, zoomed

TURN = 20.0  # degrees that a print is turned by in training, at most
SHIFT = 12.0  # px at 500 ppi that it is moved by


def own_views(keys: Key[Array, " B"], batch: dict, config: Settings) -> Alone:
    """Both prints of each pair, leaves (B 2 …), each turned, moved and corrupted on its own; `batch` of canvases."""
    shift = SHIFT * config.input_ppi / CANVAS_PPI

    def drawn(key):
        k_pose, k_view, k_corrupt = jax.random.split(key, 3)
        u = jax.random.uniform(k_pose, (3,), minval=-1, maxval=1)
        view = random_view(k_view, config, math.radians(TURN) * u[0], 0.03, 0.0)
        return view, draws(k_corrupt, config), shift * u[1:]

    def seen(canvas, mask, view, noise, away):
        view = view._replace(centre=middle(mask) * MASK_CELL + (MASK_CELL - 1) / 2)
        return centred(*corrupt(noise, *take_view(canvas, mask, view, config), config, 0.5), away)

    keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)
    views, noises, away = jax.vmap(jax.vmap(drawn))(jax.vmap(jax.random.split)(keys))
    views = jax.vmap(lambda key, pair: zoomed(key, pair, config))(keys, views)
    x, m = each_print(seen, *stacked(batch), views, noises, away)
    return Alone(jax.vmap(lambda x, m: normalise(x, m, config))(x, m), m)


@exact
def own_prints(
    canvases: UInt8[Array, "N C C"],
    masks: Bool[Array, "N C/8 C/8"],
    degrees: Float[Array, ""],
    config: Settings,
) -> Alone:
    """Prints as their templates see them, each turned about the middle of its foreground, from x towards y."""
    plain, a = plain_view(config), -jnp.radians(degrees)
    turn = jnp.array([[jnp.cos(a), -jnp.sin(a)], [jnp.sin(a), jnp.cos(a)]])

    def seen(canvas, mask):
        centre = middle(mask) * MASK_CELL + (MASK_CELL - 1) / 2
        return take_view(canvas, mask, plain._replace(matrix=turn @ plain.matrix, centre=centre), config)

    x, m = jax.vmap(seen)(canvases, masks)
    return Alone(normalise(x, m, config), m)


def middle(mask: Bool[Array, "H W"]) -> Float[Array, "2"]:
    """(x, y) of the foreground's centre of gravity; the picture's middle where there is none."""
    rows, columns = (jnp.arange(n, dtype=jnp.float32) for n in mask.shape)
    count = mask.sum()
    mean = jnp.stack([(mask.sum(0) * columns).sum(), (mask.sum(1) * rows).sum()]) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, jnp.stack([columns[-1], rows[-1]]) / 2)


def centred(
    image: Float[Array, "S S"], mask: Bool[Array, "S S"], away: Float[Array, "2"]
) -> tuple[Float[Array, "S S"], Bool[Array, "S S"]]:
    """Both moved by whole px, so that the foreground's middle lies `away` from the window's; what comes in is empty."""
    size = image.shape[0]
    pad = size // 2
    by = middle(mask) - (size - 1) / 2 - away
    start = pad + jnp.clip(jnp.round(by).astype(jnp.int32), -pad, pad)
    cut = lambda x: jax.lax.dynamic_slice(jnp.pad(x, pad), (start[1], start[0]), (size, size))
    return cut(image), cut(mask)
