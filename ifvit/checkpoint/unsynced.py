"""Checkpoints on file systems that refuse to sync a folder (CIFS, shared folders of virtual machines, some FUSE).

TensorStore takes such a refusal for a failed write. It has a setting for that, `file_io_sync`, which Orbax's public
names do not pass on. So Orbax's defaults for TensorStore's contexts are changed while a checkpoint is written.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ifvit.files import to_disk


@contextlib.contextmanager
def synced_as_can_be(folder: Path) -> Iterator[bool]:
    """A block in which TensorStore syncs what it writes, unless the file system of `folder` refuses that.

    The block's value says whether it syncs.
    """
    try:
        syncs = to_disk(next(p for p in (folder, *folder.parents) if p.exists()))
    except OSError:  # then the write itself fails too, and reports it on every process
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
