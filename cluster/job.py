"""A job to run, and what a user asks of the place where it runs."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from cluster import address
from cluster.host import ClusterError, Host


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    runtime: str = "auto"  # auto, local, ray
    num_workers: str = ""  # "", "N" or "MIN:MAX"
    wait_for_hosts: float = 50.0  # seconds to wait until the cluster has what is asked for
    devices: str = "auto"  # gpu, tpu or cpu, of Ray's workers; auto: what the cluster has
    workers_per_host: int = 0  # 0: one; on a Ray of this machine alone, all
    max_failures: int = 5  # so many in a row without a new checkpoint are tried again; then the run is given up
    hang_timeout: float = 600.0  # seconds without a step after which a process ends itself; 0: never
    coordinator_port: int = 0  # of JAX's coordination service, on the first worker's host; 0: any free one

    def __post_init__(self):
        for name in ("workers_per_host", "wait_for_hosts", "max_failures", "hang_timeout", "coordinator_port"):
            value, most = getattr(self, name), 65535 if name == "coordinator_port" else float("inf")
            if not 0 <= value <= most:  # this refuses NaN too
                raise ClusterError(
                    f"--{name} is {value}; give a number from 0 on" + (f" to {most}." if most == 65535 else ".")
                )

    def workers(self) -> tuple[int, int] | None:
        """(fewest, most) workers; None where the user gave none. ClusterError where it is no number or range."""
        if not self.num_workers:
            return None
        low, colon, high = self.num_workers.partition(":")
        try:
            found = int(low), int(high if colon else low)
        except ValueError:
            found = 0, 0
        if not 1 <= found[0] <= found[1]:
            raise ClusterError(
                f"--num_workers {self.num_workers} is neither a number from 1 on nor a range MIN:MAX; give "
                "e.g. 2, or 1:4."
            )
        return found

    def on_ray(self) -> bool:
        """Whether Ray runs the job: when the user asks for it, when RAY_ADDRESS is set, or with several workers.

        ClusterError where Ray is not installed, and where RAY_ADDRESS is no address.
        """
        several = (self.workers() or (1, 1))[1] > 1
        wanted = self.runtime == "ray" or (self.runtime == "auto" and (address.given() or several))
        if self.runtime == "local" and several:
            raise ClusterError(
                f"--runtime local is one process, and --num_workers {self.num_workers} asks for more; leave "
                "one of them out."
            )
        if wanted and importlib.util.find_spec("ray") is None:
            raise ClusterError(
                "Ray is not installed, and this run needs it; pip install 'ray[default,train]', or give "
                "--runtime local."
            )
        if wanted:
            address.ray_address()
        return wanted


@dataclass(frozen=True)
class Job:
    """What is to be run: the same callable in every process.

    `call(host)` returns (exit code, message) for an end that another try would not change. When it raises, that is a
    failure, and Ray tries again. It is sent to other hosts: a function of a module, or a `partial` of one.
    """

    call: Callable[[Host], tuple[int, str]]
    name: str
    batches: tuple[int, ...] = ()  # items a step: the number of workers has to divide each
    packages: tuple[str, ...] = ("jax", "jaxlib")  # every host needs the same version of these
    item: str = "items"  # what a batch has, in messages
    another_batch: str = "another batch"  # the remedy where batches do not divide, in messages
    variables: tuple[str, ...] = ()  # the workers get the driver's environment variables that begin so
