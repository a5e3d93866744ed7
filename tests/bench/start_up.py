"""Seconds until a command does something: help, imports, the first step of preset `smoke`, `verify` of one pair.

    python tests/bench/start_up.py --out DIR
    python tests/bench/start_up.py --out DIR --against OTHER    # another checkout, turn by turn with this one

Every figure is of processes of their own: the median of the rounds, the fastest and the slowest; then the seconds of
all cores, which tell more on a machine that has other work. With a `used cache` prints and programs are there from a
run before, which is not counted.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ifvit.data import synthetic  # noqa: E402

COMMANDS = (
    *(f"ifvit.{name}" for name in "train_dense train_match train_all evaluate verify prints tune loftr".split()),
    *("ifvit.load_module1_weights", "ifvit.checkpoint"),
)
TRAINING = "ifvit.data.gather, ifvit.training.dense, ifvit.training.match, ifvit.training.loop, grain.python"
SCORING = "ifvit.data.gather, ifvit.scoring.scorer, ifvit.scoring.plots"
IMPORTS = {  # of a command: what it has imported when it does its work
    "training": TRAINING,
    "evaluate": SCORING,
    "verify": "ifvit.scoring.scorer, ifvit.data.scale",
    "prints": "ifvit.data.gather, ifvit.data.summary, ifvit.data.sheet",
    "checkpoint": "ifvit.checkpoint.__main__, orbax.checkpoint",
    "training on Ray": f"{TRAINING}, cluster.on_ray",
    "tune": "tune.sweep, tune.trial",
}
Timed = tuple[float, float]  # seconds by the clock, seconds of all cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--checkpoint", type=Path, help="of Module 2 [trained here, by preset smoke]")
    parser.add_argument("--only", default="", help="rows that begin so")
    args = parser.parse_args()
    trees = [ROOT, args.against.resolve()] if args.against else [ROOT]
    for name, measure in rows(args.out.resolve(), args.checkpoint and args.checkpoint.resolve()).items():
        if name.startswith(args.only):
            found = [[measure(tree) for tree in trees] for _ in range(args.rounds)]
            print(f"{name:38s} " + told([row[0] for row in found]) + compared(found), flush=True)


def rows(out: Path, checkpoint: Path | None) -> dict[str, Callable[[Path], Timed]]:
    """What is measured, in a checkout."""
    helped = {f"--help, {name}": lambda tree, name=name: run(tree, out, "-m", name, "--help") for name in COMMANDS}
    imports = {
        f"imports, {name}": lambda tree, what=what: run(tree, out, "-c", f"import {what}")
        for name, what in IMPORTS.items()
    }
    return {
        **helped,
        **imports,
        "verify, used cache": lambda tree: verify(tree, out, checkpoint),
        "first step of smoke, empty cache": lambda tree: first_step(tree, out, True),
        "first step of smoke, used cache": lambda tree: first_step(tree, out, False),
    }


def run(tree: Path, out: Path, *words) -> Timed:
    """A Python of a checkout, to its end."""
    out.mkdir(parents=True, exist_ok=True)
    clock, before = time.perf_counter(), os.times()
    with (out / "said.txt").open("w") as said:
        subprocess.run(
            [sys.executable, *map(str, words)], cwd=out, env=env(tree, out), stdout=said, stderr=said, check=True
        )
    after = os.times()
    cores = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - clock, cores


def env(tree: Path, out: Path) -> dict:
    plain = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    return plain | {"PYTHONPATH": str(tree), "IFVIT_CACHE": str(out / f"cache-{tree.name}")}


def first_step(tree: Path, out: Path, empty: bool) -> Timed:
    """A run of one step, until its row of metrics is there; with an `empty` cache it prepares and compiles."""
    cache = Path(env(tree, out)["IFVIT_CACHE"])
    if empty:
        shutil.rmtree(cache, ignore_errors=True)
    elif not (filled := cache / "filled").exists():
        first_step(tree, out, True)
        filled.touch()
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    one_step = "--num_epochs 1 --set pairs_per_epoch=4 --set val_pairs=0"
    words = f"-m ifvit.train_dense --preset smoke {one_step} --checkpoint_dir {folder}"
    out.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    with (out / "said.txt").open("w") as said:
        process = psutil.Popen([sys.executable, *words.split()], cwd=out, env=env(tree, out), stdout=said, stderr=said)
        while not ((rows := folder / "metrics.jsonl").exists() and rows.stat().st_size):
            if process.poll() is not None:
                raise SystemExit((out / "said.txt").read_text()[-3000:])
            time.sleep(0.02)
        used = process.cpu_times()
        timed = time.perf_counter() - clock, used.user + used.system + used.children_user + used.children_system
        if process.wait():
            raise SystemExit((out / "said.txt").read_text()[-3000:])
    return timed


def verify(tree: Path, out: Path, checkpoint: Path | None) -> Timed:
    """Two generated prints; the first call fills the cache and is not counted."""
    a, b = synthetic.prints(0, 1, 2, out / "prints")
    checkpoint = checkpoint or trained(out)
    words = ("-m", "ifvit.verify", a, b, "--checkpoint", checkpoint)
    if not (filled := Path(env(tree, out)["IFVIT_CACHE"]) / "verified").exists():
        run(tree, out, *words)
        filled.touch()
    return run(tree, out, *words)


def trained(out: Path) -> Path:
    """A matcher of preset smoke."""
    folder = out / "smoke"
    if not (folder / "checkpoints/matcher/matcher_ckpt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run(ROOT, folder, "-m", "ifvit.train_all", "--preset", "smoke")
    return folder / "checkpoints/matcher/matcher_ckpt"


def told(found: list[Timed]) -> str:
    clock, cores = zip(*found)
    spread = f"[{min(clock):.2f}, {max(clock):.2f}]"
    return f"{statistics.median(clock):6.2f} s {spread}, cores {statistics.median(cores):6.2f} s"


def compared(found: list[list[Timed]]) -> str:
    """This checkout's share of the other's, as the median of the rounds."""
    if len(found[0]) == 1:
        return ""
    clock, cores = (statistics.median(ours[i] / theirs[i] for ours, theirs in found) for i in (0, 1))
    return f"; the other {told([row[1] for row in found])}; share {clock:.2f}, of cores {cores:.2f}"


if __name__ == "__main__":
    main()
