"""Checkpoints: Orbax directories that exist whole or not at all, every leaf with a digest.

A checkpoint holds `state` (params, batch_stats, opt_state, step), all nested dictionaries with
string keys, JSON `metadata`, and for a matcher `aligner` (Module 1's params and batch_stats).
Orbax writes them, every process its own shards, while training goes on (`checkpoint_writing`); TensorStore
reads them, every process what its devices need, on any mesh (`checkpoint_reading`); they lie in directories or
in buckets, gs:// URLs (`checkpoint_places`). Nothing is handed on before its digests have been compared.

    python -m ifvit.checkpoint verify DIR           every leaf against its digest; DIR may be a whole run
    python -m ifvit.checkpoint inspect DIR          tree, shapes, types, shardings, sizes, metadata, history
    python -m ifvit.checkpoint diff A B             exit 0 where every leaf of `state` is equal to the bit
    python -m ifvit.checkpoint import FILE.pkl DIR  the legacy format, read without running anything in it
    python -m ifvit.checkpoint export DIR FILE.pkl
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from ifvit import cli, legacy
from ifvit.checkpoint_metadata import (  # noqa: F401: what others know as checkpoint.X
    Damaged,
    check_module,
    check_ours,
    complete,
    read_metadata,
    reason,
    sound,
    versions,
)
from ifvit.checkpoint_places import OLD, UNFINISHED, as_path, as_writable_path, discard_unfinished, has_name, is_local, locate  # noqa: F401
from ifvit.checkpoint_reading import read_leaves, shapes  # noqa: F401
from ifvit.checkpoint_tree import difference, kind, leaves, nested  # noqa: F401
from ifvit.checkpoint_writing import BARRIER_MS, save, snapshot  # noqa: F401
from ifvit.errors import UserError

NETWORK = ("state/params", "state/batch_stats", "aligner")  # what it takes to run a trained network


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


def _as_checkpoint(folder: epath.Path, metadata: dict, flat: dict) -> Checkpoint:
    trees = nested(flat)
    state = {"params": {}, "batch_stats": {}, "opt_state": {}} | trees.get("state", {})
    return Checkpoint(folder, state, metadata, trees.get("aligner"))


def from_legacy(file: epath.Path) -> Checkpoint:
    """A pickle of the legacy format as a checkpoint. UserError where anything in it is refused.

    `foreign` in the metadata: it is not of this project's networks, and serves to seed Module 2 alone.
    """
    found = legacy.read(file)
    state = {"params": {}, "batch_stats": {}, "opt_state": {}, "step": np.int32(0)} | found.state
    aligner = state.pop("aligner", None)
    for name, part in (state | {"aligner": {} if aligner is None else aligner}).items():
        if name == "step" and not (np.ndim(part) == 0 and np.asarray(part).dtype.kind in "iuf" and np.isfinite(part)):
            raise UserError(f"{file} has a step that is no number; save one, and not one for each device.")
        if name in ("params", "batch_stats", "opt_state", "aligner") and not isinstance(part, dict):
            raise UserError(f"{file} has an array as its {name}, where named arrays belong; save the tree of them.")
    params = state["params"]
    names = {n for n in (*params, *(m for p in params.values() if isinstance(p, dict) for m in p))}
    module = "matcher" if any(n.endswith("_transformer_global") for n in names) else "dense_reg"
    told = sound(found.metadata)
    ours = "resnet_widths" in told["config"] and "module" in told
    names = leaves({"state": state} | ({"aligner": aligner} if aligner else {}))
    metadata = {"module": module} | told | {"step": int(state["step"]), "digests": dict.fromkeys(names)}
    if found.timestamp:
        metadata["timestamp"] = found.timestamp
    return Checkpoint(file, state, metadata if ours else metadata | {"foreign": True}, aligner)


if __name__ == "__main__":
    from ifvit.checkpoint_commands import COMMANDS

    sys.exit(cli.main_with_commands(COMMANDS, "ifvit.checkpoint"))
