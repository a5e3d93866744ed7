"""One mesh with the axes `data` and `model`; a batch is split over `data`."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ifvit.errors import UserError


def make_mesh() -> Mesh:
    """All devices on `data`."""
    return Mesh(np.asarray(jax.devices()).reshape(-1, 1), ("data", "model"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, mesh: Mesh) -> None:
    devices = mesh.shape["data"]
    if batch_size % devices:
        raise UserError(f"A batch of {batch_size} does not divide among {devices} devices; "
                        f"use --batch_size {max(devices, batch_size // devices * devices)}.")


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's part of the global batch -> global arrays split over `data`."""
    sharding = over_data(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
