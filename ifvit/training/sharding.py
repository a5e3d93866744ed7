"""One mesh with the axes `data` and `model`; a batch is split over `data`."""

import os

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ifvit.errors import UserError


MIN_PAIRS = 4  # a CPU device with fewer pairs than this spends its time on overhead
FORCED = "xla_force_host_platform_device_count"


def use_cpu_cores() -> None:
    """One JAX device a CPU core; to be called before JAX finds its devices.

    XLA runs most of a convolutional network on one thread a device. Measured on two cores: a training
    step of preset `cpu` ran 1.3 times the pairs per second on two devices. XLA_FLAGS wins.
    """
    if FORCED not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


def make_mesh(batch_size: int) -> Mesh:
    """All devices on `data`; of CPU cores that nobody asked for, as many as divide the batch.

    UserError when the devices do not divide it.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1 and FORCED not in os.environ.get("XLA_FLAGS", ""):
        fitting = [n for n in range(1, len(devices) + 1) if batch_size % n == 0 and batch_size // n >= MIN_PAIRS]
        devices = devices[: max(fitting, default=1)]
    if batch_size % len(devices):
        raise UserError(f"A batch of {batch_size} does not divide among {len(devices)} devices; "
                        f"use --batch_size {max(1, batch_size // len(devices)) * len(devices)}.")
    return Mesh(np.asarray(devices).reshape(-1, 1), ("data", "model"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's part of the global batch -> global arrays split over `data`."""
    sharding = over_data(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
