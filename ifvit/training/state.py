"""The training state, a pytree of nested dictionaries, and the models as pure functions of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from ifvit.config import Config, Settings


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


def optimizer(config: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with a clipped global norm. Vectors and scalars (norms, biases, the learned scale) are not decayed."""
    decays = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    # b2 of 0.99: at a thousand steps 0.999 would still average over all of them
    return optax.chain(optax.clip_by_global_norm(config.grad_clip),
                       optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=decays))


def learning_rate(config: Config, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine, over the run's true number of steps."""
    warmup = max(1, round(config.warmup * total_steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(total_steps, warmup + 1), config.final_lr * config.learning_rate)


def learning_rates(config: Config, total_steps: int) -> Float[np.ndarray, " steps"]:
    """Each step's rate. The host keeps them: the compiled step takes its own, and need not know the schedule."""
    return np.asarray(jax.vmap(learning_rate(config, total_steps))(jnp.arange(total_steps)), np.float32)


def init_state(net: Network, tx: optax.GradientTransformation, seed) -> TrainState:
    """A fresh state: a pure function, to be evaluated for its shapes, then run under jit where it shall live."""
    params, stats = net.init(jax.random.key(seed))
    return TrainState(params, stats, tx.init(params), jnp.zeros((), jnp.int32))
