"""Orbax's part of writing a checkpoint. It is imported when the first one is written: Orbax takes its time."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ifvit.checkpoint import digest
from ifvit.checkpoint.agreement import BARRIER_MS, agree
from ifvit.checkpoint.metadata import digest_of
from ifvit.devices.cores import cores
from ifvit.devices.processes import exchange
from ifvit.files import to_disk


def writer(size: int, largest: int, number: int, shared: bool = True) -> ocp.Checkpointer:
    """Orbax's writer for `size` bytes of arrays, the largest of which has `largest`.

    `shared`: the processes write to one folder.

    Small leaves are packed into few files (OCDBT); from about 256 MB on a file a leaf is faster (1.5 to
    2 times, measured at 1 GB). Weights do not compress. Few leaves are encoded at a time, so that their buffers are
    used again: memory that is touched for the first time costs as much as writing it to the disk. Barriers go through
    the coordination service, not the devices, which train meanwhile.
    """
    arrays = dict(
        use_ocdbt=size < 2**28 and shared,
        use_zarr3=True,
        use_compression=False,
        save_concurrent_gb=max(2**26, 2 * largest + 1) / 1e9,
    )  # a leaf has to fit in
    me = jax.process_index()
    processes = ocp.options.MultiprocessingOptions(
        primary_host=0 if shared else None,
        active_processes=set(range(jax.process_count())) if shared else {me},
        barrier_sync_key_prefix=f"save{number}" + ("" if shared else f"of{me}"),
    )
    return ocp.Checkpointer(
        Together(
            number,
            processes,
            metadata=MetadataHandler(),
            **{
                name: ocp.PyTreeCheckpointHandler(multiprocessing_options=processes, **arrays)
                for name in ("state", "aligner", "template")
            },
        ),
        multiprocessing_options=processes,
    )


class Together(ocp.CompositeCheckpointHandler):
    """What fails on one process fails on all, at once: else they would wait for each other at Orbax's barriers."""

    def __init__(
        self, number: int, processes: ocp.options.MultiprocessingOptions, metadata: "MetadataHandler", **items
    ):
        options = ocp.CompositeOptions(
            multiprocessing_options=processes,
            # told in the background, one process's folders would be taken for another's
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
                except Exception as e:  # the rest is still being written
                    failure = failure or e
            return failure

        try:
            failure = asyncio.run(write())
        except Exception as e:
            failure = e
        agree(f"save{self._number}/written", failure)
        self._metadata.exchange_sums(self._number)

    def finalize(self, directory) -> None:
        self._finalizing = True
        super().finalize(directory)

    def release(self) -> None:
        """Lets the processes pass that wait for the first one to finalize."""
        if self._finalizing:
            ocp.multihost.sync_global_processes(
                f"{self._processes.barrier_sync_key_prefix}_Checkpointer:finalize",
                processes=self._processes.active_processes,
            )


@ocp.args.register_with_handler(Together, for_save=True, for_restore=True)
class Parts(ocp.args.Composite):
    """Orbax's, for the handler above."""


@dataclass
class MetadataSave(ocp.args.CheckpointArgs):
    metadata: dict
    flat: dict  # leaf's name -> array


class MetadataHandler(ocp.AsyncCheckpointHandler):
    """The JSON item: every process adds up its own shards' digests and tells the others.

    `finalize` runs when all have written, and before the checkpoint gets its name.
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
    """Sums over the shards that this process writes: of what is replicated, one."""
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
