"""What `python -m ifvit.checkpoint` offers."""

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from etils import epath

from ifvit import checkpoint, cli, gcs, legacy
from ifvit.errors import UserError
from ifvit.foreign import legacy_transformer


@dataclass(frozen=True)
class Verify:
    """Checks every leaf of a checkpoint, or of all checkpoints in a folder, against its digest."""

    path: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        root = checkpoint.as_path(self.path)
        if not root.is_dir() or (root / "_CHECKPOINT_METADATA").exists() or (root / "state").is_dir():
            folders = [checkpoint.locate(self.path)]
        else:
            folders = checkpoints_below(root)
        if not folders:
            raise UserError(f"{root} holds no checkpoint; give a checkpoint or the folder of a run.")
        bad = 0
        for folder in folders:
            try:
                found = checkpoint.load(folder)
                digests = found.metadata["digests"]
                checked = f"{len(digests)} leaves" if any(digests.values()) else "no digests: not checked"
                print(f"good  {folder}  {found.module}, epoch {found.metadata['epoch']}, {checked}")
            except gcs.Refused:
                raise
            except UserError as e:
                bad += 1
                print(f"BAD   {folder}  {e}")
        return 1 if bad else 0


NAMED = re.compile(r"(dense_reg|matcher)_(ckpt|best|epoch_\d+|step_\d+)(\.replaced)?")
ASIDE = re.compile(r".+\.damaged(\.\d+)?")


def checkpoints_below(root: epath.Path, seen: frozenset[str] = frozenset()) -> list[epath.Path]:
    """Every checkpoint in a tree of folders, whole or not.

    Those that are being written, or were set aside as damaged, are left out.
    """
    found = []
    seen |= {os.path.realpath(root)}
    for child in sorted(root.iterdir()):
        # A folder in `seen` is a link to a folder above it.
        if not child.is_dir() or checkpoint.UNFINISHED in child.name or os.path.realpath(child) in seen:
            continue
        if ASIDE.fullmatch(child.name):
            print(f"aside {child}")
        elif (
            NAMED.fullmatch(child.name)
            or (child / "_CHECKPOINT_METADATA").exists()
            or any((child / part).is_dir() for part in ("state", "metadata", "aligner", "template"))
        ):
            found.append(child)
        else:
            found += checkpoints_below(child, seen)
    return found


@dataclass(frozen=True)
class Inspect:
    """Prints a checkpoint's leaves (name, type, shape, bytes, sharding), its metadata and the run's history."""

    path: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        found = checkpoint.load(self.path)
        shardings = found.metadata.get("shardings", {})
        sizes: Counter = Counter()
        for name, leaf in checkpoint.leaves(found.trees).items():
            sizes["/".join(name.split("/")[:2])] += leaf.nbytes
            print(
                f"{name:90s} {leaf.dtype!s:8s} {list(leaf.shape)!s:18s} {leaf.nbytes:>10d} "
                f"{shardings.get(name, 'replicated')}"
            )
        for key, value in found.metadata.items():
            if key not in ("digests", "shardings", "history"):
                print(f"{key}: {_printable(value)}")
        for n, attempt in enumerate(found.metadata.get("history", []), 1):
            print(f"history {n}: " + ", ".join(f"{k} {_printable(v)}" for k, v in attempt.items()))
        print(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))
        print(f"{len(found.metadata['digests'])} leaves, {sum(sizes.values()) / 1e6:.1f} MB")
        return 0


def _printable(value) -> str:
    """A file's text without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


@dataclass(frozen=True)
class Diff:
    """Compares `state` of two checkpoints to the bit: exit 0 equal, 1 not."""

    a: Annotated[str, tyro.conf.Positional]
    b: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        wrong = checkpoint.difference(checkpoint.load(self.a).state, checkpoint.load(self.b).state)
        for name, how in wrong.items():
            print(f"{name}: {how}")
        print(f"{len(wrong)} leaves differ" if wrong else "equal to the bit")
        return 1 if wrong else 0


@dataclass(frozen=True)
class Import:
    """Makes a checkpoint of a pickle of the legacy format; nothing in the pickle is run."""

    file: Annotated[str, tyro.conf.Positional]
    to: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        file, folder = checkpoint.as_path(self.file), checkpoint.as_writable_path(self.to)
        if not file.is_file():
            file = checkpoint.locate(self.file)
        if file.is_dir():
            raise UserError(f"{self.file} is no file but a checkpoint already; use that.")
        folder = folder.with_suffix("") if folder.suffix == ".pkl" else folder  # as `locate` does
        found = checkpoint.from_legacy(file)
        state, notes = found.state, []
        if found.metadata.get("foreign") and found.module == "dense_reg":
            state, notes = _renamed(state)
        if left := found.metadata.get("not_arrays"):
            names = ", ".join(list(left)[:5]) + " …" * (len(left) > 5)
            notes.append(f"Of its state {names} are no arrays; they stand in the metadata.")
        for note in notes:
            print(f"⚠ {note}")
        state = {name: part for name, part in state.items() if not (isinstance(part, dict) and not part)}
        _check_names(file, checkpoint.leaves(found.trees | {"state": state}))
        try:
            if checkpoint.has_name(folder) or checkpoint.is_local(folder) and folder.exists():
                raise UserError(f"{folder} is there already; give a new name.")
            checkpoint.save(folder, found.module, state, found.metadata, found.aligner, found.template)
        except UserError:
            raise
        except Exception as e:  # the disk fails, or an array has a type that Orbax does not know
            raise UserError(f"Cannot write {folder} ({checkpoint.reason(e)}); give another place, or make room.") from e
        print(
            f"{folder}: {len(checkpoint.leaves(state))} leaves of {file}"
            + (", made by other code: its transformer can seed Module 2" if found.metadata.get("foreign") else "")
        )
        return 0


def _renamed(state: dict) -> tuple[dict, list[str]]:
    """Other code's state with its transformer under this project's names, and notes for the user."""
    try:
        name, tree, notes = legacy_transformer.transformer(state["params"])
    except legacy_transformer.NoTransformer:
        return state, ["There is no transformer in it: it cannot seed Module 2."]
    before = state["params"].get(name)
    if isinstance(before, dict) and not checkpoint.difference(before, tree):
        return state, notes
    notes += ["optimiser state left out: it belongs to the parameters' old names."] * bool(state["opt_state"])
    return state | {"params": {**state["params"], name: tree}, "opt_state": {}}, notes


def _check_names(file: epath.Path, flat: dict[str, np.ndarray]) -> None:
    """UserError for leaves that a checkpoint cannot hold."""
    taken: dict[str, str] = {}
    for name, leaf in flat.items():
        if not leaf.size:
            raise UserError(
                f"{file} holds {name}, an array without elements, which a checkpoint cannot hold; leave it out."
            )
        other = taken.setdefault(name.replace("/", "."), name)
        if other != name:
            raise UserError(f"{file} holds {other} and {name}, which are one name on the disk; rename one of them.")


@dataclass(frozen=True)
class Export:
    """Writes a checkpoint as a pickle of the legacy format, of plain containers and numpy arrays."""

    path: Annotated[str, tyro.conf.Positional]
    file: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        file = checkpoint.as_path(self.file)
        if not checkpoint.is_local(file):
            raise UserError(f"{file}: pickles are written to files only; give a local path.")
        found = checkpoint.load(self.path)
        if file.is_dir():
            raise UserError(f"{file} is a directory; give the name of a file.")
        metadata = {k: v for k, v in found.metadata.items() if k not in ("digest", "digests", "shardings", "timestamp")}
        state = found.state | {name: tree for name, tree in found.trees.items() if name != "state"}
        legacy.write(file, state, metadata, found.metadata.get("timestamp"))
        print(f"{file}: {len(checkpoint.leaves(state))} leaves of {found.path}")
        return 0


COMMANDS = {"verify": Verify, "inspect": Inspect, "diff": Diff, "import": Import, "export": Export}


if __name__ == "__main__":
    sys.exit(cli.main_with_commands(COMMANDS, "ifvit.checkpoint"))
