"""What `python -m ifvit.checkpoint` offers."""

from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro
from etils import epath

from ifvit import checkpoint
from ifvit.errors import UserError


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
            except UserError as e:
                bad += 1
                print(f"BAD   {folder}  {e}")
        return 1 if bad else 0


def checkpoints_below(root: epath.Path) -> list[epath.Path]:
    """Every checkpoint in a tree of folders, whole or not; what is being written is left out."""
    found = []
    for child in sorted(root.iterdir()):
        if child.is_dir() and checkpoint.UNFINISHED not in child.name:
            is_one = (child / "_CHECKPOINT_METADATA").exists() or (child / "state").is_dir() or (child / "metadata").is_dir()
            found += [child] if is_one else checkpoints_below(child)
    return found


@dataclass(frozen=True)
class Inspect:
    """Prints a checkpoint's leaves (name, type, shape, bytes, sharding), its metadata and the run's history."""

    path: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        found = checkpoint.load(self.path)
        trees = {"state": found.state} | ({"aligner": found.aligner} if found.aligner else {})
        shardings = found.metadata.get("shardings", {})
        sizes: Counter = Counter()
        for name, leaf in checkpoint.leaves(trees).items():
            sizes["/".join(name.split("/")[:2])] += leaf.nbytes
            print(f"{name:90s} {leaf.dtype!s:8s} {list(leaf.shape)!s:18s} {leaf.nbytes:>10d} "
                  f"{shardings.get(name, 'replicated')}")
        for key, value in found.metadata.items():
            if key not in ("digests", "shardings", "history"):
                print(f"{key}: {value}")
        for n, attempt in enumerate(found.metadata.get("history", []), 1):
            print(f"history {n}: " + ", ".join(f"{k} {v}" for k, v in attempt.items()))
        print(", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))
        print(f"{len(found.metadata['digests'])} leaves, {sum(sizes.values()) / 1e6:.1f} MB")
        return 0


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


COMMANDS = {"verify": Verify, "inspect": Inspect, "diff": Diff}
