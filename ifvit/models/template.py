"""Templates: a print by itself as a unit vector, made of what Module 1's ResNet says of its cells.

A cell belongs to the centres that are like it, and what it is beyond each of them is summed over the print, wherever
the cell lies (VLAD: Jégou et al., CVPR 2010; with the signed square root of Jégou and Chum, ECCV 2012). A linear map
keeps of these sums the directions in which fingers differ more than impressions of one finger do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Given = Array | np.ndarray
SHARPNESS = 20.0  # how surely a cell belongs to the nearest centre; 5 to 50 were tried (docs/changing.md)


class Template(NamedTuple):
    """What templates are made by, fitted to prints (`scoring.template_fit`); K centres, templates of E numbers."""

    mean: Float[Given, " D"]  # of the ResNet's features
    centres: Float[Given, "K D"]
    projection: Float[Given, "K*D E"]
    bias: Float[Given, " E"]


def directions(x: Float[Given, "*N D"], mean: Float[Given, " D"]) -> Float[Array, "*N D"]:
    """Features as unit vectors, seen from their mean."""
    return _unit(x - mean)


def residuals(
    x: Float[Given, "N L D"], inside: Bool[Given, "N L"], mean: Float[Given, " D"], centres: Float[Given, "K D"]
) -> Float[Array, "N K*D"]:
    """What the cells of each print are beyond the centres, in all a unit vector; 0 of a print without cells."""
    x = directions(x, mean)
    near = x @ centres.T - 0.5 * (centres * centres).sum(1)
    share = jax.nn.softmax(SHARPNESS * near, axis=-1) * inside[..., None]
    beyond = jnp.einsum("nlk,nld->nkd", share, x) - share.sum(1)[..., None] * centres
    beyond = beyond / jnp.sqrt(jnp.maximum(inside.sum(1), 1))[:, None, None]
    return _unit((jnp.sign(beyond) * jnp.sqrt(jnp.abs(beyond))).reshape(x.shape[0], -1))


def templates(x: Float[Given, "N L D"], inside: Bool[Given, "N L"], template: Template) -> Float[Array, "N E"]:
    """A unit vector of each print, 0 of one without cells."""
    found = residuals(x, inside, template.mean, template.centres) @ template.projection + template.bias
    return _unit(jnp.where(inside.any(1, keepdims=True), found, 0.0))


def _unit(x: Float[Given, "*N D"]) -> Float[Array, "*N D"]:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)
