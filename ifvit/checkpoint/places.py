"""Where checkpoints lie and what they are called: local directories that get their names when they are whole, and buckets.

In a bucket nothing is renamed in one stroke. There a checkpoint has its name as long as it has the object `gcs.MARK`,
which is written last and deleted first; what lies below a name without it is what is left of an upload or a deletion.
"""

import contextlib
import fnmatch
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ifvit import gcs
from ifvit.errors import CheckpointNotFound, UserError
from ifvit.files import to_disk
from ifvit.paths import resolve

OLD = ".replaced"  # what a checkpoint that is being overwritten is called for a moment
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a directory that is being written


def as_path(path: str | Path) -> epath.Path:
    """A local path, absolute and after Kaggle's resolution, or a `gs://` URL; UserError for other URLs."""
    text = resolve(os.fspath(path))
    scheme, sep, _ = text.partition("://")
    if not sep:
        return epath.Path(os.path.abspath(text))
    if scheme != "gs":
        raise UserError(f"{text}: {scheme}:// is not supported; checkpoints are local directories or gs:// URLs.")
    return gcs.GcsPath(text)


def as_writable_path(path: str | Path) -> epath.Path:
    """The same for what is to be written."""
    found = as_path(path)
    for sign in "[\\":  # Orbax looks for its own files with glob, TensorStore takes a \ for a /
        if is_local(found) and sign in os.fspath(found):
            raise UserError(f"{found}: Orbax cannot write to a path with {sign} in it; give another directory.")
    return found


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def kvstore_of(folder: epath.Path, key: str = "") -> dict:
    """TensorStore's key-value store at a local directory or a gs:// URL."""
    return {"driver": "file", "path": f"{os.fspath(folder)}/{key}"} if is_local(folder) else folder.kvstore(key)


def locate(path: str | Path) -> epath.Path:
    """What a checkpoint path means: Kaggle's base, `.pkl` dropped, an interrupted replacement undone.

    A path to an existing `.pkl` file is returned as it is. UserError when nothing is there, and for
    URLs of other stores than `gs://`.
    """
    folder = as_path(path)
    if folder.suffix == ".pkl":
        if folder.exists() and not folder.is_dir():
            return folder
        folder = folder.with_suffix("")
    there = folder.is_dir()
    if not (there and has_name(folder)) and has_name(old(folder)):
        return old(folder)
    if not there:
        raise CheckpointNotFound(f"Checkpoint not found: {path}; give the path of a checkpoint directory.")
    return folder


def has_name(path: epath.Path) -> bool:
    """Whether a checkpoint has this name; one that is being written has not."""
    return path.is_dir() if is_local(path) else (path / gcs.MARK).is_file()


def old(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + OLD)


def replace(path: epath.Path, fresh: epath.Path) -> None:
    """Gives a whole checkpoint its name; one that has it already is there under `OLD` in between, then gone."""
    if path.exists():
        _delete(old(path))
        path.rename(old(path))
    fresh.rename(path)
    to_disk(path.parent)
    _delete(old(path))


def _delete(path: epath.Path) -> None:
    """A local folder, if it is there; of a link to one the link."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        path.rmtree(missing_ok=True)


def make_room(path: epath.Path) -> None:
    """In a bucket, before a checkpoint is written: one that has its name already is there under `OLD` from now on."""
    if has_name(path):
        old(path).rmtree(missing_ok=True)
        path.copy_tree(old(path))
    path.rmtree(missing_ok=True)


def upload(path: epath.Path, fresh: Path) -> None:
    """What this process has written of a checkpoint to a bucket; the first one's MARK is left out."""
    import jax

    files = [file.relative_to(fresh) for file in fresh.rglob("*") if file.is_file()]
    if jax.process_index():  # of the others the arrays' chunks, which lie below `c` (zarr 3): the rest all have alike
        files = [file for file in files if "c" in file.parts]
    path.upload(fresh, [file for file in files if file != Path(gcs.MARK)])


def finish(path: epath.Path, fresh: Path) -> None:
    """Gives a checkpoint that has been uploaded its name."""
    path.upload(fresh, [Path(gcs.MARK)])
    with contextlib.suppress(gcs.Refused):  # the new one is whole; the next of its name makes room
        old(path).rmtree(missing_ok=True)


def duplicate(source: epath.Path, path: epath.Path) -> None:
    """A copy of a checkpoint under another name, with files of its own; one of that name is replaced as by `save`."""
    if is_local(path):
        fresh = path.with_name(f"{path.name}{UNFINISHED}-copy")
        fresh.rmtree(missing_ok=True)
        _copy_tree(source, fresh)
        replace(path, fresh)
    elif is_local(source):
        make_room(path)
        upload(path, Path(source))
        finish(path, Path(source))
    else:
        make_room(path)
        source.copy_tree(path)
        old(path).rmtree(missing_ok=True)


def _copy_tree(source: epath.Path, target: epath.Path) -> None:
    """A copy of a folder, every file on disk before this returns."""
    target.mkdir(parents=True)
    for child in source.iterdir():
        if child.is_dir():
            _copy_tree(child, target / child.name)
        else:
            child.copy(target / child.name)
            to_disk(target / child.name)


def remove(path: epath.Path) -> None:
    """Takes the name away first: a half-deleted checkpoint does not look like one."""
    if not is_local(path):
        path.rmtree()
    elif path.exists():
        _delete(path.rename(path.with_name(f"{path.name}{UNFINISHED}-deleted")))


def discard_unfinished(folder: epath.Path, names: str) -> None:
    """Removes what dead or failed writes have left of the checkpoints that `names` (a pattern) tells."""
    import jax

    if jax.process_index() or not folder.is_dir():
        return
    if is_local(folder):
        left = folder.glob(f"{names}{UNFINISHED}*")
    else:
        left = [
            p
            for p in folder.iterdir()
            if fnmatch.fnmatch(p.name, names)
            and not has_name(p)
            and ((p / "state").is_dir() or (p / "metadata").is_dir())
        ]
    for path in left:
        with contextlib.suppress(OSError):  # it may still be written to; the next save tries again
            path.rmtree(missing_ok=True)


@contextlib.contextmanager
def written_here(path: epath.Path) -> Iterator[Path]:
    """Where a file or folder that shall lie at `path` is to be written: there, or where it is uploaded from at the end."""
    if is_local(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch) / path.name
        yield here
        path.parent.upload(here.parent, [p.relative_to(here.parent) for p in here.parent.rglob("*") if p.is_file()])
