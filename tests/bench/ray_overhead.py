"""What a training step costs under Ray with one worker, against one in this process.

    python tests/bench/ray_overhead.py --out DIR --rounds 12

Two runs of Module 1, one under Ray, take turns of ten steps. While one trains, all processes of the other are stopped,
Ray's own too. So both meet the same load on the machine, and the same speed. A round is a turn of each.
"""

import argparse
import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ifvit.training.metrics import read_rows

MARK = "RAY_OVERHEAD_RUN"  # in the environment of a run's processes
ROW = 10  # steps


class Run:
    """A run that stands still but for its turns."""

    def __init__(self, out: Path, flags: list[str], runtime: list[str]):
        shutil.rmtree(out, ignore_errors=True)
        self.rows, self.mark = out / "metrics.jsonl", uuid.uuid4().hex
        self.log = out.with_suffix(".log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ifvit.train_dense", "--checkpoint_dir", str(out), *flags, *runtime],
            stdout=self.log,
            stderr=self.log,
            env=os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", MARK: self.mark},
        )
        self.turn()
        self.turn()

    def turn(self) -> float:
        """Seconds until the run has done ten steps more."""
        had, cpu = len(read_rows(self.rows)), self.cpu_seconds()
        clock = time.perf_counter()
        self.send(signal.SIGCONT)
        while len(read_rows(self.rows)) == had:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.process.args} has ended: {Path(self.log.name).read_text()[-2000:]}")
            time.sleep(0.005)
        seconds = time.perf_counter() - clock
        self.send(signal.SIGSTOP)
        self.cpu = {k: v - cpu.get(k, 0) for k, v in self.cpu_seconds().items()}
        return seconds

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def cpu_seconds(self) -> dict[int, float]:
        """What each process has used, by its number."""
        used = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                used[process.pid] = sum(process.cpu_times()[:2])
        return used

    def send(self, what: int) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(what)

    def end(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()


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
            runs[name] = Run(args.out.resolve() / name, flags, runtime)
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
    ratios = sorted(ray / local for local, ray in zip(times["local"], times["ray"]))
    quarter = len(ratios) // 4
    print(
        f"under Ray a step takes {statistics.median(ratios):.3f} times as long, the middle half of {len(ratios)} "
        f"rounds {ratios[quarter]:.3f} … {ratios[-1 - quarter]:.3f}, all {ratios[0]:.3f} … {ratios[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
