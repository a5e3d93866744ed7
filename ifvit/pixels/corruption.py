"""What sensors and fingers do to a print: noise, dryness, pressure, uneven and partial contact."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI, RIDGE
from ifvit.pixels.geometry import blur, local_normalise


class Draws(NamedTuple):
    """What chance adds to one print of S × S px: uniform numbers, and the normal ones of all noises."""

    uniform: Float[Array, "12"]
    normal: Float[Array, " N"]


def draws(key: Key[Array, ""], config: Settings) -> Draws:
    """One draw for all noises, as in `views.random_view`."""
    k_uniform, k_normal = jax.random.split(key)
    count = sum(n * n for n in _sides(config)) + config.image_size**2
    return Draws(jax.random.uniform(k_uniform, (12,)), jax.random.normal(k_normal, (count,)))


def corrupt(
    drawn: Draws,
    image: Float[Array, "S S"],
    mask: Bool[Array, "S S"],
    config: Settings,
    strength: float | Float[Array, ""],
) -> tuple[Float[Array, "S S"], Bool[Array, "S S"]]:
    """Dryness or over-pressure, sensor noise, uneven contact and contrast; sometimes a partial contact.

    Ridges are dark: a minimum filter thickens them (over-pressure), a maximum filter thins them (dryness).
    """
    size = image.shape[0]
    ridge = RIDGE * config.input_ppi / CANVAS_PPI
    u = drawn.uniform
    perlin0, perlin1, perlin2, pores, contrast, ragged, white = _noises(drawn.normal, config)
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


def _neighbours(x, pick):
    """`pick` (minimum or maximum) over the 3 × 3 cross."""
    p = jnp.pad(x, 1, mode="edge")
    return pick(pick(pick(p[:-2, 1:-1], p[2:, 1:-1]), pick(p[1:-1, :-2], p[1:-1, 2:])), x)


# Of each lattice noise, ridges between lattice points: three of the skin's roughness, pores, contrast, a ragged rim.
OCTAVES = (0.6, 1.5, 4, 0.3, 3, 4)


def _sides(config: Settings) -> list[int]:
    """Lattice points a side of each noise."""
    ridge = RIDGE * config.input_ppi / CANVAS_PPI
    return [max(2, int(np.ceil(config.image_size / (length * ridge)))) for length in OCTAVES]


def _noises(z: Float[Array, " N"], config: Settings) -> list[Float[Array, "S S"]]:
    """Lattice noise of unit variance (Perlin 1985) for each of OCTAVES; last, white noise."""
    size, sides = config.image_size, _sides(config)
    ends = np.cumsum([n * n for n in sides])
    lattices = [z[end - n * n : end].reshape(n, n) for n, end in zip(sides, ends)]
    return [jax.image.resize(x, (size, size), "cubic") for x in lattices] + [z[ends[-1] :].reshape(size, size)]
