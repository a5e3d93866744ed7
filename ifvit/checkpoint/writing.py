"""Writes checkpoints with Orbax, whole or not at all. Every process writes its own shards."""

import asyncio
import contextlib
import datetime
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ifvit.checkpoint import digest, places
from ifvit.checkpoint.metadata import digest_of, reason, versions
from ifvit.checkpoint.places import UNFINISHED, as_writable_path, discard_unfinished, is_local
from ifvit.checkpoint.tree import leaves
from ifvit.checkpoint.unsynced import synced_as_can_be, tree_to_disk
from ifvit.devices.cores import cores
from ifvit.devices.processes import exchange
from ifvit.files import to_disk

BARRIER_MS = 600_000  # how long a process waits for the others' part of a checkpoint

_saves = itertools.count()  # numbers the saves; all processes save the same in the same order


def save(path: str | os.PathLike, module: str, state: dict, metadata: dict, aligner: dict | None = None) -> None:
    """Writes a checkpoint. One of the same name is replaced only when the new one is whole.

    Every process calls it, and writes its own shards. It may run in a thread beside the training, on a `snapshot` of
    the state. `metadata` has `epoch` and `config`; time, versions, shardings and digests are added. When the write
    fails it raises the cause. Then nothing of the new checkpoint is left, and the old one has its name again, or in a
    bucket a name under which `locate` finds it.

    A checkpoint for a bucket is first written to a temporary directory of every process (TMPDIR). There Orbax writes as
    if each process were alone, with one file for each leaf; then the files are uploaded. Orbax could write arrays to
    gs:// itself. It would need more of Google's packages for all else, and it has nothing like MARK.
    """
    path = as_writable_path(path)
    trees = {"state": state} | ({"aligner": aligner} if aligner is not None else {})
    trees = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), trees)
    flat = leaves(trees)
    for x in flat.values():  # JAX makes the list of shards at the first call, which is not safe in two threads at once
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
        _orbax(sum(sizes), max(sizes), number, is_local(path)) as writer,
    ):
        # Each save has a name of its own, because a write that failed may still go on under its name.
        fresh = folder / f"{path.name}{UNFINISHED}-{number}"
        try:
            if first:
                path.parent.mkdir(parents=True, exist_ok=True)
            writer.save(fresh, _Parts(metadata=MetadataSave(metadata, flat), **items), force=True)
            if first and is_local(path):
                if not synced:
                    tree_to_disk(Path(fresh))
                places.replace(path, fresh)
        except Exception as e:
            failure = e
            writer.handler.release()
        try:
            _agree(f"save{number}/named", failure)
            if not is_local(path):
                _upload(path, Path(fresh), number)
        except Exception:
            discard_unfinished(path.parent, path.name)
            raise


def snapshot(state: dict) -> dict:
    """A copy of the state on the devices, to be written while the training step already donates the original.

    The copy is needed because Orbax reads CPU arrays in place.
    """
    flat, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, _copies(flat))


@jax.jit
def _copies(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(x) for x in arrays]


@contextlib.contextmanager
def _beside(path: epath.Path) -> Iterator[epath.Path]:
    """The folder that a checkpoint is written to before it has its name."""
    if is_local(path):
        yield path.parent
    else:
        with tempfile.TemporaryDirectory(prefix="ifvit-") as scratch:
            yield epath.Path(scratch)


def _upload(path: epath.Path, fresh: Path, number: int) -> None:
    """Uploads a checkpoint to a bucket; every process has its part of it in a local folder."""
    first = jax.process_index() == 0
    for what, stage in (
        ("room", lambda: first and places.make_room(path)),
        ("uploaded", lambda: places.upload(path, fresh)),
        ("finished", lambda: first and places.finish(path, fresh)),
    ):
        failure = None
        try:
            stage()
        except Exception as e:
            failure = e
        _agree(f"save{number}/{what}", failure)


class _Together(ocp.CompositeCheckpointHandler):
    """Makes a failure on one process fail all processes at once, which would wait at Orbax's barriers otherwise."""

    def __init__(
        self, number: int, processes: ocp.options.MultiprocessingOptions, metadata: "MetadataHandler", **items
    ):
        # Orbax shall not announce its directories in the background: one process's could be taken for another's.
        options = ocp.CompositeOptions(
            multiprocessing_options=processes,
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        super().__init__(composite_options=options, metadata=metadata, **items)
        self._number, self._processes, self._metadata, self._finalizing = number, processes, metadata, False

    def save(self, *args, **kwargs) -> None:
        async def write():
            failure = None
            for written in await self.async_save(*args, **kwargs):
                try:
                    written.result()
                except Exception as e:  # raised later, because the rest is still being written
                    failure = failure or e
            return failure

        try:
            failure = asyncio.run(write())
        except Exception as e:
            failure = e
        _agree(f"save{self._number}/written", failure)
        self._metadata.exchange_sums(self._number)

    def finalize(self, directory) -> None:
        self._finalizing = True
        super().finalize(directory)

    def release(self) -> None:
        """Lets those processes go on that wait for the first one to finalize."""
        if self._finalizing:
            ocp.multihost.sync_global_processes(
                f"{self._processes.barrier_sync_key_prefix}_Checkpointer:finalize",
                processes=self._processes.active_processes,
            )


@ocp.args.register_with_handler(_Together, for_save=True, for_restore=True)
class _Parts(ocp.args.Composite):
    """Orbax's arguments for the handler above."""


def _agree(what: str, failure: Exception | None) -> None:
    """Tells the other processes how this one's part went. Raises `failure`, or OSError where another one has failed."""
    said = exchange(what, reason(failure) if failure else "", BARRIER_MS)
    if any(said) and not failure:
        raise OSError("; ".join(f"process {n}: {text}" for n, text in enumerate(said) if text))
    if failure:
        raise failure


def _orbax(size: int, largest: int, number: int, shared: bool = True) -> ocp.Checkpointer:
    """Orbax's writer for `size` bytes of arrays, of which the largest has `largest` bytes.

    `shared`: whether all processes write to the same folder. Small leaves are packed into few files (OCDBT). From about
    256 MB on one file for each leaf is faster (1.5 to 2 times, measured at 1 GB). Weights do not compress. Few leaves
    are encoded at a time, so that their buffers are used again: touching new memory costs as much as writing it to the
    disk. Barriers use the coordination service, because the devices train meanwhile.
    """
    arrays = dict(
        use_ocdbt=size < 2**28 and shared,
        use_zarr3=True,
        use_compression=False,
        save_concurrent_gb=max(2**26, 2 * largest + 1) / 1e9,  # the largest leaf has to fit into it
    )
    me = jax.process_index()
    processes = ocp.options.MultiprocessingOptions(
        primary_host=0 if shared else None,
        active_processes=set(range(jax.process_count())) if shared else {me},
        barrier_sync_key_prefix=f"save{number}" + ("" if shared else f"of{me}"),
    )
    return ocp.Checkpointer(
        _Together(
            number,
            processes,
            metadata=MetadataHandler(),
            **{
                name: ocp.PyTreeCheckpointHandler(multiprocessing_options=processes, **arrays)
                for name in ("state", "aligner")
            },
        ),
        multiprocessing_options=processes,
    )


@dataclass
class MetadataSave(ocp.args.CheckpointArgs):
    metadata: dict
    flat: dict  # leaf's name -> array


class MetadataHandler(ocp.AsyncCheckpointHandler):
    """Writes the JSON metadata. Every process adds up the digests of its own shards and tells the others.

    `finalize` runs when all processes have written, and before the checkpoint gets its name.
    """

    async def async_save(self, directory: epath.Path, args: MetadataSave):
        self._metadata = args.metadata
        self._leaves = {n: (x.dtype, x.shape) for n, x in args.flat.items()}
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write_part(args.flat))]

    async def _write_part(self, flat: dict) -> None:
        with ThreadPoolExecutor(cores()) as pool:
            self._sums = dict(zip(flat, pool.map(_own_sums, flat.values())))

    def exchange_sums(self, number: int) -> None:
        self._parts = list(map(json.loads, exchange(f"save{number}/sums", json.dumps(self._sums), BARRIER_MS)))

    def finalize(self, directory: epath.Path) -> None:
        digests = {
            n: digest.text(dtype, shape, digest.add(*(tuple(part[n]) for part in self._parts)))
            for n, (dtype, shape) in self._leaves.items()
        }
        metadata = self._metadata | {"digests": digests}
        metadata["digest"] = digest_of(metadata)
        (directory / "metadata").write_text(json.dumps(metadata), encoding="utf-8")
        to_disk(directory / "metadata")  # TensorStore does so with its own files

    def save(self, directory: epath.Path, args: MetadataSave) -> None:
        raise NotImplementedError("CompositeCheckpointHandler calls async_save")

    def restore(self, directory, *args, **kwargs):
        raise NotImplementedError("read by read_metadata")


ocp.args.register_with_handler(MetadataHandler, for_save=True, for_restore=True)(MetadataSave)


def _own_sums(x) -> digest.Sums:
    """The sums over the shards that this process writes; of a replicated array only one process writes a shard."""
    if not isinstance(x, jax.Array):
        return digest.partial(x, (0,) * x.ndim) if jax.process_index() == 0 else (0, 0)
    return digest.add(
        (0, 0),
        *(
            digest.partial(np.asarray(s.data), tuple(i.start or 0 for i in s.index))
            for s in x.addressable_shards
            if s.replica_id == 0
        ),
    )


def _is_sharded(x) -> bool:
    return isinstance(x, jax.Array) and not x.sharding.is_fully_replicated
