"""Training runs that take turns of ten steps: while one trains, all processes of the others are stopped.

So they meet the same load on the machine, and the same speed.
"""

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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ifvit.training.metrics import read_rows  # noqa: E402

MARK = "TURNS_RUN"  # in the environment of a run's processes
ROW = 10  # steps


class Run:
    """A run that stands still but for its turns."""

    def __init__(self, out: Path, words: list[str], tree: Path = ROOT):
        """`words` after `python -m`, of the code in `tree`; its metrics lie in `out`."""
        shutil.rmtree(out, ignore_errors=True)
        self.rows, self.mark = out / "metrics.jsonl", uuid.uuid4().hex
        self.log = out.with_suffix(".log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words, "--checkpoint_dir", str(out)],
            cwd=tree,
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


def ratios(times: dict[str, list[float]], of: str, to: str) -> str:
    """How many times as long a step of one takes as of the other, with the spread over the rounds."""
    found = sorted(a / b for a, b in zip(times[of], times[to]))
    quarter = len(found) // 4
    return (
        f"{statistics.median(found):.3f} times as long, the middle half of {len(found)} rounds "
        f"{found[quarter]:.3f} … {found[-1 - quarter]:.3f}, all {found[0]:.3f} … {found[-1]:.3f}"
    )
