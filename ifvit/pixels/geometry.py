"""Points, similarities, robust fits, sampling and blurring: batched and jittable.

Points are (x, y) in px with pixel centres at whole numbers. A similarity is an array (a, b, u, v):
x' = a x − b y + u, y' = b x + a y + v; its scale is √(a² + b²), its angle atan2(b, a).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

IDENTITY = np.array([1.0, 0.0, 0.0, 0.0], np.float32)
# A decorator for functions that need products in float32 on every device. By default XLA multiplies in TF32 on a GPU,
# where a point of a canvas was 0.02 px off (tests/bench/accelerator.py). On a TPU it multiplies in bfloat16, whose
# eight bits are eight times as coarse. Scores use the decorator too.
exact = jax.default_matmul_precision("highest")
SCALE_RANGE = (0.8, 1.25)  # two prints of one finger at the same ppi: skin and sensors differ by less


def apply_similarity(t: Float[Array, "*B 4"], p: Float[Array, "*B N 2"]) -> Float[Array, "*B N 2"]:
    a, b, u, v = (t[..., i, None] for i in range(4))
    x, y = p[..., 0], p[..., 1]
    return jnp.stack([a * x - b * y + u, b * x + a * y + v], axis=-1)


def invert_similarity(t: Float[Array, "*B 4"]) -> Float[Array, "*B 4"]:
    a, b, u, v = jnp.moveaxis(t, -1, 0)
    n = a * a + b * b
    a, b = a / n, -b / n
    return jnp.stack([a, b, -(a * u - b * v), -(b * u + a * v)], axis=-1)


def fit_similarity(p: Float[Array, "N 2"], q: Float[Array, "N 2"], w: Float[Array, " N"]) -> Float[Array, "4"]:
    """Weighted least-squares similarity that takes p to q (Umeyama 1991 in the plane).

    Without weight, or with all of p in one place, the result is a translation.
    """
    total = w.sum() + 1e-9
    pm, qm = (w[:, None] * p).sum(0) / total, (w[:, None] * q).sum(0) / total
    p, q = p - pm, q - qm
    var = (w * (p**2).sum(-1)).sum()
    a = (w * (p * q).sum(-1)).sum()
    b = (w * (p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0])).sum()
    ok = var > 1e-6
    a, b = jnp.where(ok, a / jnp.where(ok, var, 1), 1.0), jnp.where(ok, b / jnp.where(ok, var, 1), 0.0)
    return jnp.stack([a, b, qm[0] - a * pm[0] + b * pm[1], qm[1] - b * pm[0] - a * pm[1]])


class RobustFit(NamedTuple):
    similarity: Float[Array, "B 4"]  # of the consensus; the identity where there is none
    inliers: Bool[Array, "B N"]
    count: Int[Array, " B"]


def robust_similarity(
    p: Float[Array, "B N 2"],
    q: Float[Array, "B N 2"],
    valid: Bool[Array, "B N"],
    samples: int,
    radius: float | Float[Array, ""],
) -> RobustFit:
    """RANSAC (Fischler & Bolles 1981) over two-point hypotheses, all at once, then three refits.

    `valid` points must come first. Every hypothesis is scored and the largest consensus wins; the
    draws are a fixed table, so the fit is a pure function of the points. `radius` in px of q;
    hypotheses whose scale leaves SCALE_RANGE are not considered.
    """
    return jax.vmap(functools.partial(_robust_fit, samples=samples, radius=radius))(p, q, valid)


def _robust_fit(
    p: Float[Array, "N 2"],
    q: Float[Array, "N 2"],
    valid: Bool[Array, " N"],
    samples: int,
    radius: float | Float[Array, ""],
) -> RobustFit:
    t, inliers = _hypotheses(p, q, valid, samples, radius)
    best = inliers.sum(-1).argmax()
    return _refitted(t[best], inliers[best], p, q, valid, radius)


def robust_modes(
    p: Float[Array, "B N 2"],
    q: Float[Array, "B N 2"],
    valid: Bool[Array, "B N"],
    samples: int,
    radius: float | Float[Array, ""],
    modes: int,
    apart: float,
) -> RobustFit:
    """The best `modes` consensuses of `robust_similarity` that lie apart, best first: fields (B modes …).

    Two lie apart where they move the points of print 0 by more than `apart` px from one another, root mean square.
    Where there are fewer, the rest have no inliers and the identity.
    """

    def one(p, q, valid):
        t, inliers = _hypotheses(p, q, valid, samples, radius)
        votes, found = inliers.sum(-1), []
        for _ in range(modes):
            best = votes.argmax()
            fit = _refitted(t[best], inliers[best] & (votes[best] > 0), p, q, valid & (votes[best] > 0), radius)
            moved = jax.vmap(lambda t: apply_similarity(t, p))(t)
            far = ((moved - apply_similarity(fit.similarity, p)) ** 2).sum(-1)
            votes = jnp.where((far * valid).sum(-1) > apart**2 * valid.sum(), votes, 0)
            found.append(fit)
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    return jax.vmap(one)(p, q, valid)


def _consensus(t, p, q, valid, radius):
    residual = jnp.linalg.norm(apply_similarity(t, p) - q, axis=-1)
    scale = jnp.hypot(t[0], t[1])
    return (residual < radius) & valid & (scale > SCALE_RANGE[0]) & (scale < SCALE_RANGE[1])


def _hypotheses(p, q, valid, samples, radius) -> tuple[Float[Array, "samples 4"], Bool[Array, "samples N"]]:
    """Similarities through two matches each, and the consensus of each: none where the two lie close."""
    n = valid.sum()
    draws = jnp.asarray(np.random.default_rng(0).random((samples, 2)), jnp.float32)
    i, j = jnp.floor(draws * n).astype(jnp.int32).T
    dp, dq = p[j] - p[i], q[j] - q[i]
    norm = (dp**2).sum(-1)
    far = norm > (3 * radius) ** 2  # closer points give wild angles
    norm = jnp.where(far, norm, 1.0)
    a = (dp * dq).sum(-1) / norm
    b = (dp[:, 0] * dq[:, 1] - dp[:, 1] * dq[:, 0]) / norm
    u = q[i, 0] - a * p[i, 0] + b * p[i, 1]
    v = q[i, 1] - b * p[i, 0] - a * p[i, 1]
    t = jnp.stack([a, b, u, v], axis=-1)
    return t, jax.vmap(lambda t: _consensus(t, p, q, valid, radius))(t) & far[:, None]


def _refitted(t, inliers, p, q, valid, radius) -> RobustFit:
    """A hypothesis fitted three times to its consensus."""
    for _ in range(3):
        refit = fit_similarity(p, q, inliers.astype(jnp.float32))
        again = _consensus(refit, p, q, valid, radius)
        kept = again.sum() > 0.8 * inliers.sum()  # a two-point hypothesis may hold a few more by chance, and is off
        t, inliers = jnp.where(kept, refit, t), jnp.where(kept, again, inliers)
    count = inliers.sum()
    return RobustFit(jnp.where(count >= 2, t, IDENTITY), inliers, count)


def grid_points(size: int) -> Float[np.ndarray, "{size*size} 2"]:
    """(x, y) of every pixel of a square image, row by row."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def cell_centres(size: int, stride: int) -> Float[np.ndarray, "L 2"]:
    """(x, y) in px of the centres of the cells of a square image, row by row."""
    return grid_points(size // stride) * stride + (stride - 1) / 2


def sample(image: Float[Array, "H W"], xy: Float[Array, "N 2"], fill: float | Float[Array, ""]) -> Float[Array, " N"]:
    """Bilinear values at points (x, y); `fill` outside the image."""
    value = jax.scipy.ndimage.map_coordinates(image - fill, [xy[:, 1], xy[:, 0]], order=1, mode="constant", cval=0.0)
    return value + fill


def through_map(grid: Float[Array, "G G 2"], p: Float[Array, "N 2"], step: float) -> Float[Array, "N 2"]:
    """Where a map takes points that is known at every `step` px from (0, 0) on: bilinear, and so on beyond the grid."""
    last = grid.shape[0] - 2
    x, y = jnp.moveaxis(p / step, -1, 0)
    column, row = (jnp.clip(jnp.floor(v), 0, last).astype(jnp.int32) for v in (x, y))
    x, y = (x - column)[:, None], (y - row)[:, None]
    above, below = (grid[r, column] + x * (grid[r, column + 1] - grid[r, column]) for r in (row, row + 1))
    return above + y * (below - above)


@exact
def blur(images: Float[Array, "*B H W"], sigma: float) -> Float[Array, "*B H W"]:
    """Gaussian blur, zero outside: two products with banded matrices, fast on every backend."""

    def kernel(n):
        i = np.arange(n)
        k = np.exp(-0.5 * ((i[:, None] - i[None, :]) / sigma) ** 2)
        return jnp.asarray(k / k[n // 2].sum(), jnp.float32)

    h, w = images.shape[-2:]
    return jnp.einsum("hy,...yx,xw->...hw", kernel(h), images, kernel(w), optimize=True)


def local_normalise(
    images: Float[Array, "*B H W"], masks: Bool[Array, "*B H W"], sigma: float
) -> Float[Array, "*B H W"]:
    """(x − mean) / deviation over a Gaussian window inside the mask; 0 outside, within ±3.

    The deviation has a floor of a quarter of the print's own mean deviation: blank skin stays blank.
    """
    m = masks.astype(jnp.float32)
    weight = blur(m, sigma) + 1e-3
    mean = blur(images * m, sigma) / weight
    x = (images - mean) * m
    dev = jnp.sqrt(blur(x * x, sigma) / weight)
    typical = (dev * m).sum((-2, -1), keepdims=True) / (m.sum((-2, -1), keepdims=True) + 1e-3)
    return jnp.clip(x / (jnp.maximum(dev, 0.25 * typical) + 1e-4), -3, 3)


def ridge_overlap(
    image0: Float[Array, "*B H W"], image1: Float[Array, "*B H W"], both: Bool[Array, "*B H W"], sigma: float
) -> Bool[Array, "*B H W"]:
    """Where both aligned prints have ridges: Sobel magnitude, box-filtered, thresholded (IFViT section on overlap).

    The box is the Gaussian of `sigma` px here, the threshold 0.4 of each print's own mean inside `both`.
    """

    def energetic(image):
        p = jnp.pad(image, [(0, 0)] * (image.ndim - 2) + [(1, 1), (1, 1)], mode="edge")  # the frame is no ridge
        rows = p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]
        cols = p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]
        gx, gy = rows[..., 2:] - rows[..., :-2], cols[..., 2:, :] - cols[..., :-2, :]
        energy = blur(jnp.hypot(gx, gy), sigma)
        mean = (energy * both).sum((-2, -1), keepdims=True) / (both.sum((-2, -1), keepdims=True) + 1e-3)
        return energy > 0.4 * mean

    return both & energetic(image0) & energetic(image1)
