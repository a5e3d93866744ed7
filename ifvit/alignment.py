"""From Module 1's confidences to an aligned pair: matches, robust similarity, warp, overlap, region of interest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ifvit.config import Settings
from ifvit.data.augment import CANVAS_PPI, RIDGE, normalise
from ifvit.geometry import (IDENTITY, RobustFit, apply_similarity, blur, cell_centres, grid_points, invert_similarity,
                            ridge_overlap, robust_similarity, sample)
from ifvit.models.matcher import Aligned
from ifvit.models.matching import Matches, mutual_matches
from ifvit.models.resnet import STRIDE


class Registration(NamedTuple):
    """Module 1's answer on a pair: similarity from print 0 to print 1 in window px, and what supports it."""

    similarity: Float[Array, "B 4"]
    aligned: Bool[Array, " B"]      # at least `min_matches` inliers
    count: Int[Array, " B"]         # inliers
    matches: Matches
    inliers: Bool[Array, "B K"]
    points0: Float[Array, "B K 2"]  # window px of the matches in print 0, and in print 1
    points1: Float[Array, "B K 2"]


def register(log_conf: Float[Array, "B L L"], image_size: int, config: Settings) -> Registration:
    """Mutual matches of Module 1's confidences and the similarity that most of them agree on."""
    side = image_size // STRIDE
    matches = mutual_matches(log_conf, config.alignment_matches, config.match_threshold, config.match_border,
                             (side, side))
    centres = jnp.asarray(cell_centres(image_size, STRIDE))
    p0, p1 = centres[matches.cell0], centres[matches.cell1]
    fit: RobustFit = robust_similarity(p0, p1, matches.valid, config.alignment_samples,
                                       config.inlier_radius * STRIDE)
    aligned = fit.count >= config.min_matches
    similarity = jnp.where(aligned[:, None], fit.similarity, jnp.asarray(IDENTITY))
    return Registration(similarity, aligned, fit.count, matches, fit.inliers, p0, p1)


def align(image0: Float[Array, "B S S"], image1: Float[Array, "B S S"], mask0: Bool[Array, "B S S"],
          mask1: Bool[Array, "B S S"], similarity: Float[Array, "B 4"], config: Settings) -> Aligned:
    """Print 0 is warped onto print 1; both branches see only what the two have in common.

    The global branch gets the overlap, enhanced when `config.enhance`; the local branch a window of
    `roi_size` px of the original prints around the overlap's centre.
    """
    size = image0.shape[1]
    grid = jnp.asarray(grid_points(size))
    back = apply_similarity(invert_similarity(similarity), jnp.broadcast_to(grid, (image0.shape[0], *grid.shape)))
    warped = jax.vmap(lambda i, xy: sample(i, xy, i[0, 0]))(image0, back).reshape(image0.shape)
    moved = jax.vmap(lambda m, xy: sample(m, xy, 0.0))(mask0.astype(jnp.float32), back).reshape(image0.shape) > 0.5

    ridge = RIDGE * config.input_ppi / CANVAS_PPI
    both = moved & mask1
    overlap = ridge_overlap(warped, image1, both, 1.5 * ridge)
    local0, local1 = normalise(warped, overlap, config)[..., 0], normalise(image1, overlap, config)[..., 0]
    if config.enhance:
        global0, global1 = (normalise(enhance(i, ridge), overlap, config)[..., 0] for i in (local0, local1))
    else:
        global0, global1 = local0, local1
    corner = _roi_corner(overlap, config.roi_size)
    crop = jax.vmap(lambda x, c: jax.lax.dynamic_slice(x, (c[1], c[0]), (config.roi_size, config.roi_size)))
    return Aligned(global0[..., None], global1[..., None], overlap,
                   crop(local0, corner)[..., None], crop(local1, corner)[..., None], crop(overlap, corner))


def enhance(images: Float[Array, "B S S"], ridge: float) -> Float[Array, "B S S"]:
    """Difference of Gaussians that passes periods near `ridge` px and drops pores and shading."""
    return blur(images, 0.15 * ridge) - blur(images, 0.5 * ridge)


def _roi_corner(overlap: Bool[Array, "B S S"], roi: int) -> Int[Array, "B 2"]:
    """(x, y) of the window's upper left corner, its centre at the overlap's, inside the image."""
    size = overlap.shape[1]
    along = np.arange(size, dtype=np.float32)
    total = overlap.sum((1, 2)) + 1e-3
    x = (overlap.sum(1) * along).sum(1) / total
    y = (overlap.sum(2) * along).sum(1) / total
    return jnp.clip(jnp.round(jnp.stack([x, y], -1) - roi / 2).astype(jnp.int32), 0, size - roi)
