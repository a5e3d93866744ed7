"""Where a run goes: this process, or Ray."""

import sys
from collections.abc import Callable

from cluster.environment import set_default
from cluster.host import Host
from cluster.job import Job, Request


def launch(job: Callable[[str], Job], request: Request, cores: int | None = None) -> tuple[int, str]:
    """Runs a job where the request says, to its end; (exit code, message).

    `job` makes it for a kind of device: `GPU`, `TPU`, `CPU`, or '' where this process is to find out. `cores`: that a
    Ray which is started here may use; None: all it finds.
    ClusterError when it cannot be had.
    """
    if not request.on_ray():
        return job("").call(Host())
    set_default("RAY_DEDUP_LOGS", "0")  # two lines that are alike are two lines; Ray reads it when imported
    set_default("RAY_COLOR_PREFIX", "0")
    from cluster import on_ray

    sys.stdout.flush()
    return on_ray.run(job, request, cores)
