"""Seconds from `ray job submit` to the end of the first training step, preset `cpu`, on a host of two cores.

It needs Linux, and runs as root.

    python tests/bench/first_step.py --out DIR --rounds 3

The first job finds an empty cache: it makes the prints and compiles. The others find both there.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from testbed import Testbed  # noqa: E402

from ifvit.training.metrics import read_rows  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    env = {"IFVIT_CACHE": str(out / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    with Testbed(hosts=1, cpus=2, env=env) as bed:
        for n in range(1 + args.rounds):
            clock = time.monotonic()
            run = out / f"run{n}"  # an epoch of one step, so that its row is written as it ends
            job = bed.submit(
                [
                    "python",
                    "-m",
                    "ifvit.train_dense",
                    "--preset",
                    "cpu",
                    "--dataset_root",
                    "synthetic",
                    "--checkpoint_dir",
                    run,
                    "--num_epochs",
                    "1",
                    "--set",
                    "pairs_per_epoch=16",
                    "--set",
                    "val_pairs=0",
                ]
            )
            while not read_rows(run / "metrics.jsonl"):
                if time.monotonic() - clock > 300:
                    raise SystemExit(bed.logs(job)[-3000:])
                time.sleep(0.1)
            print(f"{'empty cache' if n == 0 else 'used cache'}: {time.monotonic() - clock:.1f} s", flush=True)
            bed.wait(job)


if __name__ == "__main__":
    main()
