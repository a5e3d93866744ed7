"""Cores of this machine for one process alone, where several processes share them and nobody tells them apart."""

import fcntl
import os
import tempfile
from pathlib import Path

_held = []  # lock files, open as long as this process lives


def claim(count: int) -> set[int]:
    """Pins this thread, and those it starts, to `count` cores that no other caller on this machine holds; which they are.

    Where there are not so many free, or the system has no such thing, nothing is pinned: an empty set. A process that
    dies gives its cores back.
    """
    if not hasattr(os, "sched_setaffinity"):
        return set()
    folder = Path(tempfile.gettempdir()) / f"cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    got = {}
    for core in sorted(os.sched_getaffinity(0)):
        file = (folder / str(core)).open("w")
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
