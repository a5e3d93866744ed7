"""Where a run goes: this process, or Ray."""

import sys
from collections.abc import Callable

from cluster.environment import set_default
from cluster.host import Host
from cluster.job import Job, Request


def launch(job: Callable[[str], Job], request: Request, cores: int | None = None) -> tuple[int, str]:
    """Runs a job to its end, where the request says; returns (exit code, message).

    `job` makes the job for a kind of device: `GPU`, `TPU`, `CPU`, or '' where this process finds out itself. `cores`:
    how many cores a Ray that is started here may use; None: all it finds.
    ClusterError where the cluster does not have what the request asks for.
    """
    if not request.on_ray():
        return job("").call(Host())
    set_default("RAY_DEDUP_LOGS", "0")  # Ray shall print lines that are alike, too; it reads this when imported
    set_default("RAY_COLOR_PREFIX", "0")
    from cluster import on_ray

    sys.stdout.flush()
    return on_ray.run(job, request, cores)
