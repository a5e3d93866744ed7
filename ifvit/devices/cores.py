"""How many cores this process may use. In a job or a container it may use fewer than the machine has."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OF_THIS_PROCESS = Path("/proc/self/cgroup")
# Slurm and Grid Engine tell a job its number of cores by these, and do not always bind the job to them.
GIVEN = (
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPUS_ON_NODE",
    "NSLOTS",
)


def cores() -> int:
    """The smallest of three numbers: the cores that this process may run on (affinity), those that a container's quota
    pays for (rounded up), and those that its job was given.
    """
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; it is the affinity, unless -X cpu_count says otherwise
        allowed = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    jobs = [int(os.environ[name]) for name in GIVEN if os.environ.get(name, "").isdecimal()]
    return max(1, min([allowed, *(n for n in jobs if n), *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """The number of cores that each control group above this process allows; nothing for a group without a limit.

    Version 2 has `cpu.max` ("QUOTA PERIOD", or "max PERIOD"), version 1 `cpu.cfs_quota_us` (-1: no limit) and
    `cpu.cfs_period_us`. In a container the group's own path is often hidden, but its files are at the root.
    """
    for line in _read(OF_THIS_PROCESS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        if controllers and not root.is_dir():
            root = CGROUPS / "cpu"
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            if controllers:
                words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
            else:
                words = _read(folder / "cpu.max").split()
            if len(words) == 2 and all(w.isdecimal() and int(w) for w in words):
                yield int(words[0]) / int(words[1])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
