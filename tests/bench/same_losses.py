"""Fifty steps on four layouts: do they give the same losses?

    python tests/bench/same_losses.py --out DIR

One process with one device, one with two (forced host devices), two processes, and two hosts of a test bed
(as root, on Linux). Prints the largest difference of any step's loss from the first layout's, and draws
all of them over each other into DIR/losses.png.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from testbed import Testbed  # noqa: E402

from ifvit.training.metrics import read_rows  # noqa: E402

STEPS = 50


def words(folder: Path, *more: str) -> list[str]:
    """Every step is an epoch, whose loss is a row of the metrics; nothing is validated."""
    return ["-m", "ifvit.train_dense", "--preset", "smoke", "--dataset_root", "synthetic", "--checkpoint_dir", str(folder),
            "--num_epochs", str(STEPS), "--batch_size", "8", "--set", "pairs_per_epoch=8", "--set", "val_pairs=0", *more]


def here(folder: Path, devices: int, *more: str) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    subprocess.run([sys.executable, *words(folder, *more)], env=env, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def on_two_hosts(folder: Path) -> None:
    with Testbed(hosts=2, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                               "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}) as bed:
        job = bed.submit(["python", *words(folder)], wait=True)
        if bed.exit_code(job):
            sys.exit(bed.logs(job))


def losses(folder: Path) -> list[float]:
    found = [r["loss"] for r in read_rows(folder / "metrics.jsonl") if r["split"] == "train"]
    assert len(found) == STEPS, folder
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="its content is replaced")
    out = parser.parse_args().out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    layouts = {
        "1 process × 1 device": lambda to: here(to, 1, "--runtime", "local"),
        "1 process × 2 devices": lambda to: here(to, 2, "--runtime", "local"),
        "2 processes × 1 device": lambda to: here(to, 1, "--num_workers", "2"),
        "the same again": lambda to: here(to, 1, "--num_workers", "2"),
    }
    if why := Testbed.available():
        print(f"no test bed: {why}")
    else:
        layouts["2 hosts × 1 device"] = on_two_hosts
    found = {}
    for name, train in layouts.items():
        folder = out / name.replace(" ", "_")
        train(folder)
        found[name] = losses(folder)
        first = found["1 process × 1 device"]
        gap = max(abs(a - b) / abs(a) for a, b in zip(first, found[name]))
        print(f"{name}: loss {found[name][0]:.6f} at step 1, {found[name][-1]:.6f} at step {STEPS}; from the first layout's it "
              f"differs by at most {gap:.1e} of it", flush=True)
    repeat = found["2 processes × 1 device"] == found["the same again"]
    print(f"two runs on the same two processes: {'equal to the bit' if repeat else 'DIFFERENT'}")

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    for n, (name, values) in enumerate(found.items()):
        above.plot(range(1, STEPS + 1), values, label=name, linewidth=6 - n, alpha=0.6)
        below.plot(range(1, STEPS + 1), [b - a for a, b in zip(first, values)], label=name)
    above.set_ylabel("loss")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    above.legend()
    figure.savefig(out / "losses.png", dpi=120)
    sys.exit(not repeat)


if __name__ == "__main__":
    main()
