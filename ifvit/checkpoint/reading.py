"""Reads leaves with TensorStore. Every process reads what its devices need, and checks it against the digests."""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import tensorstore as ts
from etils import epath

from ifvit import gcs
from ifvit.checkpoint import digest, packed
from ifvit.checkpoint.metadata import FORBIDDEN, Damaged, check_access, first_line, is_forbidden
from ifvit.checkpoint.places import kvstore_of
from ifvit.devices.cores import cores
from ifvit.errors import UserError

if TYPE_CHECKING:
    import jax


def read_leaves(folder: epath.Path, metadata: dict, wanted: dict) -> dict:
    """Leaves by their names (`state/params/…`), checked against their digests.

    `wanted`: name -> None for a numpy array, a Sharding for a JAX array. UserError names what is damaged.
    """
    reader = _PackedReader(folder) if packed.is_packed(folder) else _Reader(folder)
    wrong: dict[str, str] = {}
    errors: list[Exception] = []
    out, sums = {}, {}

    def read(name):
        try:
            out[name], sums[name] = reader.read(
                name, wanted[name], checked=metadata["digests"].get(name, "") is not None
            )
        except Exception as e:  # TensorStore raises many kinds for a damaged file
            wrong[name] = FORBIDDEN if is_forbidden(e) else first_line(e)
            errors.append(e)

    with ThreadPoolExecutor(min(8, 2 * cores())) as pool:
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
        raise Damaged(
            f"Checkpoint {folder} is damaged: {len(wrong)} of {len(wanted)} leaves, e.g. {name} "
            f"({wrong[name]}); use another one."
        )
    return out


def shapes(folder: epath.Path, names: list[str]) -> dict[str, tuple[int, ...]]:
    """The leaves' shapes as they are stored; no array is read. Damaged where a leaf is missing."""
    try:
        if packed.is_packed(folder):
            return packed.read_shapes(folder, names)
        reader = _Reader(folder)
        return {n: tuple(reader.open(n).shape) for n in names}
    except Exception as e:
        check_access(folder, e)
        raise Damaged(f"Checkpoint {folder} is damaged ({first_line(e)}); use another one.") from e


class _Reader:
    """Reads leaves of Orbax checkpoints through TensorStore: OCDBT or one directory for each leaf, zarr 2 or 3."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        keep_index = {"cache_pool": {"total_bytes_limit": 100_000_000}}  # so that OCDBT's index is read only once
        self._context = ts.Context(keep_index | gcs.RETRIES)
        self._ocdbt = {}

    def open(self, name: str, checked: bool = True) -> ts.TensorStore:
        """A leaf's array. Without a digest (not `checked`) a missing chunk is an error; else it reads as zeros."""
        item, _, key = name.partition("/")
        base = self._folder / item
        if item not in self._ocdbt:
            self._ocdbt[item] = (base / "manifest.ocdbt").exists()
        key = key.replace("/", ".") + "/"
        kvstore = (
            {"driver": "ocdbt", "base": kvstore_of(base), "path": key} if self._ocdbt[item] else kvstore_of(base, key)
        )
        how = {"context": self._context, "open": True, "read": True}
        store = ts.open({"driver": "auto", "kvstore": kvstore}, **how).result()
        if checked:
            return store
        known = store.spec().to_json()
        return ts.open(
            {"driver": known["driver"], "kvstore": known["kvstore"], "fill_missing_data_reads": False}, **how
        ).result()

    def read(self, name: str, sharding, checked: bool) -> tuple["np.ndarray | jax.Array", digest.Sums]:
        """The leaf, and the sums over the part of it that this process has to check."""
        store = self.open(name, checked)
        if sharding is None:
            whole, done = _into_memory(store)
            done.result()
            return whole, digest.partial(whole, (0,) * whole.ndim)
        import jax

        owner: dict[tuple, jax.Device] = {}  # part -> the one device whose process checks it
        for device, index in sharding.devices_indices_map(store.shape).items():
            box = _box(index, store.shape)
            owner[box] = min(owner.get(box, device), device, key=lambda d: d.id)
        mine = {d: _box(i, store.shape) for d, i in sharding.addressable_devices_indices_map(store.shape).items()}
        pending = {box: _into_memory(store[tuple(slice(a, b) for a, b in box)]) for box in set(mine.values())}
        parts = {box: part for box, (part, done) in pending.items() if done.result() is None}
        sums = digest.add(
            (0, 0),
            *(
                digest.partial(part, tuple(a for a, _ in box))
                for box, part in parts.items()
                if owner[box].process_index == jax.process_index()
            ),
        )
        on_devices = [jax.device_put(parts[box], device) for device, box in mine.items()]
        return jax.make_array_from_single_device_arrays(store.shape, sharding, on_devices), sums


class _PackedReader:
    """Reads leaves of one packed file. They are small: every process reads and checks them whole."""

    def __init__(self, file: epath.Path):
        self._file = file

    def read(self, name: str, sharding, checked: bool) -> tuple["np.ndarray | jax.Array", digest.Sums]:
        """The leaf, and the sums over it, which of a leaf that is spread the first process alone tells."""
        whole = packed.read_arrays(self._file, [name])[name]
        sums = digest.partial(whole, (0,) * whole.ndim)
        if sharding is None:
            return whole, sums
        import jax

        return jax.device_put(whole, sharding), sums if jax.process_index() == 0 else (0, 0)


def _into_memory(store: ts.TensorStore) -> tuple[np.ndarray, ts.WriteFutures]:
    """An array that is being filled, and the future that tells when it is.

    It begins at a multiple of 64 bytes, so that JAX's CPU devices can use it without a copy.
    """
    dtype = store.dtype.numpy_dtype
    memory = np.empty(store.size * dtype.itemsize + 64, np.uint8)
    at = -memory.ctypes.data % 64
    array = memory[at : at + store.size * dtype.itemsize].view(dtype).reshape(store.shape)
    return array, ts.array(array).write(store)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(i.indices(n)[:2] for i, n in zip(index, shape))


def _over_processes(sums: list[digest.Sums]) -> list[digest.Sums]:
    """The sums added up over all processes; every process gets the same ones."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1 or not sums:
        return sums
    words = np.array(sums, np.uint64).view(np.uint32)  # JAX has no 64-bit integers by default
    every = np.asarray(multihost_utils.process_allgather(words)).view(np.uint64)
    return [tuple(map(int, pair)) for pair in every.sum(axis=0, dtype=np.uint64)]


def _joined(wrong: dict[str, str], names: list[str]) -> dict[str, str]:
    """Gives every process what any process found wrong, because all must then do the same."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return wrong
    kinds = np.array([0 if n not in wrong else 2 if wrong[n] == FORBIDDEN else 1 for n in names], np.uint8)
    worst = np.asarray(multihost_utils.process_allgather(kinds)).max(axis=0)
    return {
        n: wrong.get(n, FORBIDDEN if kind == 2 else "unreadable on another host")
        for n, kind in zip(names, worst)
        if kind
    }
