"""Prints without a partner, for their templates: upright as they are, the middle of the foreground in the window's."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from ifvit.config import Settings
from ifvit.constants import MASK_CELL
from ifvit.pixels.geometry import exact
from ifvit.pixels.views import normalise, plain_view, take_view, turned


class Alone(NamedTuple):
    """Prints as their templates see them, and their foreground."""

    image: Float[Array, "N S S 1"]
    mask: Bool[Array, "N S S"]


@exact
def own_prints(
    canvases: UInt8[Array, "N C C"],
    masks: Bool[Array, "N C/8 C/8"],
    degrees: Float[Array, ""],
    config: Settings,
) -> Alone:
    """Each print turned about the middle of its foreground, from x towards y."""
    view = turned(plain_view(config), degrees)

    def seen(canvas, mask):
        centre = middle(mask) * MASK_CELL + (MASK_CELL - 1) / 2
        return take_view(canvas, mask, view._replace(centre=centre), config)

    x, m = jax.vmap(seen)(canvases, masks)
    return Alone(normalise(x, m, config), m)


def middle(mask: Bool[Array, "H W"]) -> Float[Array, "2"]:
    """(x, y) of the foreground's centre of gravity; the picture's middle where there is none."""
    rows, columns = (jnp.arange(n, dtype=jnp.float32) for n in mask.shape)
    count = mask.sum()
    mean = jnp.stack([(mask.sum(0) * columns).sum(), (mask.sum(1) * rows).sum()]) / jnp.maximum(count, 1)
    return jnp.where(count > 0, mean, jnp.stack([columns[-1], rows[-1]]) / 2)
