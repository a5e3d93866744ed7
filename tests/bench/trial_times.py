"""Times of a sweep's trials that differ in scalars: seconds until their first step, and the share outside steps.

The seconds count from when a trial is scheduled. The first step is shown apart, because it may have the compilation.

    python tests/bench/trial_times.py --out DIR --trials 4 [-- words for `python -m tune`]

The trials are of Module 1 at preset `cpu`, two epochs of 20 steps each, on generated prints. The first one compiles,
and decodes the prints.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ifvit.training.metrics import in_steps, read_rows
from tune import record

SCALARS = ("learning_rate", "weight_decay", "warmup", "noise", "thickness", "distortion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("more", nargs="*", help="words for `python -m tune`, after --")
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        sweep = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tune",
                "--module",
                "dense",
                "--preset",
                "cpu",
                "--dataset_root",
                "synthetic",
                "--sweep_dir",
                str(out),
                "--num_samples",
                str(args.trials),
                "--scheduler",
                "none",
                "--search",
                *SCALARS,
                "--set",
                "pairs_per_epoch=320",
                "--set",
                "num_epochs=2",
                *args.more,
            ],
            stdout=said,
            stderr=said,
        )
        seen: dict[str, float] = {}
        while sweep.poll() is None:
            for rows in out.glob("*/trials/*/metrics.jsonl"):
                if rows.parent.name not in seen and any(r["split"] == "train" for r in read_rows(rows)):
                    seen[rows.parent.name] = time.time()
            time.sleep(0.05)
    if sweep.returncode:
        raise SystemExit(f"exit code {sweep.returncode}, see {log}")
    folder = next(out.glob("*/trials")).parent
    for trial in record.read_all(folder):
        rows = [r for r in read_rows(record.folder_of(folder, trial.number) / "metrics.jsonl") if r["split"] == "train"]
        scheduled = trial.end["time"] - trial.end["seconds"]
        begun = seen[f"{trial.number:03d}"] - rows[0]["seconds"] + rows[0]["input_seconds"]
        step = sum(map(in_steps, rows)) / (trial.steps - 1)
        print(
            f"trial {trial.number}: first step begun {begun - scheduled:.1f} s after it was scheduled, done after "
            f"{rows[0]['compile_seconds']:.1f} s more; {trial.steps} steps of {step:.2f} s, "
            f"{trial.end['seconds']:.0f} s, {100 * (1 - trial.steps * step / trial.end['seconds']):.0f} % of "
            "them outside steps",
            flush=True,
        )


if __name__ == "__main__":
    main()
