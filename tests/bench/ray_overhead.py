"""What a training step costs under Ray with one worker, against one in this process.

    python tests/bench/ray_overhead.py --out DIR --rounds 12

Two runs of Module 1, one under Ray, take turns of ten steps. While one trains, all processes of the other are stopped,
Ray's own too. A round is a turn of each.
"""

import argparse
import contextlib
from pathlib import Path

from turns import ROW, Run, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = args.batch_size * ROW * (args.rounds + 4)
    flags = [
        "--preset",
        args.preset,
        "--dataset_root",
        "synthetic",
        "--batch_size",
        str(args.batch_size),
        "--num_epochs",
        "1",
        "--set",
        f"pairs_per_epoch={pairs}",
        "--set",
        "val_pairs=0",
    ]
    with contextlib.ExitStack() as ends:
        runs = {}
        for name, runtime in (("local", ["--runtime", "local"]), ("ray", ["--runtime", "ray", "--num_workers", "1"])):
            runs[name] = Run(args.out.resolve() / name, ["ifvit.train_dense", *flags, *runtime])
            ends.callback(runs[name].end)
        times = {name: [] for name in runs}
        for n in range(args.rounds):
            for name in sorted(runs, reverse=n % 2 == 1):
                times[name].append(runs[name].turn() / ROW)
            local, ray = times["local"][-1], times["ray"][-1]
            used = {name: sorted(run.cpu.values()) for name, run in runs.items()}
            print(
                f"a step: local {local:.3f} s, under Ray {ray:.3f} s: {ray / local:.3f} times; of the cores' time: "
                f"local {used['local'][-1] / ROW:.3f} s, under Ray {used['ray'][-1] / ROW:.3f} s in the worker, "
                f"{sum(used['ray'][:-1]) / ROW:.3f} s in {len(used['ray']) - 1} others",
                flush=True,
            )
    print(f"under Ray a step takes {ratios(times, 'ray', 'local')}")


if __name__ == "__main__":
    main()
