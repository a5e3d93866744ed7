"""Where checkpoints lie and what they are called, in local directories and in buckets.

A local directory gets its name when it is whole. A bucket cannot rename a folder in one step. There a checkpoint counts
as named while it has the object `gcs.MARK`, which is written last and deleted first. Objects below a name without
`gcs.MARK` are left over from an upload or a deletion.
"""

import contextlib
import fnmatch
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from etils import epath

from ifvit import gcs
from ifvit.checkpoint import packed
from ifvit.errors import CheckpointNotFound, UserError
from ifvit.files import to_disk
from ifvit.paths import resolve

OLD = ".replaced"  # the end of a checkpoint's name while a new one takes its place
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a directory that is being written


def as_path(path: str | os.PathLike) -> epath.Path:
    """A local path, absolute and after Kaggle's resolution, or a `gs://` URL; UserError for other URLs."""
    text = resolve(os.fspath(path))
    scheme, sep, _ = text.partition("://")
    if not sep:
        return epath.Path(os.path.abspath(text))
    if scheme != "gs":
        raise UserError(f"{text}: {scheme}:// is not supported; checkpoints are local directories or gs:// URLs.")
    return gcs.GcsPath(text)


def as_writable_path(path: str | os.PathLike) -> epath.Path:
    """Like `as_path`, for a path that will be written to."""
    found = as_path(path)
    for sign in "[\\":  # Orbax finds its own files with glob; TensorStore reads a \ as a /
        if is_local(found) and sign in os.fspath(found):
            raise UserError(f"{found}: Orbax cannot write to a path with {sign} in it; give another directory.")
    return found


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def kvstore_of(folder: epath.Path, key: str = "") -> dict:
    """TensorStore's key-value store at a local directory or a gs:// URL."""
    return {"driver": "file", "path": f"{os.fspath(folder)}/{key}"} if is_local(folder) else folder.kvstore(key)


def locate(path: str | os.PathLike) -> epath.Path:
    """The folder that a checkpoint's path means: relative to Kaggle's base on Kaggle, and without `.pkl`.

    Where a replacement was interrupted it is the old checkpoint. A path to an existing `.pkl` or packed file is
    returned as it is, and `pretrained` is the package's. UserError when nothing is there, and for URLs of other stores
    than `gs://`.
    """
    if os.fspath(path) == packed.PRETRAINED:
        if not packed.packaged().is_file():
            raise CheckpointNotFound(
                f"This installation has no packaged weights ({packed.packaged()} is missing); install the package "
                "anew, or give the path of a checkpoint."
            )
        return packed.packaged()
    folder = as_path(path)
    if is_local(folder) and folder.suffix == packed.SUFFIX and folder.is_file():
        return folder
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


def is_pickle(path: epath.Path) -> bool:
    """Whether a path that `locate` has found is a pickle of the legacy format."""
    return not (path.is_dir() or packed.is_packed(path))


def has_name(path: epath.Path) -> bool:
    """Whether a checkpoint has this name. One that is being written does not have it yet."""
    return path.is_dir() if is_local(path) else (path / gcs.MARK).is_file()


def old(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + OLD)


def replace(path: epath.Path, fresh: epath.Path) -> None:
    """Gives the whole checkpoint `fresh` the name `path`.

    A checkpoint that has this name already gets the name `OLD` first, and is deleted at the end.
    """
    if path.exists():
        _delete(old(path))
        path.rename(old(path))
    fresh.rename(path)
    to_disk(path.parent)
    _delete(old(path))


def _delete(path: epath.Path) -> None:
    """Deletes a local folder, if it is there. Of a link to a folder it deletes only the link."""
    if os.path.islink(path):
        os.unlink(path)
    else:
        path.rmtree(missing_ok=True)


def make_room(path: epath.Path) -> None:
    """Clears a name in a bucket before a checkpoint is written; one that has it already is copied to `OLD` first."""
    if has_name(path):
        old(path).rmtree(missing_ok=True)
        path.copy_tree(old(path))
    path.rmtree(missing_ok=True)


def upload(path: epath.Path, fresh: Path) -> None:
    """Uploads this process's part of a checkpoint to a bucket, without MARK."""
    import jax

    files = [file.relative_to(fresh) for file in fresh.rglob("*") if file.is_file()]
    # Only chunks of arrays differ between the processes; they lie below `c` (zarr 3). The first one uploads the rest.
    if jax.process_index():
        files = [file for file in files if "c" in file.parts]
    path.upload(fresh, [file for file in files if file != Path(gcs.MARK)])


def finish(path: epath.Path, fresh: Path) -> None:
    """Gives an uploaded checkpoint its name."""
    path.upload(fresh, [Path(gcs.MARK)])
    with contextlib.suppress(gcs.Refused):  # the new one is whole; the next save to this name deletes the old one
        old(path).rmtree(missing_ok=True)


def duplicate(source: epath.Path, path: epath.Path) -> None:
    """Copies a checkpoint to another name, with files of its own. One that has this name is replaced as in `save`."""
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
    """Copies a folder. Every file is on the disk when this returns."""
    target.mkdir(parents=True)
    for child in source.iterdir():
        if child.is_dir():
            _copy_tree(child, target / child.name)
        else:
            child.copy(target / child.name)
            to_disk(target / child.name)


def remove(path: epath.Path) -> None:
    """Deletes a checkpoint. First it takes the name away, so that a half-deleted one does not look whole."""
    if not is_local(path):
        path.rmtree()
    elif path.exists():
        _delete(path.rename(path.with_name(f"{path.name}{UNFINISHED}-deleted")))


def discard_unfinished(folder: epath.Path, names: str) -> None:
    """Removes what dead or failed writes have left of checkpoints whose names match the pattern `names`."""
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
    discard(left)


def discard(left: Iterable[epath.Path]) -> None:
    """Removes folders of unfinished writes."""
    for path in left:
        with contextlib.suppress(OSError):  # something may still write to it; the next save tries again
            path.rmtree(missing_ok=True)


@contextlib.contextmanager
def written_here(path: epath.Path) -> Iterator[Path]:
    """A local path to write a file or folder for `path`. For a bucket it is temporary, and uploaded at the end."""
    if is_local(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch) / path.name
        yield here
        path.parent.upload(here.parent, [p.relative_to(here.parent) for p in here.parent.rglob("*") if p.is_file()])
