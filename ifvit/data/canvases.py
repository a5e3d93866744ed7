"""The cache of prints on their canvases: three files a database, each written whole or not at all.

    KEY.canvas.npy  (N, C, C) uint8, 500 ppi, ridges dark
    KEY.mask.npy    (N, C/8, C/8) bool, foreground
    KEY.json        what is known of each of the N prints; written last, its presence says that the rest is there

Files are written by plain writes: where a disk is full, a write says so. A file that is written through a
memory map ends the process (SIGBUS) instead.
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from ifvit.errors import UserError

MASK_CELL = 8  # canvas pixels a mask cell
ABANDONED = 24 * 3600  # seconds after which a part that nobody has finished is taken for a killed process's
log = logging.getLogger("ifvit")


class Files(NamedTuple):
    """Where the canvases of a database lie, and their masks."""

    canvases: str
    masks: str


def files(stem: Path) -> Files:
    return Files(f"{stem}.canvas.npy", f"{stem}.mask.npy")


def load(place: Files) -> tuple[UInt8[np.ndarray, "N C C"], Bool[np.ndarray, "N C/8 C/8"]]:
    """Both arrays, mapped from the disk."""
    return np.load(place.canvases, mmap_mode="r"), np.load(place.masks, mmap_mode="r")


def records(stem: Path, count: int, side: int) -> list[dict] | None:
    """What is known of each of `count` prints on canvases of `side` px; None unless all files are there and whole."""
    try:
        text = Path(f"{stem}.json").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as e:
        return _damaged(stem, str(e))
    try:
        found = json.loads(text)["prints"]
        if len(found) != count:
            return _damaged(stem, f"it tells of {len(found)} prints, not of {count}")
        for path, kind, shape in zip(files(stem), (np.uint8, bool), shapes(count, side)):
            array = np.load(path, mmap_mode="r")
            if array.dtype != kind or array.shape != shape or os.path.getsize(path) != array.offset + array.nbytes:
                return _damaged(stem, f"{path} holds something else")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:  # of json, and of NumPy for a file that is cut
        return _damaged(stem, str(e) or type(e).__name__)
    return found


def shapes(count: int, side: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of the canvases, and of the masks."""
    return (count, side, side), (count, side // MASK_CELL, side // MASK_CELL)


def write(stem: Path, count: int, side: int, rows: Iterable[tuple[np.ndarray, np.ndarray, dict]]) -> list[dict]:
    """Writes `count` rows (canvas, mask, what is known of the print), and returns what is known.

    Several processes may write the same at once: each has files of its own until they are whole.
    OSError where the disk is full or refuses.
    """
    mine, known = uuid.uuid4().hex, []
    parts = [Path(f"{path}.{mine}") for path in (*files(stem), f"{stem}.json")]
    try:
        with open(parts[0], "wb") as canvases, open(parts[1], "wb") as masks:
            for file, kind, shape in zip((canvases, masks), (np.uint8, bool), shapes(count, side)):
                np.lib.format.write_array_header_1_0(
                    file, {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
                )
            for canvas, mask, record in rows:
                canvases.write(np.ascontiguousarray(canvas).data)
                masks.write(np.ascontiguousarray(mask).data)
                known.append(record)
            _on_disk(canvases), _on_disk(masks)
        with open(parts[2], "w", encoding="utf-8") as file:
            json.dump({"prints": known}, file)
            _on_disk(file)
        for part, path in zip(parts, (*files(stem), f"{stem}.json")):
            os.replace(part, path)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return known


@contextlib.contextmanager
def writing_to(cache: Path, needed: int = 0) -> Iterator[None]:
    """Around what writes into the cache: makes the folder, and tells a disk that is full or refuses in one sentence.

    needed: bytes that will be written; where they are not free it says so at once.
    """
    remedy = "Set IFVIT_CACHE to a folder on a disk with room that can be written"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        usage = shutil.disk_usage(cache)
        if usage.total and usage.free < needed:  # some file systems tell nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"The cache {cache} cannot be made, a file is in the way. Set IFVIT_CACHE to a folder."
        ) from None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            size = f", and {math.ceil(needed / 1e6):,} MB are needed" if needed else ""
            full = f"The disk of the cache {cache} is full ({e.strerror}){size}"
            raise UserError(f"{full}. {remedy}, or free some.") from e
        if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG):
            raise
        raise UserError(f"The cache {cache} cannot be written ({e.strerror}). {remedy}.") from e


def remove_abandoned(folder: Path) -> None:
    """Parts of files that a process was killed over; those of processes at work are younger."""
    for part in folder.glob("*.*.*"):
        if part.suffix not in (".npy", ".json"):
            with contextlib.suppress(OSError):  # another process has removed it, or may not be disturbed
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()


def _damaged(stem: Path, why: str) -> None:
    log.warning("Prepared prints in the cache are damaged and are made again: %s (%s)", stem, why)


def _on_disk(file) -> None:
    """Returns when what was written is on the disk itself: some disks tell only now that they are full."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that know no fsync
            raise
