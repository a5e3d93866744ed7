"""From a registration to an aligned pair: warp, overlap, region of interest."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI, RIDGE
from ifvit.models.matcher import Aligned
from ifvit.models.networks import Network
from ifvit.pixels.agreement import bend
from ifvit.pixels.enhancement import along_ridges
from ifvit.pixels.geometry import (
    IDENTITY,
    apply_similarity,
    blur,
    grid_points,
    invert_similarity,
    ridge_overlap,
    sample,
)
from ifvit.pixels.registration import checked_registration, drawn_views, registration
from ifvit.pixels.views import Views, normalise


def align(
    image0: Float[Array, "B S S"],
    image1: Float[Array, "B S S"],
    mask0: Bool[Array, "B S S"],
    mask1: Bool[Array, "B S S"],
    similarity: Float[Array, "B 4"],
    config: Settings,
    deformation: Float[Array, "B W W 2"] | None = None,
) -> Aligned:
    """Print 0 is warped onto print 1; both branches see only what the two have in common.

    The global branch gets the overlap, enhanced when `config.enhance`; the local branch a window of
    `roi_size` px of the original prints around the overlap's centre. A `deformation` is that of a registration, px at
    CHECK_PPI, and heeded when `config.deformed`.
    """
    batch, size = image0.shape[:2]
    grid = jnp.broadcast_to(jnp.asarray(grid_points(size)), (batch, size * size, 2))
    if config.deformed and deformation is not None:
        grid += bend(deformation, config).reshape(grid.shape)
    back = apply_similarity(invert_similarity(similarity), grid)
    warped = jax.vmap(lambda i, xy: sample(i, xy, i[0, 0]))(image0, back).reshape(image0.shape)
    moved = jax.vmap(lambda m, xy: sample(m, xy, 0.0))(mask0.astype(jnp.float32), back).reshape(image0.shape) > 0.5

    ridge = RIDGE * config.input_ppi / CANVAS_PPI
    both = moved & mask1
    overlap = ridge_overlap(warped, image1, both, 1.5 * ridge)
    local0, local1 = normalise(warped, overlap, config)[..., 0], normalise(image1, overlap, config)[..., 0]
    if config.enhance and config.oriented:
        global0, global1 = (along_ridges(i, overlap, ridge) for i in (local0, local1))
    elif config.enhance:
        global0, global1 = (normalise(enhance(i, ridge), overlap, config)[..., 0] for i in (local0, local1))
    else:
        global0, global1 = local0, local1
    corner = roi_corner(overlap, config.roi_size)
    crop = jax.vmap(lambda x, c: jax.lax.dynamic_slice(x, (c[1], c[0]), (config.roi_size, config.roi_size)))
    return Aligned(
        global0[..., None],
        global1[..., None],
        overlap,
        crop(local0, corner)[..., None],
        crop(local1, corner)[..., None],
        crop(overlap, corner),
    )


def enhance(images: Float[Array, "B S S"], ridge: float) -> Float[Array, "B S S"]:
    """Difference of Gaussians that passes periods near `ridge` px and drops pores and shading."""
    return blur(images, 0.15 * ridge) - blur(images, 0.5 * ridge)


def roi_corner(overlap: Bool[Array, "B S S"], roi: int) -> Int[Array, "B 2"]:
    """(x, y) of the window's upper left corner, its centre at the overlap's, inside the image."""
    size = overlap.shape[1]
    along = np.arange(size, dtype=np.float32)
    total = overlap.sum((1, 2)) + 1e-3
    x = (overlap.sum(1) * along).sum(1) / total
    y = (overlap.sum(2) * along).sum(1) / total
    return jnp.clip(jnp.round(jnp.stack([x, y], -1) - roi / 2).astype(jnp.int32), 0, size - roi)


def aligned_pair(
    aligner: Network | None,
    aligner_state: tuple,
    views: Views,
    config: Settings,
    batch: dict | None = None,
) -> tuple[Aligned, Bool[Array, " B"], Int[Array, " B"]]:
    """Views -> inputs of Module 2, which pairs are aligned, and their registered matches.

    `batch` is that of `registration`. When `config.deformed` a pair is laid as its ridges agree best, and is aligned
    where they are taken for the same.
    """
    image0, mask0, image1, mask1 = views
    if aligner is not None and config.deformed:
        checked, _ = checked_registration(aligner, aligner_state, drawn_views(views, config), config)
        pair = align(image0, image1, mask0, mask1, checked.similarity, config, checked.deformation)
        return pair, checked.registered, checked.count
    found = registration(aligner, aligner_state, views, config, batch)
    if found is None:
        batch = image0.shape[0]
        none = jnp.zeros(batch, jnp.int32)
        identity = jnp.broadcast_to(jnp.asarray(IDENTITY), (batch, 4))
        return align(image0, image1, mask0, mask1, identity, config), none > 0, none
    return align(image0, image1, mask0, mask1, found.similarity, config), found.aligned, found.count
