"""Checkpoints: Orbax directories that exist whole or not at all, every leaf with a digest.

A checkpoint holds `state` (params, batch_stats, opt_state, step), all nested dictionaries with
string keys, JSON `metadata`, and for a matcher `aligner` (Module 1's params and batch_stats).
Orbax writes them, every process its own shards, while training goes on; TensorStore reads them, every
process what its devices need, on any mesh, from a directory or a gs:// URL. Nothing is handed on before
its digests have been compared.

    python -m ifvit.checkpoint verify DIR           every leaf against its digest; DIR may be a whole run
    python -m ifvit.checkpoint inspect DIR          tree, shapes, types, shardings, sizes, metadata, history
    python -m ifvit.checkpoint diff A B             exit 0 where every leaf of `state` is equal to the bit
    python -m ifvit.checkpoint import FILE.pkl DIR  the legacy format, read without running anything in it
    python -m ifvit.checkpoint export DIR FILE.pkl
"""

import asyncio
import contextlib
import datetime
import errno
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from ifvit import cli, digest, gcs, legacy
from ifvit import checkpoint_places as places
from ifvit.checkpoint_places import OLD, UNFINISHED, as_path, as_writable_path, discard_unfinished, has_name, is_local, locate  # noqa: F401
from ifvit.errors import UserError
from ifvit.processes import exchange

NETWORK = ("state/params", "state/batch_stats", "aligner")  # what it takes to run a trained network
FORBIDDEN = "may not be read"
BARRIER_MS = 600_000  # that one process waits for the others' part of a checkpoint


@dataclass(frozen=True)
class Checkpoint:
    path: epath.Path
    state: dict     # nested dictionaries of arrays: numpy's, or JAX's on the devices asked for
    metadata: dict
    aligner: dict | None

    @property
    def module(self) -> str:
        """`dense_reg` or `matcher`."""
        return self.metadata["module"]


# ---- writing


def save(path: str | Path, module: str, state: dict, metadata: dict, aligner: dict | None = None) -> None:
    """Writes a checkpoint; one of the same name is replaced only when the new one is whole.

    Every process calls it, and writes its own shards; it may run in a thread beside the training, on
    a `snapshot` of the state. `metadata` has `epoch` and `config`; time, versions, shardings and digests
    are added. Raises whatever kept it from being written; then nothing of the new one is left, and the
    one from before has its name again, or in a bucket the name that `locate` finds it by.

    To a bucket a checkpoint goes through a temporary directory of every process (TMPDIR): Orbax writes the directory
    whole, as if each process were alone and with a file a leaf, and the files are uploaded. It can write arrays to
    gs:// itself, but all else by way of packages of Google's that we do without, and with nothing like MARK.
    """
    path = as_writable_path(path)
    trees = {"state": state} | ({"aligner": aligner} if aligner is not None else {})
    trees = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), trees)
    flat = leaves(trees)
    for x in flat.values():  # JAX makes the list of shards at the first call, and two threads may each add to it
        if isinstance(x, jax.Array):
            x.addressable_shards
    metadata = {
        "timestamp": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "versions": versions(),
        **metadata, "module": module,
        "shardings": {n: str(x.sharding.spec) for n, x in flat.items() if _is_sharded(x)},
    }
    first = jax.process_index() == 0
    number, failure = next(_saves), None
    items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
    sizes = [x.nbytes for x in flat.values()]
    with (_beside(path) as folder, _orbax(sum(sizes), max(sizes), number, is_local(path)) as writer):
        # a name of its own: what is left of a write that failed may still be written to
        fresh = folder / f"{path.name}{UNFINISHED}-{number}"
        try:
            if first:
                path.parent.mkdir(parents=True, exist_ok=True)
            writer.save(fresh, _Parts(metadata=MetadataSave(metadata, flat), **items), force=True)
            if first and is_local(path):
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


@contextlib.contextmanager
def _beside(path: epath.Path) -> Iterator[epath.Path]:
    """The folder that a checkpoint is written to before it has its name."""
    if is_local(path):
        yield path.parent
    else:
        with tempfile.TemporaryDirectory(prefix="ifvit-") as scratch:
            yield epath.Path(scratch)


def _upload(path: epath.Path, fresh: Path, number: int) -> None:
    """A checkpoint of which every process has its part in a local folder to a bucket."""
    first = jax.process_index() == 0
    for what, stage in (("room", lambda: first and places.make_room(path)), ("uploaded", lambda: places.upload(path, fresh)),
                        ("finished", lambda: first and places.finish(path, fresh))):
        failure = None
        try:
            stage()
        except Exception as e:
            failure = e
        _agree(f"save{number}/{what}", failure)


@jax.jit
def _copies(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(x) for x in arrays]


def snapshot(state: dict) -> dict:
    """A copy on the devices: the training step may donate the original while the copy is written.

    Without it the step could not donate: Orbax reads CPU arrays where they lie.
    """
    flat, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, _copies(flat))


_saves = itertools.count()  # all processes save the same in the same order


class _Together(ocp.CompositeCheckpointHandler):
    """What fails on one process fails on all, at once: else they would wait for each other at Orbax's barriers."""

    def __init__(self, number: int, processes: ocp.options.MultiprocessingOptions, metadata: "MetadataHandler", **items):
        super().__init__(composite_options=ocp.CompositeOptions(multiprocessing_options=processes), metadata=metadata, **items)
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
        _agree(f"save{self._number}/written", failure)
        self._metadata.exchange_sums(self._number)

    def finalize(self, directory) -> None:
        self._finalizing = True
        super().finalize(directory)

    def release(self) -> None:
        """Lets the processes pass that wait for the first one to finalize."""
        if self._finalizing:
            ocp.multihost.sync_global_processes(f"{self._processes.barrier_sync_key_prefix}_Checkpointer:finalize",
                                                processes=self._processes.active_processes)


@ocp.args.register_with_handler(_Together, for_save=True, for_restore=True)
class _Parts(ocp.args.Composite):
    """Orbax's, for the handler above."""


def _agree(what: str, failure: Exception | None) -> None:
    """Every process says how it went: raises `failure`, or OSError where another process has failed."""
    said = exchange(what, reason(failure) if failure else "", BARRIER_MS)
    if any(said) and not failure:
        raise OSError("; ".join(f"process {n}: {text}" for n, text in enumerate(said) if text))
    if failure:
        raise failure


def _orbax(size: int, largest: int, number: int, shared: bool = True) -> ocp.Checkpointer:
    """Orbax's writer for `size` bytes of arrays, the largest of which has `largest`, to a folder that the processes share or not.

    Small leaves are packed into few files (OCDBT); from about 256 MB on a file a leaf is faster (1.5 to
    2 times, measured at 1 GB). Weights do not compress. Few leaves are encoded at a time, so that their buffers are
    used again: memory that is touched for the first time costs as much as writing it to the disk. Barriers go through
    the coordination service, not the devices, which train meanwhile.
    """
    arrays = dict(use_ocdbt=size < 2**28 and shared, use_zarr3=True, use_compression=False,
                  save_concurrent_gb=max(2**26, 2 * largest + 1) / 1e9)  # a leaf has to fit in
    me = jax.process_index()
    processes = ocp.options.MultiprocessingOptions(
        primary_host=0 if shared else None, active_processes=set(range(jax.process_count())) if shared else {me},
        barrier_sync_key_prefix=f"save{number}" + ("" if shared else f"of{me}"))
    return ocp.Checkpointer(_Together(
        number, processes, metadata=MetadataHandler(),
        **{name: ocp.PyTreeCheckpointHandler(multiprocessing_options=processes, **arrays) for name in ("state", "aligner")},
    ), multiprocessing_options=processes)


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
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._sums = dict(zip(flat, pool.map(_own_sums, flat.values())))

    def exchange_sums(self, number: int) -> None:
        self._parts = list(map(json.loads, exchange(f"save{number}/sums", json.dumps(self._sums), BARRIER_MS)))

    def finalize(self, directory: epath.Path) -> None:
        digests = {n: digest.text(dtype, shape, digest.add(*(part[n] for part in self._parts)))
                   for n, (dtype, shape) in self._leaves.items()}
        metadata = self._metadata | {"digests": digests}
        metadata["digest"] = _digest_of_metadata(metadata)
        (directory / "metadata").write_text(json.dumps(metadata))
        places.to_disk(directory / "metadata")  # TensorStore does so with its own files

    def save(self, directory: epath.Path, args: MetadataSave) -> None:
        raise NotImplementedError("CompositeCheckpointHandler calls async_save")

    def restore(self, directory, *args, **kwargs):
        raise NotImplementedError("read by read_metadata")


ocp.args.register_with_handler(MetadataHandler, for_save=True, for_restore=True)(MetadataSave)


def _own_sums(x) -> digest.Sums:
    """Sums over the shards that this process writes: of what is replicated, one."""
    if not isinstance(x, jax.Array):
        return digest.partial(x, (0,) * x.ndim) if jax.process_index() == 0 else (0, 0)
    return digest.add((0, 0), *(digest.partial(np.asarray(s.data), tuple(i.start or 0 for i in s.index))
                                for s in x.addressable_shards if s.replica_id == 0))


# ---- reading


def load(path: str | Path, module: str | None = None, parts: tuple[str, ...] = ("",)) -> Checkpoint:
    """The checkpoint as numpy arrays on this host, every leaf checked; an existing `.pkl` file too.

    `parts` are the beginnings of the names of the leaves to read, e.g. NETWORK; of the others not a
    byte is read. UserError when it is missing, half-written, damaged, of another module than `module`, or not a
    checkpoint of IFViT.
    """
    folder = locate(path)
    if not folder.is_dir():
        found = from_legacy(folder)
        check_module(folder, found.metadata, module)
        return found
    metadata = read_metadata(folder)
    check_module(folder, metadata, module)
    return _as_checkpoint(folder, metadata, read_leaves(
        folder, metadata, {n: None for n in metadata["digests"] if n.startswith(parts)}))


def restore(folder: epath.Path, metadata: dict, shardings: dict) -> Checkpoint:
    """The checkpoint as JAX arrays; `state`'s leaves where `shardings` (a tree like it) puts them, `aligner` on the host.

    Every process calls it, and reads no more than its devices need. UserError as `load`, and of the same
    class on every process.
    """
    wanted = {n: None for n in metadata["digests"]} | leaves({"state": shardings})
    return _as_checkpoint(folder, metadata, read_leaves(folder, metadata, wanted))


def read_leaves(folder: epath.Path, metadata: dict, wanted: dict) -> dict:
    """Leaves by their names (`state/params/…`), checked against their digests.

    `wanted`: name -> None for a numpy array, a Sharding for a JAX array. UserError lists what is damaged.
    """
    reader = _Reader(folder)
    wrong: dict[str, str] = {}
    errors: list[Exception] = []
    out, sums = {}, {}

    def read(name):
        try:
            out[name], sums[name] = reader.read(name, wanted[name])
        except Exception as e:  # whatever TensorStore says of a damaged file
            wrong[name] = FORBIDDEN if _is_forbidden(e) else _first_line(e)
            errors.append(e)

    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        list(pool.map(read, wanted))
    spread = [n for n, sharding in wanted.items() if sharding is not None]
    sums |= dict(zip(spread, _over_processes([sums.get(n, (0, 0)) for n in spread])))
    for name in wanted.keys() - wrong.keys():
        expected = metadata["digests"].get(name, "")
        if expected is not None and digest.text(out[name].dtype, out[name].shape, sums[name]) != expected:
            wrong[name] = "does not have its digest"
    wrong = _joined(wrong, list(wanted)) if spread else wrong
    for e in errors:
        gcs.check_refusal(folder, e)
    if FORBIDDEN in wrong.values():
        raise UserError(f"Checkpoint {folder} {FORBIDDEN}; get the permission for it.")
    if wrong:
        name = min(wrong)
        raise Damaged(f"Checkpoint {folder} is damaged: {len(wrong)} of {len(wanted)} leaves, e.g. {name} "
                      f"({wrong[name]}); use another one.")
    return out


def shapes(folder: epath.Path, names: list[str]) -> dict[str, tuple[int, ...]]:
    """The leaves' shapes as they are stored; no array is read. Damaged where one is missing."""
    reader = _Reader(folder)
    try:
        return {n: tuple(reader.open(n).shape) for n in names}
    except Exception as e:
        _check_access(folder, e)
        raise Damaged(f"Checkpoint {folder} is damaged ({_first_line(e)}); use another one.") from e


class Damaged(UserError):
    """A checkpoint's content is not what was written."""


class _Reader:
    """Reads leaves of Orbax checkpoints (OCDBT or one directory a leaf, zarr 2 or 3) through TensorStore."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        keep_index = {"cache_pool": {"total_bytes_limit": 100_000_000}}  # OCDBT's, read once
        self._context = ts.Context(keep_index | gcs.RETRIES)
        self._ocdbt = {}

    def open(self, name: str) -> ts.TensorStore:
        item, _, key = name.partition("/")
        base = self._folder / item
        if item not in self._ocdbt:
            self._ocdbt[item] = (base / "manifest.ocdbt").exists()
        key = key.replace("/", ".") + "/"
        kvstore = {"driver": "ocdbt", "base": places.kvstore_of(base), "path": key} if self._ocdbt[item] else places.kvstore_of(base, key)
        return ts.open({"driver": "auto", "kvstore": kvstore}, context=self._context, open=True, read=True).result()

    def read(self, name: str, sharding) -> tuple[np.ndarray | jax.Array, digest.Sums]:
        """The leaf, and the sums of the part of it that this process answers for."""
        store = self.open(name)
        if sharding is None:
            whole, done = _into_memory(store)
            done.result()
            return whole, digest.partial(whole, (0,) * whole.ndim)
        owner: dict[tuple, jax.Device] = {}  # of each part, the device that answers for it
        for device, index in sharding.devices_indices_map(store.shape).items():
            box = _box(index, store.shape)
            owner[box] = min(owner.get(box, device), device, key=lambda d: d.id)
        mine = {d: _box(i, store.shape) for d, i in sharding.addressable_devices_indices_map(store.shape).items()}
        pending = {box: _into_memory(store[tuple(slice(a, b) for a, b in box)]) for box in set(mine.values())}
        parts = {box: part for box, (part, done) in pending.items() if done.result() is None}
        sums = digest.add((0, 0), *(digest.partial(part, tuple(a for a, _ in box)) for box, part in parts.items()
                                    if owner[box].process_index == jax.process_index()))
        on_devices = [jax.device_put(parts[box], device) for device, box in mine.items()]
        return jax.make_array_from_single_device_arrays(store.shape, sharding, on_devices), sums


def _into_memory(store: ts.TensorStore) -> tuple[np.ndarray, ts.WriteFutures]:
    """An array that is being filled, and when it is: at a boundary of 64 bytes, where JAX's CPU devices use it as it lies."""
    dtype = store.dtype.numpy_dtype
    memory = np.empty(store.size * dtype.itemsize + 64, np.uint8)
    at = -memory.ctypes.data % 64
    array = memory[at : at + store.size * dtype.itemsize].view(dtype).reshape(store.shape)
    return array, ts.array(array).write(store)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(i.indices(n)[:2] for i, n in zip(index, shape))


def _over_processes(sums: list[digest.Sums]) -> list[digest.Sums]:
    """Sums added over all processes; every process gets the same."""
    if jax.process_count() == 1 or not sums:
        return sums
    words = np.array(sums, np.uint64).view(np.uint32)  # JAX has no 64-bit integers by default
    every = np.asarray(multihost_utils.process_allgather(words)).view(np.uint64)
    return [tuple(map(int, pair)) for pair in every.sum(axis=0, dtype=np.uint64)]


def _joined(wrong: dict[str, str], names: list[str]) -> dict[str, str]:
    """What any process found wrong, on every process: they must agree on what to do."""
    if jax.process_count() == 1:
        return wrong
    kinds = np.array([0 if n not in wrong else 2 if wrong[n] == FORBIDDEN else 1 for n in names], np.uint8)
    worst = np.asarray(multihost_utils.process_allgather(kinds)).max(axis=0)
    return {n: wrong.get(n, FORBIDDEN if kind == 2 else "unreadable on another host")
            for n, kind in zip(names, worst) if kind}


def read_metadata(folder: epath.Path) -> dict:
    """The JSON metadata; UserError where there is none, as in a half-written checkpoint."""
    try:
        metadata = json.loads((folder / "metadata" / "metadata").read_text())
        if not (folder / "state").is_dir() or not {"config"} <= set(metadata):
            raise KeyError("state or config")
        if "digest" not in metadata and "digests" not in metadata:
            metadata = _of_other_software(folder, metadata)
        elif metadata["digest"] != _digest_of_metadata(metadata):
            raise ValueError("its metadata do not have their digest")
    except Exception as e:
        _check_access(folder, e)
        raise Damaged(f"{folder} is not a whole checkpoint (metadata/metadata: {_first_line(e)}); it is half-written or something else: "
                      "use another one.") from e
    return metadata


def _check_access(folder: epath.Path, e: Exception) -> None:
    """What may not be read, or not now, is not damaged."""
    gcs.check_refusal(folder, e)
    if _is_forbidden(e):
        raise UserError(f"Checkpoint {folder} {FORBIDDEN}; get the permission for it.") from None


def _is_forbidden(e: Exception) -> bool:
    return isinstance(e, PermissionError) or "PERMISSION_DENIED" in str(e) or gcs.is_refusal(e)


def complete(folder: epath.Path) -> bool:
    """Whether a directory bears a whole checkpoint, as far as its metadata tells."""
    try:
        read_metadata(folder)
    except UserError:
        return False
    return True


def check_module(folder, metadata: dict, module: str | None) -> None:
    if module and metadata["module"] != module:
        kinds = {"dense_reg": "Module 1 (dense registration)", "matcher": "Module 2 (matcher)"}
        raise UserError(f"{folder} is a checkpoint of {kinds.get(metadata['module'], metadata['module'])}, not of "
                        f"{kinds[module]}; give the path of one of those.")


def _as_checkpoint(folder: epath.Path, metadata: dict, flat: dict) -> Checkpoint:
    trees = nested(flat)
    state = {"params": {}, "batch_stats": {}, "opt_state": {}} | trees.get("state", {})
    return Checkpoint(folder, state, metadata, trees.get("aligner"))


def _of_other_software(folder: epath.Path, metadata: dict) -> dict:
    """Orbax's own writers leave no digests: the names of the leaves come from Orbax, and nothing can be checked."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(folder / "state").tree
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path({"state": tree})[0]]
    names = ["/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path in paths]  # optax has tuples
    config = metadata["config"]
    foreign = {} if isinstance(config, dict) and "resnet_widths" in config else {"foreign": True}
    module = "matcher" if any("_transformer_global/" in n for n in names) else "dense_reg"
    print(f"⚠ {folder} has no digests (other software wrote it): its content cannot be checked.", flush=True)
    return {"module": module, "epoch": 0, "step": 0, "finished": False, "best": None, "history": []} | metadata | foreign | {
        "digests": dict.fromkeys(names)}


def from_legacy(file: epath.Path) -> Checkpoint:
    """A pickle of the legacy format as a checkpoint. UserError where anything in it is refused.

    `foreign` in the metadata: it is not of this project's networks, and serves to seed Module 2 alone.
    """
    found = legacy.read(file)
    state = {"params": {}, "batch_stats": {}, "opt_state": {}, "step": np.int32(0)} | found.state
    aligner = state.pop("aligner", None)
    params = state["params"]
    names = {n for n in (*params, *(m for p in params.values() if isinstance(p, dict) for m in p))}
    module = "matcher" if any(n.endswith("_transformer_global") for n in names) else "dense_reg"
    config = found.metadata.get("config")
    ours = isinstance(config, dict) and "resnet_widths" in config and "module" in found.metadata
    metadata = {"module": module, "epoch": 0, "step": int(state["step"]), "finished": False, "best": None, "value": None,
                "history": [], "config": {}, "data": ""} | found.metadata
    if found.timestamp:
        metadata["timestamp"] = found.timestamp
    return Checkpoint(file, state, metadata if ours else metadata | {"foreign": True}, aligner)


def check_ours(folder, metadata: dict) -> None:
    """UserError for a checkpoint of other code, which can seed Module 2 and do nothing else here."""
    if metadata.get("foreign"):
        raise UserError(f"{folder} was made by other code: its transformer can seed Module 2 (--pretrained_ckpt), the rest "
                        "is not of this project's networks. Give a checkpoint that was trained here.")


def leaves(tree: dict) -> dict:
    """Flat view of nested dictionaries: `params/resnet/stem/conv/kernel` -> leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in flat}


def nested(flat: dict) -> dict:
    """The inverse of `leaves`."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for p in parents:
            node = node.setdefault(p, {})
        node[last] = leaf
    return tree


def versions() -> dict[str, str]:
    return {p: packages.version(p) for p in ("ifvit", "jax", "flax", "optax", "orbax-checkpoint")}


def kind(dtype, shape: tuple[int, ...]) -> str:
    """Type and shape as a digest begins with them: `float32[3,4]`."""
    return digest.text(dtype, shape, (0, 0)).split(":")[0]


def _is_sharded(x) -> bool:
    return isinstance(x, jax.Array) and not x.sharding.is_fully_replicated


def _digest_of_metadata(metadata: dict) -> str:
    rest = {k: v for k, v in metadata.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:32]


def reason(e: BaseException) -> str:
    """Why a write failed, in a few words."""
    if isinstance(e, gcs.Refused):
        return e.strerror
    text = f"{e} {e.__cause__ or ''}"
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO):
        if os.strerror(number) in text or getattr(e, "errno", None) == number:
            return os.strerror(number)
    return _first_line(e)


def _first_line(e: Exception) -> str:
    text = str(e).strip().splitlines()
    return (text[0] if text else type(e).__name__)[:160]


def difference(a: dict, b: dict) -> dict[str, str]:
    """Leaves that are not equal to the bit -> how they differ."""
    a, b = ({n: np.asarray(x) for n, x in leaves(tree).items()} for tree in (a, b))
    out = {n: "only in the first" for n in a.keys() - b.keys()} | {n: "only in the second" for n in b.keys() - a.keys()}
    for n in a.keys() & b.keys():
        if a[n].shape != b[n].shape or a[n].dtype != b[n].dtype:
            out[n] = f"{a[n].dtype}{list(a[n].shape)} against {b[n].dtype}{list(b[n].shape)}"
        elif a[n].tobytes() != b[n].tobytes():
            with np.errstate(invalid="ignore"):
                gap = np.abs(a[n].astype(np.float64) - b[n].astype(np.float64))
            out[n] = f"{(gap > 0).sum()} of {gap.size} elements, at most {gap.max():.3g}"
    return dict(sorted(out.items()))


if __name__ == "__main__":
    from ifvit.checkpoint_commands import COMMANDS

    sys.exit(cli.main_with_commands(COMMANDS, "ifvit.checkpoint"))
