"""Fifty steps on four layouts: do they give the same losses?

    python tests/bench/same_losses.py --out DIR

One process with one device, one with two (forced host devices), two processes, and two hosts of a test bed
(as root, on Linux). Prints the largest difference of any step's loss from the first layout's, and draws
all of them over each other into DIR/relu/losses.png.

Then it does all of it again with a smooth function, softplus(4x) / 4, instead of ReLU. ReLU's kink magnifies rounding:
of some million values one that is about 1e-7 falls on the other side of zero, and a gradient differs by a thousandth.
Without the kink only rounding may be left after fifty steps.
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
    return [
        "-m",
        "ifvit.train_dense",
        "--preset",
        "smoke",
        "--dataset_root",
        "synthetic",
        "--checkpoint_dir",
        str(folder),
        "--num_epochs",
        str(STEPS),
        "--batch_size",
        "8",
        "--set",
        "pairs_per_epoch=8",
        "--set",
        "val_pairs=0",
        *more,
    ]


def smooth(folder: Path) -> None:
    """From now on no process that is started here has ReLU: Python imports a `sitecustomize` first."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(
        "import flax.nnx\nflax.nnx.relu = lambda x: flax.nnx.softplus(4 * x) / 4\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def here(folder: Path, devices: int, *more: str) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    subprocess.run(
        [sys.executable, *words(folder, *more)],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def on_two_hosts(folder: Path) -> None:
    with Testbed(
        hosts=2, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    ) as bed:
        job = bed.submit(["python", *words(folder)], wait=True)
        if bed.exit_code(job):
            sys.exit(bed.logs(job))


def losses(folder: Path) -> list[float]:
    found = [r["loss"] for r in read_rows(folder / "metrics.jsonl") if r["split"] == "train"]
    assert len(found) == STEPS, folder
    return found


def compare(out: Path) -> bool:
    """Trains on all layouts, prints how far apart they are and draws them; whether the repeat is equal to the bit."""
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
        gaps = [abs(a - b) / abs(a) for a, b in zip(first, found[name])]
        print(
            f"  {name}: loss {found[name][0]:.6f} at step 1, {found[name][-1]:.6f} at step {STEPS}; from the first "
            f"layout's it differs by at most {max(gaps[:5]):.1e} of it over five steps, {max(gaps):.1e} over {STEPS}",
            flush=True,
        )
    draw(found, out / "losses.png")
    return found["2 processes × 1 device"] == found["the same again"]


def draw(found: dict[str, list[float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    for n, (name, values) in enumerate(found.items()):
        above.plot(range(1, STEPS + 1), values, label=name, linewidth=6 - n, alpha=0.6)
        below.plot(range(1, STEPS + 1), [b - a for a, b in zip(found["1 process × 1 device"], values)], label=name)
    above.set_ylabel("loss")
    below.set_ylabel("difference")
    below.set_xlabel("step")
    above.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="its content is replaced")
    out = parser.parse_args().out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    repeats = []
    for name in ("relu", "smooth"):
        print(f"{name}:", flush=True)
        if name == "smooth":
            smooth(out / name / "without_relu")
        repeats.append(compare(out / name))
        print(f"  two runs on the same two processes: {'equal to the bit' if repeats[-1] else 'DIFFERENT'}", flush=True)
    return 0 if all(repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
