"""Gives a worker cores of this machine for itself, and the priority that other processes have."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

NICENESS = "RAY_worker_niceness"  # an environment variable of the process that starts Ray

_held = []  # lock files; they stay open as long as this process lives


def claim(count: int) -> set[int]:
    """Pins this thread, and those it starts, to `count` cores that no other caller on this machine holds.

    Returns these cores. Where fewer are free, or the system cannot pin threads, it pins nothing and returns an empty
    set. A process that dies gives its cores back.
    """
    if not hasattr(os, "sched_setaffinity"):
        return set()
    folder = Path(tempfile.gettempdir()) / f"cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    got = {}
    for core in sorted(os.sched_getaffinity(0)):
        file = (folder / str(core)).open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        got[core] = file
        if len(got) == count:
            _held.extend(got.values())
            os.sched_setaffinity(0, got)
            return set(got)
    for file in got.values():
        file.close()
    return set()


def as_important_as_others() -> None:
    """Gives all threads of this process the usual niceness, 0, where the system allows it (mostly to root).

    Ray starts its workers at 15, unless RAY_worker_niceness says otherwise. Any other process that wakes up on the host
    then takes a core from them at once, Ray's own idle processes too. In a step of several devices all others wait for
    the device that was interrupted.
    """
    if os.environ.get(NICENESS):  # the user has chosen it
        return
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: no such thing on this system
        threads = [int(t) for t in os.listdir("/proc/self/task")] if os.path.isdir("/proc/self/task") else [0]
        for thread in threads:
            if os.getpriority(os.PRIO_PROCESS, thread) > 0:
                os.setpriority(os.PRIO_PROCESS, thread, 0)
