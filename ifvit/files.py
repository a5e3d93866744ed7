"""Small files that are there whole or not at all, and what is on the disk itself."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from ifvit.errors import UserError

# Some file systems answer so because they cannot sync a folder, or need a handle that writes for it: CIFS, FUSE, 9p,
# shared folders of virtual machines. They still keep what was written as well as they can. Only EIO and ENOSPC say that
# it was not kept.
CANNOT_SYNC = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
}

# The longer marks first: UTF-32's begins with UTF-16's.
MARKS = (
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


@contextlib.contextmanager
def whole(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """A path beside `path` to write a file to; it becomes `path` when the block ends well, else nothing of it is left.

    `durable`: it is on the disk itself before it has its name, and the name is before this returns. Of files that
    can be made again that is not worth its time.
    """
    path = Path(path)
    part = path.with_name(f".part-{uuid.uuid4().hex}")  # in the same folder: the rename does not cross file systems
    try:
        yield part
        if durable:
            to_disk(part)
        os.replace(part, path)
        if durable:
            to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it has its name, or was never begun
            part.unlink()


def write_whole(path: str | os.PathLike, data: str | bytes, durable: bool = False) -> None:
    """A file with this content (text as UTF-8), there whole or not at all."""
    with whole(path, durable) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def to_disk(path: str | os.PathLike) -> bool:
    """Returns when a file's content, or a folder's names, are on the disk itself (fsync).

    False where the file system cannot tell.

    Raises OSError where they could not be written.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as e:
        if os.path.isdir(path) and e.errno in CANNOT_SYNC:
            return False
        raise
    try:
        os.fsync(handle)
        return True
    except OSError as e:
        if e.errno not in CANNOT_SYNC:
            raise
        return False
    finally:
        os.close(handle)


def read_text(path: str | os.PathLike, what: str) -> str:
    """A text file of a user's, in UTF-8 or whatever its encoding mark says, whatever the locale; lines end with \\n.

    UserError that names `what` and the line where it is no such text.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{what} {path} cannot be read ({e.strerror}); give one that this user may read.") from None
    mark, encoding = next(((m, e) for m, e in MARKS if data.startswith(m)), (b"", "utf-8"))
    data = data[len(mark) :]
    if encoding == "utf-8" and b"\0" in data:
        raise UserError(f"{what} {path} is not text in UTF-8, but perhaps in UTF-16 without a mark; save it in UTF-8.")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        line = data[: e.start].decode(encoding, "replace").count("\n") + 1
        raise UserError(f"{what} {path} is not text in UTF-8 (line {line}); save it in that encoding.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
