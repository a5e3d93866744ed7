"""Both modules' networks as pure functions of their parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from ifvit.config import Settings
from ifvit.models.dense_reg import DenseRegistration
from ifvit.models.matcher import Matcher


class Network(NamedTuple):
    """A model as data: `apply(params, batch_stats, *inputs, train)` -> (output, new batch_stats).

    With `method` it calls another method of the model than `__call__`.
    """

    init: Callable[[jax.Array], tuple[dict, dict]]
    apply: Callable


def network(make: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """The module that `make` builds, as pure functions; parameters are nested dictionaries of arrays."""
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphdef, params_spec, stats_spec = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def init(key):
        _, params, stats = nnx.split(make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(params, batch_stats, *inputs, train: bool, method: str = "__call__"):
        spec_p, spec_s = jax.tree.map(lambda x: x, params_spec), jax.tree.map(lambda x: x, stats_spec)
        nnx.replace_by_pure_dict(spec_p, params)
        nnx.replace_by_pure_dict(spec_s, batch_stats)
        model = nnx.merge(graphdef, spec_p, spec_s, copy=True)
        out = getattr(model, method)(*inputs, train=train)
        return out, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return Network(init, apply)


def dense_network(config: Settings) -> Network:
    """Module 1 of a `DenseConfig`."""
    return network(lambda rngs: DenseRegistration(config, rngs=rngs))


def match_network(config: Settings, num_classes: int) -> Network:
    """Module 2 of a `MatchConfig`, with so many classes of ArcFace."""
    return network(lambda rngs: Matcher(config, num_classes, rngs=rngs))
