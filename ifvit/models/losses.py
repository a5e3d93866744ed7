"""The losses: L_D (dense), L_E (cosine embedding), L_A (ArcFace).

Labels of the dense loss, one a cell of image 0: the matching cell of image 1, NO_MATCH where the
truth is that there is none, IGNORE where the truth is not known (background, or a cell whose
nearest neighbour is not mutual).

Under `training.step.train_step` each of these is one device's share of the loss of the global batch: the
counts that divide it are the global batch's, and the shares add up to the loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ifvit.devices.batch_axes import over_batch

NO_MATCH = -1
IGNORE = -2


def focal_loss(
    log_conf: Float[Array, "B L S"],
    labels: Int[Array, "B L"],
    m0: Bool[Array, "B L"],
    m1: Bool[Array, "B S"],
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Array, ""]:
    """LoFTR's dense focal loss (section 3.4: one alpha for matches and non-matches), probabilities clamped at 1e-6.

    Mean over the matches plus mean over all other pairs of foreground cells, weighted 1 and 1: an impostor pair is
    all negatives, and counts. LoFTR's mean of the negatives counts masked pairs too, each as 0; without masks the
    two losses are equal. Rows of unknown truth count in neither mean.
    """
    p = jnp.clip(jnp.exp(log_conf), 1e-6, 1 - 1e-6)
    positive = jnp.arange(log_conf.shape[2]) == labels[:, :, None]
    negative = m0[:, :, None] & m1[:, None, :] & (labels != IGNORE)[:, :, None] & ~positive
    loss_pos = -alpha * (1 - p) ** gamma * jnp.log(p)
    loss_neg = -alpha * p**gamma * jnp.log(1 - p)
    return mean_where(loss_pos, positive) + mean_where(loss_neg, negative)


def nll_loss(
    log_conf: Float[Array, "B L S"], labels: Int[Array, "B L"], m0: Bool[Array, "B L"], m1: Bool[Array, "B S"]
) -> Float[Array, ""]:
    """Negative log-likelihood of the matches; of "no match at all" for the cells known to have none.

    The confidence that a cell has some match is the sum of its row. Learns faster from scratch than
    the focal loss, whose gradient is small while every confidence is.
    """
    picked = jnp.take_along_axis(log_conf, jnp.maximum(labels, 0)[:, :, None], axis=2)[..., 0]
    some = jnp.clip(jnp.exp(log_conf).sum(axis=2), 0, 1 - 1e-6)
    unmatched = (labels == NO_MATCH) & m0 & m1.any(axis=1)[:, None]
    return mean_where(-picked, labels >= 0) + mean_where(-jnp.log1p(-some), unmatched)


DENSE_LOSSES = {"focal": focal_loss, "nll": nll_loss}


def cosine_embedding_loss(
    e0: Float[Array, "B D"],
    e1: Float[Array, "B D"],
    genuine: Bool[Array, " B"],
    margin: float | Float[Array, ""],
    counts: Bool[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """L_E: 1 − cos for genuine pairs, max(0, cos − margin) for impostors; unit vectors in.

    The mean over the pairs that count; left out, all do.
    """
    cos = (e0 * e1).sum(-1)
    counts = jnp.ones_like(genuine) if counts is None else counts
    return mean_where(jnp.where(genuine, 1 - cos, jnp.maximum(0.0, cos - margin)), counts)


def arcface_loss(
    e: Float[Array, "B D"],
    weight: Float[Array, "D C"],
    labels: Int[Array, " B"],
    margin: float | Float[Array, ""],
    scale: float | Float[Array, ""],
) -> Float[Array, ""]:
    """L_A (Deng et al. 2019, eq. 3): cross-entropy of scale · cos(θ + margin at the true class).

    Unit vectors in. Past θ = π − margin, where cos(θ + margin) would rise again, the target is
    continued by cos θ − margin · sin margin, as the authors' code has it. A label of −1 (a finger
    without a class) counts for nothing.
    """
    cos = jnp.clip(e @ (weight / (jnp.linalg.norm(weight, axis=0, keepdims=True) + 1e-9)), -1 + 1e-6, 1 - 1e-6)
    sin = jnp.sqrt(1 - cos**2)
    turned = jnp.where(
        cos > jnp.cos(jnp.pi - margin), cos * jnp.cos(margin) - sin * jnp.sin(margin), cos - margin * jnp.sin(margin)
    )
    target = jnp.arange(weight.shape[1]) == labels[:, None]
    logits = scale * jnp.where(target, turned, cos)
    nll = jax.nn.logsumexp(logits, axis=1) - jnp.where(target, logits, 0).sum(axis=1)
    return mean_where(nll, labels >= 0)


def mean_where(values: Float[Array, "*S"], where: Bool[Array, "*S"]) -> Float[Array, ""]:
    """Mean over `where` in the global batch, or this device's share of it; 0 if that is empty."""
    return jnp.where(where, values, 0).sum() / jnp.maximum(over_batch(where.sum()), 1)
