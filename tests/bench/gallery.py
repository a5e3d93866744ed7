"""How long a gallery of random templates takes to open and to answer a shortlist, and how much memory is resident.

    python tests/bench/gallery.py [--counts 1000 100000 1000000]

A probe has a template at each turn of `identify`. Each size is measured in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ifvit.gallery.store import Entry, Gallery

TURNS, WIDTH, REPEATS, AT_ONCE = 7, 256, 9, 50_000


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    x = rng.standard_normal((count, WIDTH), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def fill(folder: Path, count: int) -> None:
    """Two prints a finger, without pictures."""
    gallery, rng = Gallery.create(folder, "random", WIDTH), np.random.default_rng(0)
    for at in range(0, count, AT_ONCE):
        some = range(at, min(at + AT_ONCE, count))
        gallery.add([Entry(f"{n}", f"{n}", "random", f"{n // 2}") for n in some], unit(rng, len(some)))


def resident() -> float:
    """MB, of mapped files too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(folder: Path, count: int) -> None:
    before, began = resident(), time.perf_counter()
    gallery = Gallery.open(folder)
    opened = time.perf_counter() - began
    probes, seconds, cpu = unit(np.random.default_rng(1), TURNS), [], time.process_time()
    for _ in range(REPEATS):
        began = time.perf_counter()
        gallery.likest(probes, 50)
        seconds.append(1e3 * (time.perf_counter() - began))
    cpu = 1e3 * (time.process_time() - cpu) / REPEATS
    print(
        f"{count:9,} templates: opened in {opened:.3f} s, shortlist {statistics.median(seconds):.0f} ms "
        f"[{min(seconds):.0f}, {max(seconds):.0f}], {cpu:.0f} ms of processors, {resident() - before:.0f} MB resident; "
        f"as float32 they are {count * WIDTH * 4 / 2**20:.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), int(args.measure[1]))
        return
    for count in args.counts:
        with tempfile.TemporaryDirectory() as place:
            fill(Path(place) / "gallery", count)
            subprocess.run([sys.executable, __file__, "--measure", f"{place}/gallery", str(count)], check=True)


if __name__ == "__main__":
    main()
