"""Checkpoints: Orbax directories that exist whole or not at all, every leaf with a digest.

A checkpoint holds `state` (params, batch_stats, opt_state, step), all nested dictionaries with
string keys, JSON `metadata`, and for a matcher `aligner` (Module 1's params and batch_stats).

    python -m ifvit.checkpoint verify DIR     every leaf against its digest
    python -m ifvit.checkpoint inspect DIR    tree, shapes, metadata
    python -m ifvit.checkpoint diff A B       exit 0 where every leaf of `state` is equal to the bit
"""

import datetime
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

from ifvit import cli
from ifvit.errors import UserError
from ifvit.paths import resolve

OLD = ".replaced"  # what a checkpoint that is being overwritten is called for a moment


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    state: dict     # nested dictionaries of numpy arrays
    metadata: dict
    aligner: dict | None

    @property
    def module(self) -> str:
        """`dense_reg` or `matcher`."""
        return self.metadata["module"]


def save(path: str | Path, module: str, state: dict, metadata: dict, aligner: dict | None = None) -> None:
    """Writes a checkpoint; one of the same name is replaced only when the new one is whole.

    `metadata` has `epoch` and `config`; time, versions and digests are added.
    """
    path = Path(os.path.abspath(path))
    trees = {"state": state} | ({"aligner": aligner} if aligner is not None else {})
    trees = jax.tree.map(np.asarray, trees)
    metadata = {
        "module": module, **metadata,
        "timestamp": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {p: packages.version(p) for p in ("ifvit", "jax", "flax", "optax", "orbax-checkpoint")},
        "digests": {name: digest(leaf) for name, leaf in leaves(trees).items()},
    }
    metadata["digest"] = _digest_of_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    items = {k: ocp.args.StandardSave(v) for k, v in trees.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(fresh, ocp.args.Composite(metadata=ocp.args.JsonSave(metadata), **items), force=True)
    old = path.with_name(path.name + OLD)
    if path.exists():  # else what `old` holds is the only whole one
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(fresh, path)
    shutil.rmtree(old, ignore_errors=True)


def load(path: str | Path, module: str | None = None) -> Checkpoint:
    """The checkpoint, every leaf checked against its digest.

    UserError when it is missing, half-written, damaged, of another module than `module`, or not a
    checkpoint of IFViT.
    """
    folder = locate(path)
    metadata = read_metadata(folder)
    if module and metadata["module"] != module:
        kinds = {"dense_reg": "Module 1 (dense registration)", "matcher": "Module 2 (matcher)"}
        raise UserError(f"{folder} is a checkpoint of {kinds.get(metadata['module'], metadata['module'])}, not of "
                        f"{kinds[module]}; give the path of one of those.")
    names = [n for n in ("state", "aligner") if (folder / n).is_dir()]
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            restored = reader.restore(folder, ocp.args.Composite(**{n: _as_numpy(folder / n) for n in names}))
        trees = {n: restored[n] for n in names}
    except Exception as e:  # whatever Orbax and TensorStore say of a damaged file
        raise UserError(f"Checkpoint {folder} cannot be read ({_first_line(e)}); it is damaged: use another one.") from e
    found = leaves(trees)
    wrong = sorted(set(metadata["digests"]) ^ set(found)) + [
        n for n, leaf in found.items() if metadata["digests"].get(n, digest(leaf)) != digest(leaf)]
    if wrong:
        raise UserError(f"Checkpoint {folder} is damaged: {len(wrong)} of {len(metadata['digests'])} leaves do not "
                        f"have their digest, e.g. {wrong[0]}; use another one.")
    return Checkpoint(folder, trees["state"], metadata, trees.get("aligner"))


def locate(path: str | Path) -> Path:
    """The directory a checkpoint path means: Kaggle's base, `.pkl` dropped, an interrupted replacement undone.

    UserError for an existing `.pkl` file, for URLs, and when nothing is there.
    """
    text = resolve(str(path))
    if "://" in text:
        raise UserError(f"{text} is not a local path, and only those can be read; copy the checkpoint here first.")
    folder = Path(os.path.abspath(text))
    if folder.suffix == ".pkl":
        if folder.is_file():
            raise UserError(f"{path} is a pickle of the legacy format, which is not read; train Module 1 anew, or give "
                            "an Orbax checkpoint directory.")
        folder = folder.with_suffix("")
    if not folder.exists() and folder.with_name(folder.name + OLD).is_dir():
        return folder.with_name(folder.name + OLD)
    if not folder.is_dir():
        raise UserError(f"Checkpoint not found: {path}; give the path of a checkpoint directory.")
    return folder


def read_metadata(folder: Path) -> dict:
    """The JSON metadata; UserError where there is none, as in a half-written checkpoint."""
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            metadata = reader.restore(folder, ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
        if not (folder / "state").is_dir() or not {"module", "config", "digests"} <= set(metadata):
            raise KeyError("state, module, config or digests")
        if metadata.get("digest", _digest_of_metadata(metadata)) != _digest_of_metadata(metadata):
            raise ValueError("its metadata do not have their digest")
    except Exception as e:
        raise UserError(f"{folder} is not a whole checkpoint ({_first_line(e)}); it is half-written or something else: "
                        "use another one.") from e
    return metadata


def complete(folder: Path) -> bool:
    """Whether a directory bears a whole checkpoint, as far as its metadata tells."""
    try:
        read_metadata(folder)
    except UserError:
        return False
    return True


def leaves(tree: dict) -> dict[str, np.ndarray]:
    """Flat view of nested dictionaries: `params/resnet/stem/conv/kernel` -> array."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in flat}


def digest(leaf: np.ndarray) -> str:
    """SHA-256 of dtype, shape and content (C order)."""
    h = hashlib.sha256(f"{leaf.dtype.str}{leaf.shape}".encode())
    h.update(np.ascontiguousarray(leaf).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return h.hexdigest()[:32]


def _digest_of_metadata(metadata: dict) -> str:
    rest = {k: v for k, v in metadata.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:32]


def difference(a: dict, b: dict) -> dict[str, str]:
    """Leaves that are not equal to the bit -> how they differ."""
    a, b = leaves(a), leaves(b)
    out = {n: "only in the first" for n in a.keys() - b.keys()} | {n: "only in the second" for n in b.keys() - a.keys()}
    for n in a.keys() & b.keys():
        if a[n].shape != b[n].shape or a[n].dtype != b[n].dtype:
            out[n] = f"{a[n].dtype}{list(a[n].shape)} against {b[n].dtype}{list(b[n].shape)}"
        elif digest(a[n]) != digest(b[n]):
            gap = np.abs(a[n].astype(np.float64) - b[n].astype(np.float64))
            out[n] = f"{(gap > 0).sum()} of {gap.size} elements, at most {gap.max():.3g}"
    return dict(sorted(out.items()))


def _as_numpy(folder: Path):
    """Restore arguments for whatever tree lies there, as numpy arrays, on any number of devices."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(folder).item_metadata.tree
    return ocp.args.PyTreeRestore(restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))


def _first_line(e: Exception) -> str:
    text = str(e).strip().splitlines()
    return (text[0] if text else type(e).__name__)[:160]


@dataclass(frozen=True)
class Verify:
    """Checks every leaf of a checkpoint, or of all checkpoints in a folder, against its digest."""

    path: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        root = Path(resolve(self.path))
        root = root if root.is_dir() else locate(self.path)
        is_tree = root.is_dir() and not (root / "_CHECKPOINT_METADATA").exists() and not (root / "state").is_dir()
        folders = sorted(p for p in root.iterdir() if p.is_dir() and (p / "state").is_dir()) if is_tree else [root]
        if not folders:
            raise UserError(f"{root} holds no checkpoint; give a checkpoint or the folder of a run.")
        bad = 0
        for folder in folders:
            try:
                found = load(folder)
                print(f"good  {folder}  {found.module}, epoch {found.metadata['epoch']}, "
                      f"{len(found.metadata['digests'])} leaves")
            except UserError as e:
                bad += 1
                print(f"BAD   {folder}  {e}")
        return 1 if bad else 0


@dataclass(frozen=True)
class Inspect:
    """Prints a checkpoint's leaves (name, type, shape, bytes) and its metadata."""

    path: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        found = load(self.path)
        trees = {"state": found.state} | ({"aligner": found.aligner} if found.aligner else {})
        total = 0
        for name, leaf in leaves(trees).items():
            total += leaf.nbytes
            print(f"{name:90s} {leaf.dtype!s:8s} {list(leaf.shape)!s:18s} {leaf.nbytes:>10d}")
        for key, value in found.metadata.items():
            if key != "digests":
                print(f"{key}: {value}")
        print(f"{len(found.metadata['digests'])} leaves, {total / 1e6:.1f} MB")
        return 0


@dataclass(frozen=True)
class Diff:
    """Compares `state` of two checkpoints to the bit: exit 0 equal, 1 not."""

    a: Annotated[str, tyro.conf.Positional]
    b: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        wrong = difference(load(self.a).state, load(self.b).state)
        for name, how in wrong.items():
            print(f"{name}: {how}")
        print(f"{len(wrong)} leaves differ" if wrong else "equal to the bit")
        return 1 if wrong else 0


COMMANDS = {"verify": Verify, "inspect": Inspect, "diff": Diff}

if __name__ == "__main__":
    sys.exit(cli.main_with_commands(COMMANDS, "ifvit.checkpoint"))
