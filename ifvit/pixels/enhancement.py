"""What noise, sweat or dry skin did to the ridges, undone as far as the ridges beside them tell."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ifvit.pixels.geometry import blur, exact, local_normalise

LENGTH = 0.8  # ridges: standard deviation of the Gaussian along the ridge
REACH = 1.5  # of these, where the Gaussian is cut
TENSOR = 1.0  # ridges: standard deviation of the Gaussian over which the direction is found
BLOCK = 4  # px: the direction is found of means over so many
SIGMA = 1.5  # ridges: of the normalisation after it


@exact
def along_ridges(images: Float[Array, "B S S"], masks: Bool[Array, "B S S"], ridge: float) -> Float[Array, "B S S"]:
    """Locally normalised prints, smoothed along their ridges, which are `ridge` px apart, and normalised again.

    S is a multiple of BLOCK. Each pixel becomes the Gaussian mean of those that lie along its ridge (directional
    filters: O'Gorman & Nickerson 1989), whose direction the structure tensor tells (Bigün & Granlund 1987).
    """
    reach = math.ceil(REACH * LENGTH * ridge)
    size = images.shape[-1]
    width = size + 2 * reach
    wide = jnp.pad(images, [(0, 0), (reach, reach), (reach, reach)])
    along = np.arange(size) + reach
    here = jnp.asarray(along[:, None] * width + along)

    def smooth(image, direction):
        image = image.reshape(-1)
        total = image[here]
        for n in range(1, reach + 1):
            x, y = jnp.round(n * direction).astype(jnp.int32)
            step = y * width + x
            pixels = sum(image.at[here + s].get(mode="promise_in_bounds") for s in (step, -step))
            total += math.exp(-0.5 * (n / (LENGTH * ridge)) ** 2) * pixels
        return total

    return local_normalise(jax.vmap(smooth)(wide, directions(images, ridge)), masks, SIGMA * ridge)


def directions(images: Float[Array, "B S S"], ridge: float) -> Float[Array, "B 2 S S"]:
    """The unit vector (x, y) along the ridge at each pixel; its sign tells nothing."""
    n, size, _ = images.shape
    gy, gx = jnp.gradient(images, axis=(-2, -1))
    tensor = jnp.stack([gx * gx - gy * gy, 2 * gx * gy], 1)  # of the gradient, at twice its angle
    blocks = tensor.reshape(n, 2, size // BLOCK, BLOCK, size // BLOCK, BLOCK).mean((3, 5))
    x, y = jnp.moveaxis(-blur(blocks, TENSOR * ridge / BLOCK), 1, 0)  # the ridge lies across: half a turn more
    length = jnp.hypot(x, y) + 1e-9
    double = jnp.stack([x, y], 1) / length[:, None]
    x, y = jnp.moveaxis(jax.image.resize(double, (n, 2, size, size), "linear"), 1, 0)
    cos, sin = (jnp.sqrt(jnp.maximum(1 + sign * x, 0) / 2) for sign in (1, -1))  # of half the angle
    return jnp.stack([cos, jnp.where(y < 0, -sin, sin)], 1)
