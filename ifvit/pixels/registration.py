"""Module 1 at work: from two views to matches, and the similarity that most of them agree on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ifvit.config import Settings
from ifvit.constants import STRIDE
from ifvit.models.matching import Matches, mutual_matches
from ifvit.models.networks import Network
from ifvit.pixels.geometry import IDENTITY, RobustFit, cell_centres, robust_similarity
from ifvit.pixels.views import Views, normalise


class Registration(NamedTuple):
    """Module 1's answer on a pair: similarity from print 0 to print 1 in window px, and what supports it."""

    similarity: Float[Array, "B 4"]
    aligned: Bool[Array, " B"]  # at least `min_matches` inliers
    count: Int[Array, " B"]  # inliers
    matches: Matches
    inliers: Bool[Array, "B K"]
    points0: Float[Array, "B K 2"]  # window px of the matches in print 0, and in print 1
    points1: Float[Array, "B K 2"]


def register(log_conf: Float[Array, "B L L"], image_size: int, config: Settings) -> Registration:
    """Mutual matches of Module 1's confidences and the similarity that most of them agree on."""
    side = image_size // STRIDE
    matches = mutual_matches(
        log_conf, config.alignment_matches, config.match_threshold, config.match_border, (side, side)
    )
    centres = jnp.asarray(cell_centres(image_size, STRIDE))
    p0, p1 = centres[matches.cell0], centres[matches.cell1]
    fit: RobustFit = robust_similarity(p0, p1, matches.valid, config.alignment_samples, config.inlier_radius * STRIDE)
    aligned = fit.count >= config.min_matches
    similarity = jnp.where(aligned[:, None], fit.similarity, jnp.asarray(IDENTITY))
    return Registration(similarity, aligned, fit.count, matches, fit.inliers, p0, p1)


def registration(aligner: Network | None, aligner_state: tuple, views: Views, config: Settings) -> Registration | None:
    """Module 1, frozen, on a batch of views; None (no aligner) where Module 2 runs unaligned."""
    if aligner is None:
        return None
    image0, mask0, image1, mask1 = views
    params, stats = jax.lax.stop_gradient(aligner_state)
    log_conf, _ = aligner.apply(
        params, stats, normalise(image0, mask0, config), normalise(image1, mask1, config), mask0, mask1, train=False
    )
    return register(log_conf, config.image_size, config)
