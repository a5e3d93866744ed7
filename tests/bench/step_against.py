"""The training step of this tree against that of another commit: pairs per second, in turns of ten steps.

    python tests/bench/step_against.py --commit COMMIT --out DIR --rounds 12 [--module match] [--now compute_dtype=auto]

`--now`: settings of this tree's run alone. Module 2 is trained without a Module 1: its own step is what is timed.
"""

import argparse
import contextlib
import statistics
import subprocess
from pathlib import Path

from turns import ROOT, ROW, Run, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--module", choices=("dense", "match"), default="dense")
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--now", nargs="*", default=[])
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = out / "before"
    if not before.exists():
        subprocess.run(["git", "worktree", "add", "--detach", before, args.commit], cwd=ROOT, check=True)
    pairs = args.batch_size * ROW * (args.rounds + 4)
    words = f"ifvit.train_{args.module} --preset {args.preset} --dataset_root synthetic --batch_size {args.batch_size} "
    words += f"--num_epochs 1 --runtime local --set pairs_per_epoch={pairs} --set val_pairs=0"
    if args.module == "match":
        words += " --pretrained_ckpt= --set calibration_pairs=4"
    with contextlib.ExitStack() as ends:
        ends.callback(subprocess.run, ["git", "worktree", "remove", "--force", before], cwd=ROOT)
        runs, times = {}, {"before": [], "now": []}
        for name, tree in (("before", before), ("now", ROOT)):
            more = [f"--set={setting}" for setting in args.now] if name == "now" else []
            runs[name] = Run(out / f"run_{name}", words.split() + more, tree)
            ends.callback(runs[name].end)
        for n in range(args.rounds):
            for name in sorted(runs, reverse=n % 2 == 1):
                times[name].append(runs[name].turn() / ROW)
            print(", ".join(f"{name} {args.batch_size / t[-1]:.1f} pairs/s" for name, t in times.items()), flush=True)
    middle = {name: args.batch_size / statistics.median(t) for name, t in times.items()}
    print(f"before {middle['before']:.1f} pairs/s, now {middle['now']:.1f}; a step before takes", end=" ")
    print(ratios(times, "before", "now"))


if __name__ == "__main__":
    main()
