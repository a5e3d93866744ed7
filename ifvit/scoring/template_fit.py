"""Fits what makes templates of prints (`models.template`) to prints whose fingers are known, in closed form.

Centres by k-means over cells; of each print's residuals the principal components, and of those the directions of
Fisher's linear discriminant, between fingers against between impressions of one (Belhumeur et al., IEEE PAMI 1997),
whose scatter within fingers is shrunk towards a multiple of the identity.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import linalg
from scipy.cluster.vq import kmeans2

from ifvit.bar import bar
from ifvit.config import DenseConfig
from ifvit.data.prepare import Prints
from ifvit.devices.sharding import fetch
from ifvit.models.template import directions, residuals
from ifvit.scoring.template import print_batches

CENTRES = 32
COMPONENTS = 1000
SHRINKAGE = 0.2
SAMPLE_PRINTS, SAMPLE_CELLS = 256, 64  # k-means sees so many cells of so many prints
log = logging.getLogger("ifvit")


def fit_template(
    describe: Callable, state: tuple, prints: Prints, config: DenseConfig
) -> dict[str, Float[np.ndarray, "..."]] | None:
    """The tree of a `Template`; None, and a line in the log, where no two fingers have two impressions each.

    `describe` is `scoring.template.description`, jitted, and `state` what it takes before the prints. Every process
    gets the same.
    """
    if not config.template_size:
        return None
    numbers, finger = drawn(prints, config.template_prints, config.data_seed)
    if len(set(finger.tolist())) < 2:
        log.info("No two training fingers have two impressions each: the checkpoint makes no templates of one print.")
        return None
    described = partial(_described, describe, state, prints, config)
    cells = []
    for x, inside in described(numbers[:SAMPLE_PRINTS]):
        for cell in (row[mask] for row, mask in zip(x, inside) if mask.any()):
            cells.append(cell[np.linspace(0, len(cell) - 1, min(len(cell), SAMPLE_CELLS)).astype(int)])
    cells = np.concatenate(cells)
    mean = cells.mean(0)
    centres = clustered(np.asarray(directions(cells, mean)), CENTRES, config.data_seed)
    of = jax.jit(residuals)
    with bar("templates", len(numbers), "print") as shown:
        rows = []
        for x, inside in described(numbers):
            rows.append(np.asarray(of(x, inside, mean, centres)))
            shown.update(len(x))
    projection, bias = discriminant(np.concatenate(rows), finger, config.template_size)
    return {"mean": mean, "centres": centres, "projection": projection, "bias": bias}


def drawn(prints: Prints, most: int, seed: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Prints of fingers with two impressions or more, about `most` at most, whole fingers: numbers, and fingers'."""
    members: dict[tuple, list[int]] = {}
    for i, p in enumerate(prints.prints):
        members.setdefault(p.identity, []).append(i)
    several = [some for some in members.values() if len(some) > 1]
    numbers, finger = [], []
    for n, f in enumerate(np.random.default_rng(seed).permutation(len(several))):
        if n >= 2 and len(numbers) + len(several[f]) > most:
            break
        numbers += several[f]
        finger += [n] * len(several[f])
    return np.array(numbers, np.int32), np.array(finger, np.int32)


def _described(
    describe: Callable, state: tuple, prints: Prints, config: DenseConfig, numbers: Int[np.ndarray, " N"]
) -> Iterator[tuple[Float[np.ndarray, "B L D"], Bool[np.ndarray, "B L"]]]:
    """Features and foreground of prints, batch by batch, on the host."""
    for rows, real in print_batches(prints, numbers, config.micro_batch, config.model_parallel):
        x, inside = fetch(describe(*state, rows, np.float32(0)))
        yield x[:real], inside[:real]


def clustered(x: Float[np.ndarray, "N D"], count: int, seed: int) -> Float[np.ndarray, "K D"]:
    """Centres by k-means, begun from points drawn at random; fewer than `count` where there are fewer points."""
    start = x[np.random.default_rng(seed).choice(len(x), min(count, len(x)), replace=False)]
    return kmeans2(x, start, iter=20, minit="matrix", missing="raise" if len(x) > 10 * count else "warn")[0]


def discriminant(
    rows: Float[np.ndarray, "N V"], finger: Int[np.ndarray, " N"], size: int
) -> tuple[Float[np.ndarray, "V E"], Float[np.ndarray, " E"]]:
    """Projection and bias: the first `size` of the directions in which fingers differ most, of spread 1 in a finger.

    Where there are fewer directions, the rest are 0.
    """
    fingers = finger.max() + 1
    mean = rows.mean(0)
    x = (rows - mean).astype(np.float64)
    few = len(x) < x.shape[1]
    variance, u = linalg.eigh(x @ x.T if few else x.T @ x)
    keep = min(COMPONENTS, len(x) - fingers, int((variance > 1e-9 * variance[-1]).sum()))
    components = x.T @ (u[:, -keep:] / np.sqrt(variance[-keep:])) if few else u[:, -keep:]
    y = x @ components
    means = np.zeros((fingers, keep))
    np.add.at(means, finger, y)
    means /= np.bincount(finger)[:, None]
    inner = y - means[finger]
    within = inner.T @ inner / (len(x) - fingers)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * np.trace(within) / keep * np.eye(keep)
    _, found = linalg.eigh(np.atleast_2d(np.cov(means.T)), within)
    found = found[:, ::-1][:, : min(size, fingers - 1)]
    projection = np.zeros((rows.shape[1], size), np.float32)
    projection[:, : found.shape[1]] = components @ found
    return projection, -(mean @ projection).astype(np.float32)
