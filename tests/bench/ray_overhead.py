"""What a training step costs under Ray with one worker, against one in this process.

    python tests/bench/ray_overhead.py --out DIR --rounds 3

A round trains Module 1 on each; ratios are of the rounds' median steps, other jobs on the machine disturb both.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ifvit.training.metrics import in_steps, read_rows  # noqa: E402


def steps(out: Path, preset: str, count: int, *runtime: str) -> list[float]:
    """Seconds a step, one value a row of the metrics, but for the first row, in which it was compiled."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "ifvit.train_dense", "--preset", preset, "--dataset_root", "synthetic",
                    "--checkpoint_dir", str(out), "--num_epochs", "1", "--set", f"pairs_per_epoch={16 * count}",
                    "--set", "val_pairs=0", *runtime], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    rows = [r for r in read_rows(out / "metrics.jsonl") if r["split"] == "train"]
    return [in_steps(b) / (b["step"] - a["step"]) for a, b in zip(rows, rows[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--steps", type=int, default=40, help="a run; a row is ten")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ratios = []
    for n in range(args.rounds):
        pair = [("--runtime", "local"), ("--runtime", "ray", "--num_workers", "1")]
        times = {}
        for runtime in pair if n % 2 == 0 else pair[::-1]:
            times[runtime[1]] = statistics.median(steps(args.out.resolve(), args.preset, args.steps, *runtime))
        ratios.append(times["ray"] / times["local"])
        print(f"a step: local {times['local']:.3f} s, under Ray {times['ray']:.3f} s: {ratios[-1]:.3f} times", flush=True)
    print(f"under Ray a step takes {statistics.median(ratios):.3f} times as long [{min(ratios):.3f} … {max(ratios):.3f}]")


if __name__ == "__main__":
    main()
