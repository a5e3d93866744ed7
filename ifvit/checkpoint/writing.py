"""Writing checkpoints: Orbax, every process its own shards, whole or not at all."""

import contextlib
import datetime
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from ifvit.checkpoint import places
from ifvit.checkpoint.agreement import agree
from ifvit.checkpoint.metadata import versions
from ifvit.checkpoint.places import UNFINISHED, as_writable_path, discard_unfinished, is_local
from ifvit.checkpoint.tree import leaves
from ifvit.checkpoint.unsynced import synced_as_can_be, tree_to_disk

_saves = itertools.count()  # all processes save the same in the same order


def save(
    path: str | os.PathLike,
    module: str,
    state: dict,
    metadata: dict,
    aligner: dict | None = None,
    template: dict | None = None,
    before_named: Callable[[], object] = lambda: None,
) -> None:
    """Writes a checkpoint; one of the same name is replaced only when the new one is whole.

    Every process calls it, and writes its own shards; it may run in a thread beside the training, on
    a `snapshot` of the state. `metadata` has `epoch` and `config`; time, versions, shardings and digests
    are added. `before_named`: what the first process does when all is written, right before the checkpoint has its
    name. Raises whatever kept it from being written; then nothing of the new one is left, and the
    one from before has its name again, or in a bucket the name that `locate` finds it by.

    To a bucket a checkpoint goes through a temporary directory of every process (TMPDIR): Orbax writes the directory
    whole, as if each process were alone and with a file a leaf, and the files are uploaded. It can write arrays to
    gs:// itself, but all else by way of packages of Google's that we do without, and with nothing like MARK.
    """
    import jax
    import orbax.checkpoint as ocp

    from ifvit.checkpoint import handlers

    path = as_writable_path(path)
    trees = {"state": state, "aligner": aligner, "template": template}
    trees = {name: tree for name, tree in trees.items() if tree is not None}
    trees = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), trees)
    flat = leaves(trees)
    for x in flat.values():  # JAX makes the list of shards at the first call, and two threads may each add to it
        if isinstance(x, jax.Array):
            _ = x.addressable_shards
    metadata = {
        "timestamp": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
        **metadata,
        "module": module,
        "shardings": {n: str(x.sharding.spec) for n, x in flat.items() if _is_sharded(x)},
    }
    first = jax.process_index() == 0
    number, failure = next(_saves), None
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
    sizes = [x.nbytes for x in flat.values()]
    with (
        _beside(path) as folder,
        synced_as_can_be(Path(folder)) as synced,
        handlers.writer(sum(sizes), max(sizes), number, is_local(path)) as writer,
    ):
        # a name of its own: what is left of a write that failed may still be written to
        fresh = folder / f"{path.name}{UNFINISHED}-{number}"
        try:
            if first:
                path.parent.mkdir(parents=True, exist_ok=True)
            writer.save(fresh, handlers.Parts(metadata=handlers.MetadataSave(metadata, flat), **items), force=True)
            if first and is_local(path):
                if not synced:
                    tree_to_disk(Path(fresh))
                before_named()
                places.replace(path, fresh)
        except Exception as e:
            failure = e
            writer.handler.release()
        try:
            agree(f"save{number}/named", failure)
            if not is_local(path):
                _upload(path, Path(fresh), number, before_named)
        except Exception:
            if first and is_local(path):  # no other run's: one that has begun meanwhile may be writing under this name
                places.discard(path.parent.glob(f"{fresh.name}*"))
            else:
                discard_unfinished(path.parent, path.name)
            raise


def snapshot(state: dict) -> dict:
    """A copy on the devices: the training step may donate the original while the copy is written.

    Without it the step could not donate: Orbax reads CPU arrays where they lie.
    """
    import jax

    flat, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, _copier()(flat))


@functools.cache
def _copier() -> Callable:
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda arrays: [jnp.copy(x) for x in arrays])


@contextlib.contextmanager
def _beside(path: epath.Path) -> Iterator[epath.Path]:
    """The folder that a checkpoint is written to before it has its name."""
    if is_local(path):
        yield path.parent
    else:
        with tempfile.TemporaryDirectory(prefix="ifvit-") as scratch:
            yield epath.Path(scratch)


def _upload(path: epath.Path, fresh: Path, number: int, before_named: Callable[[], object]) -> None:
    """A checkpoint of which every process has its part in a local folder to a bucket."""
    import jax

    first = jax.process_index() == 0
    for what, stage in (
        ("room", lambda: first and places.make_room(path)),
        ("uploaded", lambda: places.upload(path, fresh)),
        ("checked", lambda: first and before_named()),
        ("finished", lambda: first and places.finish(path, fresh)),
    ):
        failure = None
        try:
            stage()
        except Exception as e:
            failure = e
        agree(f"save{number}/{what}", failure)


def _is_sharded(x) -> bool:
    import jax

    return isinstance(x, jax.Array) and not x.sharding.is_fully_replicated
