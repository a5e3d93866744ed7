"""Checkpoints on file systems that refuse to sync a folder (CIFS, shared folders of virtual machines, some FUSE).

TensorStore takes the refusal for a write that failed, and its setting for it, `file_io_sync`, cannot be handed through
Orbax's public names. So Orbax's defaults for TensorStore's contexts are changed for as long as a checkpoint is written.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ifvit.files import to_disk


@contextlib.contextmanager
def synced_as_can_be(folder: Path) -> Iterator[bool]:
    """TensorStore syncs what it writes while this lasts, unless the file system of `folder` refuses to; whether it does."""
    try:
        syncs = to_disk(next(p for p in (folder, *folder.parents) if p.exists()))
    except OSError:  # the write itself will tell, and on every process
        syncs = True
    if syncs:
        yield True
        return
    from orbax.checkpoint._src.serialization import tensorstore_utils

    defaults = (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT)
    for table in defaults:
        table["file_io_sync"] = False
    try:
        yield False
    finally:
        for table in defaults:
            table.pop("file_io_sync", None)


def tree_to_disk(folder: Path) -> None:
    """Syncs every file below a folder, as far as its file system can."""
    for path in folder.rglob("*"):
        to_disk(path)
