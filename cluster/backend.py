"""Starts `jax.distributed` in every worker of Ray Train; each keeps the devices that Ray gave it.

Ray's own JaxConfig is not used, for three reasons. It starts nothing on CPU. It overwrites CUDA_VISIBLE_DEVICES in
every worker, so that two one-GPU workers of a host both take GPU 0. It cannot change JAX's time-outs.
"""

import os
import socket
import sys
from dataclasses import dataclass
from importlib import metadata

import ray
from ray.train.backend import Backend, BackendConfig
from ray.util.tpu import get_tpu_coordinator_env_vars

from cluster.cores import as_important_as_others
from cluster.private import cache_every_process
from cluster.proxies import reach_directly
from cluster.xla_flags import unfit

# In a worker: why its group cannot run. The training function raises it, because only its errors reach the user.
problem = ""


@dataclass
class JaxBackendConfig(BackendConfig):
    """Time-outs in seconds; `port` of the coordination service, 0 for any free one."""

    platform: str = "CPU"  # GPU, TPU or CPU: what the workers have
    packages: tuple[str, ...] = ("jax", "jaxlib")  # every worker must have the same versions of these
    port: int = 0
    heartbeat_timeout: int = 60  # the others take a process for dead that is silent for so long
    initialization_timeout: int = 120

    @property
    def backend_cls(self):
        return JaxBackend


class JaxBackend(Backend):
    """Starts JAX's processes before the training function. They end with it (`worker.work`), or are killed."""

    def on_start(self, worker_group, backend_config: JaxBackendConfig) -> None:
        workers, count = worker_group.get_workers(), len(worker_group)
        versions = worker_group.execute(_versions, backend_config.packages)
        address, port, why = worker_group.execute_single(0, _coordinator, backend_config.port)
        hosts = [w.metadata.node_ip for w in workers]
        why = _difference(hosts, versions) or next(filter(None, worker_group.execute(_unfit)), why)
        slices = worker_group.get_worker_group_context().num_slices if backend_config.platform == "TPU" else 1
        starting = []
        for rank, worker in enumerate(workers):
            context = worker.distributed_context
            env = {}
            if slices > 1:  # Ray ranks the workers slice by slice
                env = get_tpu_coordinator_env_vars(
                    coordinator_address=address, num_slices=slices, slice_id=rank * slices // count
                )
            starting.append(
                worker.execute_async(
                    _start,
                    why,
                    f"{address}:{port}",
                    count,
                    rank,
                    backend_config,
                    env,
                    (context.local_rank, context.local_world_size),
                    hosts,
                )
            )
        ray.get(starting)

    def on_shutdown(self, worker_group, backend_config: JaxBackendConfig) -> None:
        """Does nothing: a group that is shut down has ended by itself, or waits for a process that is gone."""


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none installed"  # e.g. run from its working directory
    return found


def _difference(hosts: list[str], versions: list[dict[str, str]]) -> str:
    """A sentence where two hosts have different versions; '' where all agree."""
    for host, theirs in zip(hosts, versions):
        for package, version in theirs.items():
            if version != versions[0][package]:
                return (
                    f"{package} is {version} on {host} and {versions[0][package]} on {hosts[0]}; "
                    "install the same version on every host."
                )
    return ""


def _coordinator(port: int) -> tuple[str, int, str]:
    """Address and port for the coordination service on the first worker's host, and why it cannot run there, or ''."""
    address = ray.util.get_node_ip_address()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as e:
            return (
                address,
                port,
                (
                    f"Port {port} of {address} cannot be had for JAX's coordinator ({e.strerror}); give another "
                    "with --coordinator_port, or 0 for any free one."
                ),
            )
        return address, s.getsockname()[1], ""


def _unfit() -> str:
    """In the worker: a sentence that says why JAX does not start in its environment; '' where it does."""
    try:
        import jax  # noqa: F401
    except (ImportError, RuntimeError, ValueError) as e:
        why = f"JAX cannot be imported ({e}); install the project anew, in a fresh environment"
    else:
        why = unfit()
    return f"On host {ray.util.get_node_ip_address()}: {why.rstrip('.')}." if why else ""


def _start(
    why: str,
    coordinator: str,
    count: int,
    rank: int,
    config: JaxBackendConfig,
    env: dict,
    place: tuple[int, int],
    hosts: list[str],
) -> None:
    """Prepares a worker: gives it its share of the host's cores, and connects it to JAX's other processes.

    `why` is not empty where the group cannot run; the worker then notes it and does not connect.
    """
    global problem
    problem = why
    os.environ.update(env)
    as_important_as_others()
    local_rank, local_count = place
    if config.platform == "CPU" and local_count > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        share = cores[local_rank * len(cores) // local_count : (local_rank + 1) * len(cores) // local_count]
        os.sched_setaffinity(0, share or cores)  # the training thread inherits it from this one
    if count > 1 and not why:
        import jax

        reach_directly(hosts)
        jax.config.update("jax_check_proxy_envs", False)  # it warns of proxies, which `reach_directly` has dealt with
        if config.platform == "CPU":
            cache_every_process()
        jax.distributed.initialize(
            coordinator,
            count,
            rank,
            initialization_timeout=config.initialization_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            cluster_detection_method="deactivate",
        )
