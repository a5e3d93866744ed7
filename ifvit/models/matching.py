"""Differentiable matching: dual softmax over the similarity of all cells, mutual nearest neighbours."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def similarity(
    f0: Float[Array, "B L C"],
    f1: Float[Array, "B S C"],
    log_scale: Float[Array | np.ndarray, ""] | None = None,
    temperature: float = 0.1,
) -> Float[Array, "B L S"]:
    """LoFTR's scaled dot product over a temperature, 0.1 there; with `log_scale`, cosine × exp(log_scale)."""
    if log_scale is None:
        root = math.sqrt(f0.shape[-1])
        return jnp.einsum("blc,bsc->bls", f0 / root, f1 / root) / temperature
    f0 = f0 / (jnp.linalg.norm(f0, axis=-1, keepdims=True) + 1e-6)
    f1 = f1 / (jnp.linalg.norm(f1, axis=-1, keepdims=True) + 1e-6)
    return jnp.einsum("blc,bsc->bls", f0, f1) * jnp.exp(log_scale)


def log_dual_softmax(
    sim: Float[Array, "B L S"], m0: Bool[Array, "B L"], m1: Bool[Array, "B S"]
) -> Float[Array, "B L S"]:
    """log(softmax over rows × softmax over columns) (LoFTR section 3.3); −1e9 or less outside the masks."""
    sim = jnp.where(m0[:, :, None] & m1[:, None, :], sim, -1e9)
    row = sim - jax.nn.logsumexp(sim, axis=2, keepdims=True)
    col = sim - jax.nn.logsumexp(sim, axis=1, keepdims=True)
    return jnp.where(m0[:, :, None] & m1[:, None, :], row + col, -1e9)


class Matches(NamedTuple):
    """A fixed number K of matches, best first; only those with `valid` count."""

    cell0: Int[Array, "B K"]
    cell1: Int[Array, "B K"]
    confidence: Float[Array, "B K"]  # 0 … 1, the dual softmax itself
    valid: Bool[Array, "B K"]


def mutual_matches(
    log_conf: Float[Array, "B L S"], count: int, threshold: float | Float[Array, ""], border: int, grid: tuple[int, int]
) -> Matches:
    """Mutual nearest neighbours above `threshold`, none within `border` cells of an edge of the grid.

    At most `count` of them, by confidence. `grid` is (rows, columns), the same for both images.
    """
    of_rows = log_conf.reshape(*log_conf.shape[:2], *grid)  # of the grid: `argmax` in two steps, fast on a CPU
    best_row = of_rows.max(axis=3).argmax(axis=2)
    in_row = jnp.take_along_axis(of_rows, best_row[:, :, None, None], axis=2)[:, :, 0]
    best1, best = best_row * grid[1] + in_row.argmax(axis=2), in_row.max(axis=2)
    mutual = jnp.take_along_axis(log_conf.max(axis=1), best1, axis=1) == best
    conf = jnp.exp(best)
    inside = _inside(grid, border)
    valid = mutual & (conf > threshold) & inside[None, :] & inside[best1]
    conf, cell0 = jax.lax.top_k(jnp.where(valid, conf, 0.0), min(count, conf.shape[1]))
    return Matches(cell0, jnp.take_along_axis(best1, cell0, axis=1), conf, conf > 0)


def _inside(grid: tuple[int, int], border: int) -> Bool[Array, " L"]:
    rows, cols = jnp.arange(grid[0])[:, None], jnp.arange(grid[1])[None, :]
    keep = (rows >= border) & (rows < grid[0] - border) & (cols >= border) & (cols < grid[1] - border)
    return keep.reshape(-1)
