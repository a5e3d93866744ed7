"""A process that enrols, removes, replaces and compacts without end; it is killed at any moment.

    python enrolling.py GALLERY SEED [own]    # own: removes and replaces what it has added alone

Before each deed it writes to stdout what it will do, after it `done`. Templates and pictures follow from the name.
"""

import hashlib
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ifvit.gallery.store import Entry, Gallery

WIDTH = 16


def template(name: str, version: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(f"{name} {version}".encode()).digest()[:8], "big")
    x = np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32)
    return x / np.linalg.norm(x)


def entry(name: str, version: int) -> Entry:
    return Entry(name, f"digest {version}", "DB", name.split("_")[0], f"{name} {version}".encode())


def main(folder: Path, seed: int, own: bool) -> None:
    gallery, rng = Gallery.create(folder, "checkpoint", WIDTH), np.random.default_rng(seed)
    for n in range(1_000_000):
        deed, names = rng.choice(["add", "replace", "remove", "compact"], p=[0.5, 0.2, 0.2, 0.1]), []
        known = sorted(e.name for e in gallery.entries() if not own or e.name.startswith(f"{seed}-"))
        if deed == "add":
            names = [f"{seed}-{n}_{i}" for i in range(rng.integers(1, 6))]
        elif known:
            names = [known[i] for i in rng.choice(len(known), min(2, len(known)), replace=False)]
        print(deed, n, *names, flush=True)
        if deed == "add" or deed == "replace" and names:
            rows = np.stack([template(name, n) for name in names])
            gallery.add([entry(name, n) for name in names], rows, replace=deed == "replace")
        elif deed == "remove" and names:
            gallery.remove(names)
        elif deed == "compact":
            gallery.compact()
        print("done", flush=True)
        time.sleep(0.01 * own)  # SQLite lets the one that has just written write again: the other one's turn


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["own"])
