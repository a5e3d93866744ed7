"""One mesh with the axes `data` and `model`. A batch is split over both; one table splits parameters over `model`."""

import math
import os
import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ifvit.devices import progress
from ifvit.devices.cores import cores
from ifvit.errors import UserError

MIN_PAIRS = 4  # a CPU device with fewer pairs than this spends its time on overhead
FORCED = "xla_force_host_platform_device_count"


def use_cpu_cores() -> None:
    """Makes one JAX device of each CPU core. It must be called before JAX finds its devices.

    XLA runs most of a convolutional network on one thread of each device. On two cores a training step of preset `cpu`
    did 1.3 times as many pairs per second with two devices. A number of devices in XLA_FLAGS wins.
    """
    if FORCED not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cores())


def make_mesh(pairs: int, model_parallel: int = 1) -> Mesh:
    """A mesh of all devices. `data`, the outer axis, goes over slices and hosts; `model` over neighbours of one host.

    `pairs` is the size of a (micro-)batch, which has to divide among the devices. Of CPU cores, as many are used as
    divide it, unless XLA_FLAGS says how many. UserError where the devices do not fit.
    """
    devices = arranged(jax.devices())
    processes = jax.process_count()
    if devices[0].platform == "cpu" and FORCED not in os.environ.get("XLA_FLAGS", ""):
        cores = len(devices) // processes
        fitting = [
            n
            for n in range(1, cores + 1)
            if pairs % (n * processes) == 0
            and n % model_parallel == 0
            and (n == 1 or pairs // (n * processes) >= MIN_PAIRS)
        ]
        devices = [d for n, d in enumerate(devices) if n % cores < max(fitting, default=min(model_parallel, cores))]
    local = len(devices) // processes
    if len(devices) % model_parallel or (model_parallel % local and local % model_parallel):
        raise UserError(
            f"model_parallel is {model_parallel}, and {local} devices a host ({len(devices)} in all) do not "
            f"divide by it; use --set model_parallel={math.gcd(local, model_parallel)}."
        )
    if pairs % len(devices):
        raise UserError(
            f"A batch of {pairs} does not divide among {len(devices)} devices; "
            f"use --batch_size {max(1, pairs // len(devices)) * len(devices)}."
        )
    return Mesh(np.asarray(devices).reshape(-1, model_parallel), ("data", "model"))


def arranged(devices: list) -> list:
    """The devices ordered by slice, then by host, so that distant devices meet on the outer axis alone."""
    return sorted(devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id))


# How parameters are split (FSDP): the first pattern that is found in a leaf's path decides. The paths of the
# optimiser's moments contain those of their parameters, so that both are split alike.
RULES = (
    (r"(q_proj|k_proj|v_proj|mlp_0)/kernel$", P(None, "model")),
    (r"(merge|mlp_2|reduce|embed)/kernel$", P("model", None)),
    (r"resnet\w*/.*kernel$", P(None, None, None, "model")),  # HWIO: the output channels
    (r"arcface_\w+$", P("model", None)),  # splits the embedding's axis, whatever the number of classes
    (r"", P()),  # norms, biases and scalars are replicated
)


def shardings(tree, mesh: Mesh):
    """The sharding of every leaf of a state (arrays or shapes) by RULES; replicated where it does not divide."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        fits = len(spec) <= leaf.ndim and all(
            axis is None or leaf.shape[i] % mesh.shape[axis] == 0 for i, axis in enumerate(spec)
        )
        return NamedSharding(mesh, spec if fits and mesh.shape["model"] > 1 else P())

    return jax.tree_util.tree_map_with_path(of, tree)


def gathered(tree):
    """The parameters whole on every device, for the time that the step computes with them (FSDP)."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, P())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_spec(micro_batches: bool = False) -> P:
    """Splits the pairs of a batch over all devices; FSDP splits them over `model` too. Micro-batches come first."""
    return P(None, ("data", "model")) if micro_batches else P(("data", "model"))


def put_batch(batch: dict, mesh: Mesh, accumulate: int = 1) -> dict:
    """Turns this process's part of the global batch into global arrays, split over the devices.

    With `accumulate` > 1 these have that many micro-batches (A, B/A, …). The process's part holds its pairs of each
    micro-batch in turn, so that a micro-batch has the same pairs on any number of devices.
    """
    sharding = NamedSharding(mesh, batch_spec(accumulate > 1))
    if accumulate > 1:
        batch = {k: v.reshape(accumulate, -1, *v.shape[1:]) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_whole_batch(batch: dict, mesh: Mesh) -> dict:
    """Turns a batch that every process has whole into global arrays, split over the devices."""
    sharding = NamedSharding(mesh, batch_spec())
    return {k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for k, v in batch.items()}


def fetch(tree):
    """Device arrays -> numpy on every process, whole."""
    if jax.process_count() == 1:
        whole = jax.device_get(tree)
    else:
        whole = jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
    progress.made()
    return whole
