"""Kills a sweep's driver at random moments and resumes it. Trials that had ended are kept, and the best is the same.

    python tests/faults/sweep.py [--count 5] [--samples 8] [--seed 0]

The undisturbed sweep and the killed one are searches without early stopping (which trials are stopped depends on who
comes first), of preset `smoke`; the killed one is killed `count` times, with all its Ray processes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ifvit import checkpoint
from tune import record


def words(folder: Path, samples: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tune",
        "--module",
        "dense",
        "--preset",
        "smoke",
        "--num_samples",
        str(samples),
        "--scheduler",
        "none",
        "--search",
        "learning_rate",
        "noise",
        "weight_decay",
        "--set",
        "num_epochs=4",
        "--sweep_dir",
        str(folder),
    ]


def outcome(folder: Path) -> list[tuple]:
    """Of every trial: its end, its values and its metrics, and the digests of its parameters."""
    found = []
    for r in record.read_all(folder / "dense"):
        path = checkpoint.locate(record.folder_of(folder / "dense", r.number) / "dense_reg_ckpt")
        found.append(
            (
                r.number,
                r.end["how"],
                r.values,
                [row["accuracy"] for row in r.rows],
                checkpoint.read_metadata(path)["digests"],
            )
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        clock = time.monotonic()
        subprocess.run(words(whole, args.samples), check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - clock
        ended: dict[Path, bytes] = {}
        for _ in range(args.count):
            moment = draw.uniform(0.2, 0.9) * length
            sweep = subprocess.Popen(words(killed, args.samples), stdout=subprocess.DEVNULL, start_new_session=True)
            try:
                sweep.wait(moment)
                how = f"ended within {moment:.1f} s"
            except subprocess.TimeoutExpired:
                os.killpg(sweep.pid, signal.SIGKILL)
                sweep.wait()
                how = f"killed after {moment:.1f} s"
            for p in killed.glob("dense/trials/*/ended.json"):
                ended.setdefault(p, p.read_bytes())
            print(f"{how}: {len(ended)} trials had ended", flush=True)
        subprocess.run(words(killed, args.samples), check=True, stdout=subprocess.DEVNULL)
        lost = [str(p) for p, content in ended.items() if p.read_bytes() != content]
        same = outcome(whole) == outcome(killed)
        best = [record.order(record.read_all(f / "dense"), "accuracy", True)[0].number for f in (whole, killed)]
        print(
            f"{len(lost)} trials were run again; {'all trials equal to the bit' if same else 'TRIALS DIFFER'}; "
            f"best: {best[0]} and {best[1]}"
        )
        return 0 if not lost and same and best[0] == best[1] else 1


if __name__ == "__main__":
    sys.exit(main())
