"""The training state, a pytree of nested dictionaries, and the models as pure functions of it."""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class TrainState(NamedTuple):
    params: dict
    batch_stats: dict
    opt_state: Any
    step: jax.Array  # int32, optimiser steps done


class Network(NamedTuple):
    """A model as data: `apply(params, batch_stats, *inputs, train)` -> (output, new batch_stats)."""

    init: Callable[[jax.Array], tuple[dict, dict]]
    apply: Callable


def network(make: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """The module that `make` builds, as pure functions; parameters are nested dictionaries of arrays."""
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, params_spec, stats_spec = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def init(key):
        _, params, stats = nnx.split(make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(params, batch_stats, *inputs, train: bool):
        spec_p, spec_s = jax.tree.map(lambda x: x, params_spec), jax.tree.map(lambda x: x, stats_spec)
        nnx.replace_by_pure_dict(spec_p, params)
        nnx.replace_by_pure_dict(spec_s, batch_stats)
        model = nnx.merge(graphdef, spec_p, spec_s, copy=True)
        out = model(*inputs, train=train)
        return out, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return Network(init, apply)


def optimizer(config, total_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with a clipped global norm; linear warm-up, then a cosine, over the run's true number of steps.

    Vectors and scalars (norms, biases, the learned scale) are not decayed.
    """
    warmup = max(1, round(config.warmup * total_steps))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(total_steps, warmup + 1), config.final_lr * config.learning_rate)
    decays = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    # b2 of 0.99: at a thousand steps 0.999 would still average over all of them
    tx = optax.chain(optax.clip_by_global_norm(config.grad_clip),
                     optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=decays))
    return tx, schedule


def init_state(net: Network, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state: a pure function, to be evaluated for its shapes, then run under jit where it shall live."""
    params, stats = net.init(jax.random.key(seed))
    return TrainState(params, stats, tx.init(params), jnp.zeros((), jnp.int32))
