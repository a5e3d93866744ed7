"""What checkpoints cost, as ratios of one run: saving and restoring against a plain file, and a training step's wait.

    python tests/bench/checkpoint_cost.py --out DIR [--gigabytes 1] [--rounds 5] [--preset cpu]

Save and restore of a state of random float32 against one sequential write (with fsync) and read (caches
dropped) of the same bytes; digests apart. A restore ends in arrays, and so does the read that it is compared with: on a
virtual machine memory that is touched for the first time costs more than the disk. Beside it stands the ratio
to a read that throws away what it has read. The wait: seconds that `Saver.start` holds the loop up, against a step.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from ifvit import checkpoint
from ifvit.checkpoint import digest
from ifvit.cli import use_huge_pages
from ifvit.config import DenseConfig, preset
from ifvit.devices.sharding import use_cpu_cores
from ifvit.training.policy import Saved
from ifvit.training.saver import Saver

META = {"epoch": 1, "config": {}, "step": 1, "finished": False, "best": None, "value": None}


def timed(call) -> float:
    clock = time.perf_counter()
    call()
    return time.perf_counter() - clock


def drop_caches() -> None:
    """Falls back to dropping nothing where that is not permitted; says so once."""
    os.sync()
    subprocess.run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"], check=True)


def plain_write(file: Path, arrays: list[np.ndarray]) -> None:
    with file.open("wb") as f:
        for a in arrays:
            f.write(a.view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())


def plain_read(file: Path, arrays: list[np.ndarray]) -> list[np.ndarray]:
    read = [np.empty(a.nbytes, np.uint8) for a in arrays]
    with file.open("rb") as f:
        for a in read:
            f.readinto(a.data)
    return read


def throwaway_read(file: Path, arrays: list[np.ndarray]) -> None:
    buffer = np.ones(max(a.nbytes for a in arrays), np.uint8)
    with file.open("rb") as f:
        while f.readinto(buffer.data):
            pass


def large_state(out: Path, gigabytes: float, rounds: int) -> None:
    rng = np.random.default_rng(0)
    count = max(1, round(100 * gigabytes))
    state = {"params": {f"w{i}": jax.device_put(rng.random((2500, 1000), np.float32)) for i in range(count)}}
    jax.block_until_ready(state)
    arrays = [np.asarray(x) for x in jax.tree.leaves(state)]
    size = sum(a.nbytes for a in arrays) / 1e9
    where = jax.tree.map(lambda x: x.sharding, state)
    ratios = {
        f"{what}{less}, of {plain}": []
        for what, plain in (
            ("save", "a plain write"),
            ("restore", "a plain read"),
            ("restore", "a read that keeps nothing"),
        )
        for less in ("", " less digests")
    }
    rates = []

    def reads() -> list[float]:
        seconds = []
        for read in (plain_read, throwaway_read):
            drop_caches()
            seconds.append(timed(lambda: read(out / "plain", arrays)))
        return seconds

    for _ in range(rounds):
        write = timed(lambda: plain_write(out / "plain", arrays))
        save = timed(lambda: checkpoint.save(out / "ckpt", "dense_reg", state, META))
        write = (write + timed(lambda: plain_write(out / "plain", arrays))) / 2
        read, thrown = reads()
        drop_caches()
        path = epath.Path(out / "ckpt")
        restore = timed(
            lambda: jax.block_until_ready(checkpoint.restore(path, checkpoint.read_metadata(path), where).state)
        )
        read, thrown = ((a + b) / 2 for a, b in zip((read, thrown), reads()))
        digests = timed(lambda: [digest.digest(a) for a in arrays])
        rates.append(size / digests)
        digests_here = digests / (os.cpu_count() or 1)
        plain = [
            write / save,
            write / (save - digests_here),
            *(t for r in (read, thrown) for t in (r / restore, r / (restore - digests_here))),
        ]
        for values, ratio in zip(ratios.values(), plain):
            values.append(ratio)
        print(
            f"write {size / write:.2f} GB/s, save {size / save:.2f}; read {size / read:.2f} ({size / thrown:.2f} where "
            f"nothing is kept), restore {size / restore:.2f}; digests {rates[-1]:.2f} GB/s a core",
            flush=True,
        )
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} [{min(values):.2f} … {max(values):.2f}]")
    print(f"digests: {statistics.median(rates):.2f} GB/s a core [{min(rates):.2f} … {max(rates):.2f}]")


def wait_of_a_step(out: Path, name: str, rounds: int) -> None:
    """Trains on random pixels; every third step is followed by a save, as soon as the one before is done."""
    from ifvit.devices.sharding import make_mesh, put_batch, replicated, shardings
    from ifvit.training.dense import dense_program
    from ifvit.training.resume import begin
    from ifvit.training.saved import saved_tree
    from ifvit.training.task import Task

    config = preset(name, DenseConfig)
    program = dense_program(config.program())
    mesh = make_mesh(config.batch_size)
    task = Task("dense_reg", config, 100, "", program.init, program.step, None, (), None, None, "accuracy", True, {})
    placement = shardings(jax.eval_shape(task.init, 0), mesh)
    jitted = jax.jit(task.step, donate_argnums=0, out_shardings=(placement, replicated(mesh)))
    step = lambda state, batch: jitted(state, batch, np.float32(1e-3), config.scalars())
    rng = np.random.default_rng(0)
    canvas = lambda: rng.integers(0, 255, (config.batch_size, config.canvas_size, config.canvas_size), np.uint8)
    host = {
        "canvas0": canvas(),
        "canvas1": canvas(),
        "mask0": canvas() > 20,
        "mask1": canvas() > 20,
        "genuine": np.ones(config.batch_size, bool),
        "label0": np.zeros(config.batch_size, np.int32),
        "label1": np.zeros(config.batch_size, np.int32),
    }
    state = begin(task, placement)
    saver = Saver(epath.Path(out / "run"), "dense_reg", config, 100, True)
    waits, alone, beside, writes = [], [], [], []
    with jax.set_mesh(mesh):
        state, _ = jax.block_until_ready(step(state, put_batch(host, mesh)))
        for n in range(1, 3 * rounds + 4):
            clock = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, put_batch(host, mesh)))
            (beside if n % 3 == 1 and n > 1 else alone).append(time.perf_counter() - clock)
            if n % 3 == 0:
                saver.blocked = 0.0
                saver.start(Saved(f"dense_reg_step_{n}", n, None, None), saved_tree(state, task), META, None)
                waits.append(saver.blocked)
            elif n % 3 == 2:
                writes.append(timed(saver.settle))
    saver.close()
    waits = waits[1:]  # the first compiles the copy
    median, step_time = statistics.median(waits), statistics.median(alone)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    print(
        f"preset {name}, state of {size:.1f} MB: a save holds training up {1e3 * median:.1f} ms "
        f"[{1e3 * min(waits):.1f} … {1e3 * max(waits):.1f}], {median / step_time:.2%} of a step of {step_time:.2f} s; "
        f"a step beside a write takes {statistics.median(beside) / step_time:.2f} times as long"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a directory on the disk to measure; its content is replaced"
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="cpu")
    args = parser.parse_args()
    use_huge_pages()  # as every command does
    use_cpu_cores()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    wait_of_a_step(args.out, args.preset, args.rounds)
    large_state(args.out, args.gigabytes, args.rounds)
    shutil.rmtree(args.out)


if __name__ == "__main__":
    main()
