"""How well Module 1 finds a warp that is known."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ifvit.config import Settings
from ifvit.models.cells import cell_mask
from ifvit.models.losses import IGNORE, mean_where
from ifvit.models.networks import Network
from ifvit.pixels.geometry import exact
from ifvit.pixels.views import dense_pair


def warp_accuracy(log_conf: Float[Array, "B L L"], labels: Int[Array, "B L"]) -> Float[Array, ""]:
    """Share of the cells with a known match whose most confident cell lies within one cell of it, per batch."""
    side = round(log_conf.shape[2] ** 0.5)
    found = log_conf.argmax(axis=2)
    near = (jnp.abs(found // side - labels // side) <= 1) & (jnp.abs(found % side - labels % side) <= 1)
    return mean_where(near.astype(jnp.float32), labels >= 0)


def dense_eval(net: Network, config: Settings) -> Callable:
    """(params, batch_stats, batch, keys) -> correct and known cells, summed, and the confidence given to impostors.

    Only the pairs that `batch["counts"]` (B,) marks have a part in it: a last batch is filled up.
    """

    @exact
    def evaluate(params, batch_stats, batch, keys):
        pair = dense_pair(keys, batch, config)
        log_conf, _ = net.apply(params, batch_stats, *pair[:4], train=False)
        labels = jnp.where(batch["counts"][:, None], pair.labels, IGNORE)
        known = (labels >= 0).sum()
        top = jnp.exp(log_conf.max(axis=2)) * cell_mask(pair.mask0)
        return {
            "correct": warp_accuracy(log_conf, labels) * known,
            "known": known,
            "impostor_confidence": (top.max(axis=1) * (batch["counts"] & ~batch["genuine"])).sum(),
        }

    return evaluate
