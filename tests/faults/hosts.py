"""Takes hosts from a run on a test bed of two, and compares the result with that of an undisturbed run.

    python tests/faults/hosts.py                    # all of them, then a table
    python tests/faults/hosts.py worker frozen      # some: worker stopped cut frozen driver noticed added lost

As root, on Linux (`tests/testbed.py`). A run that was disturbed has to end with its final checkpoint, and, on
the layout it began on, with the same bits.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from testbed import Testbed  # noqa: E402

from faults import bits  # noqa: E402
from ifvit import checkpoint  # noqa: E402

BACK = 20  # seconds until the bed gives back what it took
WORKER = r"ray::\S*RayTrainWorker"


@dataclass(frozen=True)
class Training:
    """Module 1 of preset smoke, drawn out; epochs long enough that a fault hits one."""

    epochs: int = 10
    pairs: int = 600
    hang_timeout: float = 15
    resume: str = "auto"

    def words(self, folder: Path, workers: str) -> list[str]:
        return [
            "python",
            "-m",
            "ifvit.train_dense",
            "--preset",
            "smoke",
            "--dataset_root",
            "synthetic",
            "--checkpoint_dir",
            str(folder),
            "--num_workers",
            workers,
            "--num_epochs",
            str(self.epochs),
            "--set",
            f"pairs_per_epoch={self.pairs}",
            "--resume",
            self.resume,
            "--hang_timeout",
            f"{self.hang_timeout:g}",
        ]


@dataclass
class Run:
    """A job on the bed."""

    bed: Testbed
    training: Training
    folder: Path
    workers: str = "2"

    def __post_init__(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.began = time.monotonic()
        self.jobs = []
        self.submit()

    def submit(self) -> None:
        self.jobs.append(self.bed.submit(self.training.words(self.folder, self.workers)))

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 240) -> None:
        until = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > until:
                raise TimeoutError(f"{what} did not come in {seconds:.0f} s:\n{self.said[-3000:]}")
            if self.bed.status(self.jobs[-1]) in ("SUCCEEDED", "FAILED", "STOPPED"):
                raise RuntimeError(f"the run has ended before {what}:\n{self.said[-3000:]}")
            time.sleep(0.2)

    def first_steps(self) -> float:
        """Seconds from the submission until the first row of training stands in the metrics, at most ten steps."""
        rows = self.folder / "metrics.jsonl"
        self.until(lambda: rows.exists() and '"train"' in rows.read_text(), "the first steps")
        return time.monotonic() - self.began

    def epoch(self, n: int) -> None:
        """Waits for an epoch's checkpoint, then for the midst of the next one."""
        self.until(lambda: (self.folder / f"dense_reg_epoch_{n}").exists(), f"epoch {n}")
        time.sleep(1)

    def end(self, seconds: float = 500) -> float:
        """Waits for the end; seconds from the first submission on."""
        status = self.bed.wait(self.jobs[-1], seconds)
        if status != "SUCCEEDED":
            raise RuntimeError(f"{status}:\n{self.said[-6000:]}")
        return time.monotonic() - self.began

    @property
    def said(self) -> str:
        return "\n".join(self.bed.logs(job) for job in self.jobs)

    def a_worker(self) -> int:
        """The process id of a worker, of host 1 if it has one."""
        return next(pid for host in (1, 0) for pid in self.bed.processes(host, WORKER))


def worker(run: Run) -> None:
    """kill -9 of a worker"""
    run.epoch(3)
    os.kill(run.a_worker(), signal.SIGKILL)


def stopped(run: Run) -> None:
    """a host's Ray is stopped, and back after 20 s"""
    run.epoch(3)
    run.bed.stop_host(1)
    time.sleep(BACK)
    run.bed.start_host(1)


def cut(run: Run) -> None:
    """a host's link is cut, and back after 20 s"""
    run.epoch(3)
    run.bed.cut(1)
    time.sleep(BACK)
    run.bed.start_host(1)  # mends the link; Ray does not take back a host that it has called dead


def frozen(run: Run) -> None:
    """a worker is frozen (SIGSTOP) in the midst of a step"""
    run.epoch(3)
    os.kill(run.a_worker(), signal.SIGSTOP)


def driver(run: Run) -> None:
    """the driver is killed, and the same job submitted again"""
    run.epoch(3)
    for pid in run.bed.processes(0, "ifvit.train_dense"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.bed.wait(run.jobs[-1], 60)
    run.submit()


def noticed(run: Run) -> None:
    """a host is given notice of 20 s (a drain, as on preemption), goes, and is back 20 s later"""
    run.epoch(3)
    run.bed.drain(1, BACK)
    run.until(lambda: "A host will go soon: saving" in run.said, "a save on notice")
    time.sleep(BACK)
    run.bed.kill_host(1)
    time.sleep(BACK)
    run.bed.start_host(1)


def added(run: Run) -> None:
    """one host, and a second one comes (--num_workers 1:2)"""
    run.epoch(1)
    run.bed.start_host(1)
    run.until(lambda: "in 2 processes" in run.said, "a second process")


def lost(run: Run) -> None:
    """two hosts, and one goes for good (--num_workers 1:2)"""
    run.epoch(3)
    run.bed.cut(1)
    run.bed.kill_host(1)


SAME_LAYOUT = (worker, stopped, cut, frozen, driver, noticed)
ELASTIC = (added, lost)


def state(folder: Path) -> dict:
    """Bits of the final checkpoint's state, which has to be of a finished run."""
    found = checkpoint.load(folder / "dense_reg_ckpt")
    assert found.metadata["finished"], folder
    return bits(found.state)


def disturbed(bed: Testbed, training: Training, fault: Callable[[Run], None], folder: Path) -> tuple[float, str]:
    """Runs it with a fault; seconds it took, and what its log says of the attempts."""
    if fault is added:
        bed.kill_host(1)
        until = time.monotonic() + 60
        while bed.hosts_alive() > 1 and time.monotonic() < until:
            time.sleep(0.5)
    run = Run(bed, training, folder, "1:2" if fault in ELASTIC else "2")
    fault(run)
    seconds = run.end()
    (folder / "log.txt").write_text(run.said)
    return seconds, "; ".join(re.findall(r"Lost: ([^;\n]*)", run.said)) or "nothing said"


def main() -> None:
    every = {f.__name__: f for f in (*SAME_LAYOUT, *ELASTIC)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", default=list(every), help="all of them if none is named")
    parser.add_argument("--out", type=Path, default=Path("/tmp/ifvit_hosts"))
    parser.add_argument("--epochs", type=int, default=Training.epochs)
    parser.add_argument("--pairs", type=int, default=Training.pairs, help="an epoch")
    args = parser.parse_args()
    if why := Testbed.available():
        sys.exit(f"No test bed here: {why}")
    training = Training(args.epochs, args.pairs)
    rows, wrong = [], []
    with Testbed(hosts=2, folder=args.out / "ray") as bed:
        Run(bed, Training(1, 8), args.out / "warm").end()  # fills the cache of compiled programs
        run = Run(bed, training, args.out / "plain")
        print(
            f"{run.first_steps():.0f} s from the job's submission to its first steps, compiled programs in the cache",
            flush=True,
        )
        plain = run.end()
        again = Run(bed, training, args.out / "again").end()
        undisturbed = state(args.out / "plain")
        if state(args.out / "again") != undisturbed:
            wrong.append("two runs that nothing disturbed differ")
        rows.append(("undisturbed, twice", f"{plain:.0f}, {again:.0f}", "", "", "equal"))
        for name in args.faults:
            for host in (0, 1):
                if not bed.processes(host, "raylet"):
                    bed.start_host(host)
            try:
                seconds, said = disturbed(bed, training, every[name], args.out / name)
                same = state(args.out / name) == undisturbed
                if every[name] in SAME_LAYOUT and not same:
                    wrong.append(f"{name}: other bits than undisturbed")
                rows.append(
                    (
                        every[name].__doc__,
                        f"{seconds:.0f}",
                        f"{seconds - min(plain, again):.0f}",
                        said,
                        "equal" if same else "another layout" if every[name] in ELASTIC else "DIFFERENT",
                    )
                )
            except Exception as e:
                wrong.append(f"{name}: {e}")
                rows.append((every[name].__doc__, "", "", "", "FAILED"))
                bed.start_host(0), bed.start_host(1)
            print(" | ".join(rows[-1]), flush=True)
    print("\n| fault | seconds | more than undisturbed | lost, by its log | final state |\n|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print("\n".join(wrong) if wrong else "All good.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
