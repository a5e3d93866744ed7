"""The two training steps, pure functions (state, batch) -> (state, metrics), and what they have in common."""

from typing import Callable

import jax
import jax.numpy as jnp
import optax

from ifvit.alignment import align, register
from ifvit.data.augment import dense_pair, match_views, normalise
from ifvit.losses import DENSE_LOSSES, IGNORE, NO_MATCH, arcface_loss, cosine_embedding_loss
from ifvit.models.dense_reg import DenseRegistration, cell_mask
from ifvit.models.matcher import Matcher
from ifvit.training.sharding import gathered
from ifvit.training.state import Network, TrainState, network


def dense_network(config) -> Network:
    return network(lambda rngs: DenseRegistration(config, rngs=rngs))


def match_network(config, num_classes: int) -> Network:
    return network(lambda rngs: Matcher(config, num_classes, rngs=rngs))


def pair_keys(seed: int, step, count: int):
    """A random key for each pair of the global batch of a step, whatever the number of hosts."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), count)


def gradient_step(state: TrainState, loss: Callable, tx: optax.GradientTransformation, schedule):
    """One optimiser step on `loss(params) -> (value, (batch_stats, metrics))`."""
    (value, (stats, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(gathered(state.params))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = dict(metrics, loss=value, grad_norm=optax.tree.norm(grads), learning_rate=schedule(state.step))
    return TrainState(params, stats, opt_state, state.step + 1), metrics


def dense_step(net: Network, config, tx, schedule):
    """Module 1: two views of a print with known truth, or two fingers; L_D alone."""
    def step(state: TrainState, batch: dict):
        pair = dense_pair(pair_keys(config.seed, state.step, batch["genuine"].shape[0]), batch, config, cell_mask)

        def loss(params):
            log_conf, stats = net.apply(params, state.batch_stats, *pair[:4], train=True)
            value = DENSE_LOSSES[config.dense_loss](log_conf, pair.labels, cell_mask(pair.mask0), cell_mask(pair.mask1))
            return value, (stats, {"accuracy": warp_accuracy(log_conf, pair.labels)})

        return gradient_step(state, loss, tx, schedule)

    return step


def warp_accuracy(log_conf, labels):
    """Share of the cells with a known match whose most confident cell lies within one cell of it, per batch."""
    side = round(log_conf.shape[2] ** 0.5)
    found = log_conf.argmax(axis=2)
    near = (jnp.abs(found // side - labels // side) <= 1) & (jnp.abs(found % side - labels % side) <= 1)
    known = labels >= 0
    return (near & known).sum() / jnp.maximum(known.sum(), 1)


def dense_eval(net: Network, config, known_warp_only: bool):
    """(params, batch_stats, batch, keys) -> correct and known cells, summed, and the confidence given to impostors.

    Only the pairs that `batch["counts"]` (B,) marks have a part in it: a last batch is filled up.
    """
    def evaluate(params, batch_stats, batch, keys):
        pair = dense_pair(keys, batch, config, cell_mask, known_warp_only)
        log_conf, _ = net.apply(params, batch_stats, *pair[:4], train=False)
        labels = jnp.where(batch["counts"][:, None], pair.labels, IGNORE)
        known = (labels >= 0).sum()
        top = jnp.exp(log_conf.max(axis=2)) * cell_mask(pair.mask0)
        return {"correct": warp_accuracy(log_conf, labels) * known, "known": known,
                "impostor_confidence": (top.max(axis=1) * (batch["counts"] & ~batch["genuine"])).sum()}

    return evaluate


def registration(aligner: Network | None, aligner_state, views, config):
    """Module 1, frozen, on a batch of views; None (no aligner) where Module 2 runs unaligned."""
    if aligner is None:
        return None
    image0, mask0, image1, mask1 = views
    params, stats = jax.lax.stop_gradient(aligner_state)
    log_conf, _ = aligner.apply(params, stats, normalise(image0, mask0, config), normalise(image1, mask1, config),
                                mask0, mask1, train=False)
    return register(log_conf, config.image_size, config)


def aligned_pair(aligner, aligner_state, views, config):
    """Views -> (inputs of Module 2, aligned (B,) bool, number of registered matches (B,))."""
    image0, mask0, image1, mask1 = views
    found = registration(aligner, aligner_state, views, config)
    if found is None:
        batch = image0.shape[0]
        none = jnp.zeros(batch, jnp.int32)
        identity = jnp.broadcast_to(jnp.array([1.0, 0, 0, 0]), (batch, 4))
        return align(image0, image1, mask0, mask1, identity, config), none > 0, none
    return align(image0, image1, mask0, mask1, found.similarity, config), found.aligned, found.count


def match_step(net: Network, aligner: Network | None, config, tx, schedule):
    """Module 2: (state, batch, aligner_state) -> (state, metrics); 0.5 L_D + 0.1 L_E + 1.0 L_A by default."""
    def step(state: TrainState, batch: dict, aligner_state):
        keys = pair_keys(config.seed, state.step, batch["genuine"].shape[0])
        genuine = batch["genuine"]
        pair, aligned, count = aligned_pair(aligner, aligner_state, match_views(keys, batch, config), config)

        def loss(params):
            e, stats = net.apply(params, state.batch_stats, pair, train=True)
            # in the common frame a genuine cell matches itself; a failed alignment teaches nothing
            same = jnp.where(aligned[:, None], jnp.arange(e.cells.shape[1]), IGNORE)
            labels = jnp.where(e.cells, jnp.where(genuine[:, None], same, NO_MATCH), IGNORE)
            l_d = DENSE_LOSSES[config.dense_loss](e.log_conf, labels, e.cells, e.cells)
            branches = ((e.global0, e.global1, params["arcface_global"]), (e.local0, e.local1, params["arcface_local"]))
            l_e = sum(cosine_embedding_loss(a, b, genuine, config.embedding_margin) for a, b, _ in branches) / 2
            l_a = sum(arcface_loss(x, w, label, config.arcface_margin, config.arcface_scale)
                      for a, b, w in branches for x, label in ((a, batch["label0"]), (b, batch["label1"]))) / 4
            value = config.loss_dense * l_d + config.loss_embedding * l_e + config.loss_arcface * l_a
            return value, (stats, {"l_d": l_d, "l_e": l_e, "l_a": l_a,
                                   "aligned": (aligned & genuine).sum() / jnp.maximum(genuine.sum(), 1)})

        return gradient_step(state, loss, tx, schedule)

    return step
