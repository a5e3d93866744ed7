"""Where a Ray that a run starts itself puts its sockets and its shared memory.

Ray takes RAY_TMPDIR or TMPDIR and /dev/shm as they are, and several things can be wrong with them. A path of a socket
has at most 107 bytes, and the TMPDIR of a batch system may be too long for that. A folder may be missing or not
writable, or its file system may know no sockets. A container may have a /dev/shm of 64 MB, or none.
"""

import contextlib
import os
import shutil
import socket
import stat
import sys
import tempfile
from pathlib import Path

from cluster import private
from cluster.host import ClusterError

SOCKET = "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.12"  # the longest path below Ray's folder
SHARED = 500 * 10**6  # bytes of /dev/shm that Ray needs free; nothing large goes through its object store here
OBJECTS = 200 * 10**6  # bytes of the object store where it lies on a disk


def of_ray() -> dict:
    """Options of `ray.init` for a Ray of this machine alone; none where Ray's own choice works.

    ClusterError where no folder works.
    """
    usual = Path(private.temp_dir())
    folder, options = usual, {}
    if not takes_sockets(usual):
        folder = next(filter(takes_sockets, _others()), None)
        if folder is None:
            raise ClusterError(
                f"Ray can have no sockets in {usual} (RAY_TMPDIR, TMPDIR), /tmp or /var/tmp; set "
                "RAY_TMPDIR to a directory with a short name that you may write to, or give --runtime "
                "local."
            )
        print(
            f"Ray's sockets go to {folder}: {usual} (RAY_TMPDIR, TMPDIR) is too long a name, not there, or not "
            "writable.",
            flush=True,
        )
        options["_temp_dir"] = str(folder)
    if sys.platform == "linux" and _free_shared_memory() < SHARED:
        options |= {"_plasma_directory": str(folder), "object_store_memory": OBJECTS}
    return options


def takes_sockets(folder: Path) -> bool:
    """Whether Ray can make its sockets there: makes one, with a name as long as Ray's."""
    if not folder.is_absolute():
        return False
    with contextlib.suppress(OSError, UnicodeError), contextlib.ExitStack() as stack:
        folder.mkdir(exist_ok=True)
        probe = Path(tempfile.mkdtemp(dir=folder, prefix="probe-"))
        stack.callback(shutil.rmtree, probe, ignore_errors=True)
        name = probe / ("s" * (len(SOCKET) - len(probe.name) - 1))
        stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(name))
        return True
    return False


def _others():
    """Folders with short names, of this user alone."""
    for base in ("/tmp", "/var/tmp"):
        folder = Path(base, f"ray-{os.getuid()}")
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()  # somebody else may have made it, or a link of that name
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                yield folder / "ray"  # Ray opens its own folder to everybody


def _free_shared_memory() -> int:
    """Free bytes of /dev/shm; 0 where there is none, or none that this process may use."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize if os.access("/dev/shm", os.W_OK | os.X_OK) else 0
