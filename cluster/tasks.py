"""Independent pieces of work on Ray: any host takes any piece, and one that is lost is done by another."""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster.cores import as_important_as_others
from cluster.host import ClusterError
from cluster.job import Request
from cluster.placement import Placement, placement
from cluster.session import passed_on, session

T, R = TypeVar("T"), TypeVar("R")
TRIES = 4  # of one piece whose process dies
DEATHS = WorkerCrashedError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError
WAITING = 3  # pieces for each worker that are handed over before earlier ones are done


def results(
    call: Callable[[T], R], pieces: Iterable[T], request: Request, cores: int | None, variables: Iterable[str]
) -> Iterator[R]:
    """What `call` returns of each piece, in the order in which they are done.

    `call` is sent to other hosts: a function of a module, or a `partial` of one. What it keeps in its module is there
    for a process's next piece. `cores`: how many cores a Ray of this machine alone may use; `variables`: the workers
    get the driver's environment variables that begin so. What `call` raises is raised here; ClusterError where the
    processes of a piece die TRIES times, and where the cluster has no host.
    """
    # JAX warns of every process that is started beside its threads; Ray's run another program at once.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    with session(cores) as alone:
        place = placement(request, alone)
        workers = place.workers[1]
        each = ", ".join(f"{v:g} {k}" for k, v in place.resources.items())
        print(f"Ray: {workers} worker{'s' if workers > 1 else ''}, each with {each}", flush=True)
        remote = _remote(place, variables)
        running: set[ray.ObjectRef] = set()
        try:
            for piece in pieces:
                while len(running) >= WAITING * workers:
                    yield _next(running)
                running.add(remote.remote(call, piece, os.getcwd()))
            while running:
                yield _next(running)
        finally:
            for one in running:
                ray.cancel(one, force=True)


def _remote(place: Placement, variables: Iterable[str]) -> Any:
    """`_call` as Ray's task, with what a worker gets."""
    env = {k: v for k, v in passed_on(variables).items() if k != "JAX_PLATFORMS" or place.platform == "CPU"}
    if place.platform == "CPU":
        env["JAX_PLATFORMS"] = "cpu"
    if sys.platform == "linux":
        env |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # malloc takes huge pages for large blocks
    given = dict(place.resources)
    task = ray.remote(
        num_cpus=given.pop("CPU"),
        num_gpus=given.pop("GPU", 0),
        resources=given,
        max_retries=TRIES - 1,
        max_calls=0,  # with GPUs Ray would end the process after each piece, and it would read its checkpoint again
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": env},
    )
    return task(_call)


def _call(call: Callable[[T], R], piece: T, cwd: str) -> R:
    _prepare(cwd)
    return call(piece)


@functools.cache
def _prepare(cwd: str) -> None:
    """Once a process. Relative paths mean what they mean where the work was started, if this host has that folder."""
    as_important_as_others()
    with contextlib.suppress(OSError):
        os.chdir(cwd)


def _next(running: set) -> Any:
    """The result of the first piece that is done, which is taken out."""
    (done,), _ = ray.wait(list(running), num_returns=1)
    running.remove(done)
    try:
        return ray.get(done)
    except RayTaskError as e:
        raise e.cause from None
    except DEATHS as e:
        raise ClusterError(
            f"A worker died {TRIES} times over one piece of work ({type(e).__name__}); the same command goes on."
        ) from e
    except RayError as e:
        said = " ".join(str(e).split())[:300]
        raise ClusterError(f"Ray could not do a piece of the work ({type(e).__name__}: {said}).") from e
