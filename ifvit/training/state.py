"""The training state, a pytree of nested dictionaries; its optimiser and its learning rates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from ifvit.config import Config, Settings
from ifvit.models.networks import Network


class TrainState(NamedTuple):
    params: dict
    batch_stats: dict
    opt_state: Any
    step: jax.Array  # int32, optimiser steps done


def optimizer(config: Settings, rate: float | jax.Array) -> optax.GradientTransformation:
    """AdamW at a learning rate, with a clipped global norm.

    Weight decay leaves out vectors and scalars: norms, biases, the learned scale.
    """
    decays = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    # optax gets the rate as a function, so that its state has the same leaves whatever the schedule.
    # b2 is 0.99, because in a run of a thousand steps 0.999 would still average over all of them.
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.adamw(lambda _: rate, b2=0.99, weight_decay=config.weight_decay, mask=decays),
    )


def learning_rate(config: Config, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine, over the run's true number of steps."""
    warmup = max(1, round(config.warmup * total_steps))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(total_steps, warmup + 1), config.final_lr * config.learning_rate
    )


def learning_rates(config: Config, total_steps: int) -> Float[np.ndarray, " steps"]:
    """The rate of each step. The host keeps them and hands each step its rate, so that no schedule is compiled."""
    rates = jax.jit(jax.vmap(learning_rate(config, total_steps)))  # one small program, not one for each operation
    return np.asarray(rates(jnp.arange(total_steps)), np.float32)


def init_state(net: Network, tx: optax.GradientTransformation, seed) -> TrainState:
    """A fresh state. It is a pure function: first evaluated for its shapes, then run under jit on the devices."""
    params, stats = net.init(jax.random.key(seed))
    return TrainState(params, stats, tx.init(params), jnp.zeros((), jnp.int32))
