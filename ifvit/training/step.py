"""The training steps of both modules, pure functions (state, batch) -> (state, metrics), and what they share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key

from ifvit.config import Settings
from ifvit.devices.batch_axes import batch_axes, over_batch
from ifvit.devices.sharding import batch_spec, gathered
from ifvit.models.cells import cell_mask
from ifvit.models.losses import DENSE_LOSSES, IGNORE, NO_MATCH, arcface_loss, cosine_embedding_loss, mean_where
from ifvit.models.networks import Network
from ifvit.pixels.alignment import aligned_pair
from ifvit.pixels.views import dense_pair, match_views
from ifvit.scoring.known_warps import warp_accuracy
from ifvit.training.state import TrainState, optimizer


def pair_keys(seed: int | Int[Array, ""], step: int | Int[Array, ""], shape: tuple[int, ...]) -> Key[Array, "..."]:
    """A random key for each pair of a step's global batch; the keys do not depend on the number of hosts."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), shape)


def train_step(loss: Callable, config: Settings) -> Callable:
    """(state, batch, rate, *constants) -> (state, metrics): one optimiser step at a learning rate.

    `loss(params, batch_stats, batch, keys, *constants)` -> (value, (batch_stats, metrics)) sees one device's pairs. It
    returns that device's share of the global batch's loss and metrics, and the shares are added up. With
    `config.accumulate` the batch comes as so many micro-batches (A, B/A, …), whose gradients are averaged. BatchNorm
    sees each micro-batch whole. `asked` in the batch says what each process is asked, the same number for all its
    pairs; its maximum over all processes comes back with the metrics, in the same step on each.
    """

    def step(state: TrainState, batch: dict, rate: jax.Array, *constants) -> tuple[TrainState, dict]:
        batch = dict(batch)
        asked = {"asked": batch.pop("asked").max()} if "asked" in batch else {}
        keys = pair_keys(config.seed, state.step, batch["genuine"].shape)
        grads, value, stats, metrics = over_devices(_gradient(loss, config.accumulate))(
            gathered(state.params), state.batch_stats, batch, keys, constants
        )
        updates, opt_state = optimizer(config, rate).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = dict(metrics, loss=value, grad_norm=optax.tree.norm(grads), learning_rate=rate)
        return TrainState(params, stats, opt_state, state.step + 1), metrics | asked

    return step


def over_devices(gradient: Callable) -> Callable:
    """Maps `gradient` over the devices of the mesh in use: splits batch and keys, and gives each device all else whole.

    Without a mesh it returns `gradient` as it is.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return gradient

    def mapped(params, batch_stats, batch, keys, constants):
        split = jax.tree.map(lambda key: batch_spec(key.ndim > 1), keys)
        return jax.shard_map(gradient, in_specs=(P(), P(), split, split, P()), out_specs=P())(
            params, batch_stats, batch, keys, constants
        )

    return mapped


def _gradient(loss: Callable, accumulate: int) -> Callable:
    """(params, batch_stats, batch, keys, constants) -> (gradient, loss, batch_stats, metrics) of the global batch.

    All sums over the devices travel in one buffer. A hundred small collectives cost more than one, and on CPU XLA does
    not combine them.
    """

    def gradient(params, batch_stats, batch, keys, constants):
        # Without this JAX would add up each leaf's gradient with a collective of its own.
        params = jax.tree.map(_own, params)

        def of(stats, part):
            (value, (stats, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, *part, *constants)
            return stats, (grads, value, metrics)

        if accumulate == 1:
            stats, sums = of(batch_stats, (batch, keys))
        else:

            def add(carry, part):
                stats, sums = of(carry[0], part)
                return (stats, jax.tree.map(jnp.add, carry[1], sums)), None

            first = jax.tree.map(lambda x: x[0], (batch, keys))
            nothing = jax.tree.map(
                lambda x: _own(jnp.zeros(x.shape, x.dtype)), jax.eval_shape(of, batch_stats, first)[1]
            )
            (stats, sums), _ = jax.lax.scan(add, (batch_stats, nothing), (batch, keys))
            sums = jax.tree.map(lambda x: x / accumulate, sums)
        flat, unravel = ravel_pytree(sums)
        grads, value, metrics = unravel(over_batch(flat))
        return grads, value, stats, metrics

    return gradient


def _own(x):
    """A device's own copy of a value that is the same on all devices."""
    axes = batch_axes()
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def dense_step(net: Network, config: Settings) -> Callable:
    """Module 1's step on two views of a print with a known warp, or on two fingers; the loss is L_D alone."""

    def loss(params, batch_stats, batch, keys):
        pair = dense_pair(keys, batch, config)
        log_conf, stats = net.apply(params, batch_stats, *pair[:4], train=True)
        value = DENSE_LOSSES[config.dense_loss](log_conf, pair.labels, cell_mask(pair.mask0), cell_mask(pair.mask1))
        return value, (stats, {"accuracy": warp_accuracy(log_conf, pair.labels)})

    return train_step(loss, config)


def match_step(net: Network, aligner: Network | None, config: Settings) -> Callable:
    """Module 2's step: (state, batch, rate, aligner_state) -> (state, metrics).

    The loss is 0.5 L_D + 0.1 L_E + 1.0 L_A by default.
    """

    def loss(params, batch_stats, batch, keys, aligner_state):
        genuine = batch["genuine"]
        pair, aligned, count = aligned_pair(aligner, aligner_state, match_views(keys, batch, config), config)
        # A genuine pair that may lie wrong teaches nothing. Without Module 1 none is aligned, and all count.
        sure = count >= config.label_matches if aligner else jnp.ones_like(genuine)
        if aligner and config.deformed:
            sure &= aligned
        shift = frame_shifts(keys, config.frame_shift) if config.frame_shift else None
        e, stats = net.apply(params, batch_stats, pair, shift, train=True)
        # After alignment a cell of a genuine pair matches the cell at its own place. Failed alignments are left out.
        same = jnp.where((aligned & sure)[:, None], jnp.arange(e.cells.shape[1]), IGNORE)
        labels = jnp.where(e.cells, jnp.where(genuine[:, None], same, NO_MATCH), IGNORE)
        if aligner is None:  # no pair is aligned, and impostors alone would teach that nothing matches
            labels = jnp.full_like(labels, IGNORE)
        l_d = DENSE_LOSSES[config.dense_loss](e.log_conf, labels, e.cells, e.cells)
        counts = sure | ~genuine

        def of_embeddings(e0, e1, centres):
            """L_E and L_A of the pairs that count."""
            of_finger = lambda e, label: arcface_loss(
                e, centres, jnp.where(counts, label, -1), config.arcface_margin, config.arcface_scale
            )
            l_a = (of_finger(e0, batch["label0"]) + of_finger(e1, batch["label1"])) / 2
            return jnp.stack([cosine_embedding_loss(e0, e1, genuine, config.embedding_margin, counts), l_a])

        l_e, l_a = (
            of_embeddings(e.global0, e.global1, params["arcface_global"])
            + of_embeddings(e.local0, e.local1, params["arcface_local"])
        ) / 2
        value = config.loss_dense * l_d + config.loss_embedding * l_e + config.loss_arcface * l_a
        metrics = {"l_d": l_d, "l_e": l_e, "l_a": l_a, "aligned": mean_where(aligned.astype(jnp.float32), genuine)}
        return value, (stats, metrics)

    return train_step(loss, config)


def frame_shifts(keys: Key[Array, " B"], most: int) -> Int[Array, "B 2"]:
    """Whole cells, of each pair and direction one of −most … most."""
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 3), (2,), -most, most + 1))(keys)
