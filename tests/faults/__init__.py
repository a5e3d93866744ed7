"""Faults made on purpose, from outside: runs are killed, checkpoints damaged, the disk taken away.

    python tests/faults/kill.py --count 50 --inside 10
    python tests/faults/damage.py CHECKPOINT
    python tests/faults/disk.py

What comes of them is compared to the bit with a run that nothing disturbed. The three know of ifvit its
commands, their exit codes, the names of checkpoints, `checkpoint.load` and the rows of metrics.jsonl.
Here is what they share.
"""

import collections
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from xla import flags

# Before JAX is imported, as in conftest: small programs, which take longer to optimise than to run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", flags())

import numpy as np

from ifvit import checkpoint
from ifvit.errors import UserError
from ifvit.training.metrics import TIMES

logging.getLogger("absl").setLevel(logging.ERROR)  # as the commands have it

NAMES = {"dense": "dense_reg", "match": "matcher"}
UNFINISHED = (".orbax-checkpoint-tmp", ".new")  # in the name, or at its end: a checkpoint that is being written
PATIENCE = 400  # seconds that no process here needs
IDLE = 60  # seconds without work after which one has hung


# ---- commands and their processes


@dataclass(frozen=True)
class Training:
    """A training command; only its checkpoint directory is still open."""

    module: str = "dense"  # or `match`
    prints: str = "synthetic"
    epochs: int = 12
    sets: tuple[str, ...] = ("save_every=1",)
    module1: str = ""  # checkpoint that a matcher starts from

    @property
    def name(self) -> str:
        return NAMES[self.module]

    def words(self, folder: Path) -> list[str]:
        """What stands after `python`."""
        start = ["--pretrained_ckpt", self.module1] if self.module == "match" else []
        sets = [word for item in self.sets for word in ("--set", item)]
        return [
            "-m",
            f"ifvit.train_{self.module}",
            "--dataset_root",
            self.prints,
            "--checkpoint_dir",
            str(folder),
            "--preset",
            "smoke",
            "--num_epochs",
            str(self.epochs),
            *start,
            *sets,
        ]


class Said(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


class Process:
    """A command in a process group of its own; what it says lies in `files`.out and `files`.err."""

    def __init__(self, words: list[str], files: Path, before: list[str] = ()):
        files.parent.mkdir(parents=True, exist_ok=True)
        self._files = [files.with_suffix(suffix) for suffix in (".out", ".err")]
        # the tunable is what a command gives itself at start-up, by starting once more: a second saved
        env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.started = time.monotonic()
            self._process = subprocess.Popen(
                [*before, sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env=env,
            )
        self._worked = 0.0, 0.0  # processor time, and when it was last seen to have grown
        self._hung = ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def alive(self) -> bool:
        if self._process.poll() is not None:
            return False
        if (now := self.seconds) > self._worked[1] + 1:  # looks once a second
            work = self._work()
            if work > self._worked[0] + 0.05:
                self._worked = work, now
            if now > min(PATIENCE, self._worked[1] + IDLE):
                self._hung = f"\nIt hung, and was killed after {now:.0f} s.\n"
                self.kill()
                return False
        return True

    def _work(self) -> float:
        """Seconds of processor time."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL to the whole group; returns when it is dead."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self) -> Said:
        while self.alive:
            time.sleep(0.01)
        return self.said

    def until(self, holds: Callable[[], bool]) -> bool:
        """Waits until `holds` or the process has ended; whether it holds."""
        while not (held := holds()) and self.alive:
            time.sleep(0.005)
        return held or holds()

    @property
    def said(self) -> Said:
        out, err = (f.read_text(errors="replace") for f in self._files)
        return Said(self._process.poll(), out, err + self._hung)


# ---- what a checkpoint directory shows


def unfinished(folder: Path) -> set[tuple[str, int]]:
    """(name, inode) of what is being written, or was when somebody died."""
    try:
        with os.scandir(folder) as entries:
            return {(e.name, e.inode()) for e in entries if UNFINISHED[0] in e.name or e.name.endswith(UNFINISHED[1])}
    except FileNotFoundError:
        return set()


def checkpoints(folder: Path, name: str) -> list[Path]:
    """What bears the name of a whole checkpoint."""
    if not folder.is_dir():
        return []
    whole = re.compile(rf"{name}_(ckpt|best|(epoch|step)_\d+)")
    return sorted((p for p in folder.iterdir() if whole.fullmatch(p.name)), key=lambda p: p.stat().st_mtime)


def rows(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without what tells of time; a line cut short is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines if line.endswith("}")]


def good(paths: list[Path]) -> tuple[dict[str, dict], list[str]]:
    """Metadata of those that load, by name, and what is said of those that do not."""
    found, wrong = {}, []
    for path in paths:
        try:
            found[path.name] = checkpoint.load(path).metadata
        except Exception as e:  # one that is no UserError is wrong too
            wrong.append(f"{path.name} is not whole: {type(e).__name__}: {e}")
    return found, wrong


def bits(tree) -> dict[str, tuple]:
    """Leaf -> type, shape and bytes."""
    if not isinstance(tree, dict):
        return {"": (np.asarray(tree).dtype.name, np.shape(tree), np.asarray(tree).tobytes())}
    return {f"{k}/{name}".rstrip("/"): leaf for k, below in tree.items() for name, leaf in bits(below).items()}


def resumed(out: str) -> tuple[str, int] | None:
    """Name and step of the checkpoint that a run said it goes on from."""
    found = re.search(r"([^/\s]+), step (\d+) of \d+", out)
    return (found[1], int(found[2])) if found else None


# ---- a run that nothing disturbs, and what is not as there


@dataclass(frozen=True)
class Pace:
    """Seconds, as a process that watches sees them."""

    start: float  # from the start of the process to the first sign of a step
    step: float
    tail: float  # from the first sign of the last step to the end of the process
    save: float  # median time that a checkpoint is being written


@dataclass(frozen=True)
class Undisturbed:
    training: Training
    folder: Path
    pace: Pace
    total: int  # steps
    steps_per_epoch: int


@dataclass
class Watch:
    """Looks at a run's directory: the step it has reached, and what it is writing."""

    folder: Path
    name: str
    steps_per_epoch: int | None = None
    step: int = 0
    since: float | None = None  # when this step was first seen; None before the first sign of life
    first_sign: float | None = None  # when that was
    seen: dict[tuple[str, int], list[float]] = field(default_factory=dict)  # being written -> first, last seen
    _size: tuple | None = None

    def __post_init__(self):
        self.stale = unfinished(self.folder)  # a dead process has left them
        self.step = self._step()

    def look(self) -> set[tuple[str, int]]:
        """What is being written now, by whoever lives now."""
        now = time.monotonic()
        writing = unfinished(self.folder)
        self.stale &= writing
        writing -= self.stale
        for entry in writing:
            self.seen.setdefault(entry, [now, now])[1] = now
        if (step := self._step()) > self.step:
            self.step, self.since = step, now
            self.first_sign = self.first_sign or now
        return writing

    def _step(self) -> int:
        """The largest step that a row of metrics or a checkpoint's name tells of."""
        try:
            stat = os.stat(self.folder / "metrics.jsonl")
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return self.step
        step = self.step
        if (stat.st_ino, stat.st_size) != self._size:
            self._size = stat.st_ino, stat.st_size
            step = max([step] + [r["step"] for r in rows(self.folder)])
        return max([step] + [int(found[1]) for n in names if (found := re.match(rf"{self.name}_step_(\d+)", n))])


def undisturbed(training: Training, out: Path) -> Undisturbed:
    """Runs it to the end, and takes its time; RuntimeError where it does not end well."""
    folder = out / "undisturbed"
    process = Process(training.words(folder), out / "undisturbed_said")
    watch = Watch(folder, training.name)
    signs = []
    while process.alive:
        watch.look()
        if watch.since is not None and (not signs or signs[-1][0] != watch.step):
            signs.append((watch.step, watch.since - process.started))
        time.sleep(0.001)
    ended, said = process.seconds, process.wait()
    if said.code or len(signs) < 2:
        raise RuntimeError(f"the undisturbed run ended with {said.code}\n{said.out}\n{said.err[-4000:]}")
    meta = checkpoint.load(folder / f"{training.name}_ckpt").metadata
    (first, start), (last, almost) = signs[0], signs[-1]
    times = sorted(b - a for a, b in watch.seen.values()) or [0.0]
    pace = Pace(start, (almost - start) / (last - first), ended - almost, times[len(times) // 2])
    return Undisturbed(training, folder, pace, meta["step"], meta["step"] // training.epochs)


def differences(folder: Path, of: Undisturbed, best: bool = True) -> list[str]:
    """What of a run that has ended is not as in the undisturbed one; nothing, where all is well.

    Without `best` its best epoch may be another one, as where the disk was away at that moment.
    """
    name, wrong = of.training.name, []
    _, broken = good(checkpoints(folder, name))
    for which in (f"{name}_ckpt", f"{name}_best")[: 1 + best]:
        try:
            have, want = checkpoint.load(folder / which), checkpoint.load(of.folder / which)
        except UserError as e:
            wrong.append(str(e))
            continue
        ours, theirs = bits(have.state), bits(want.state)
        if unlike := sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)):
            wrong.append(f"{which}: {len(unlike)} of {len(theirs)} leaves differ, e.g. {unlike[0]}")
        if bits(have.aligner or {}) != bits(want.aligner or {}):
            wrong.append(f"{which}: the aligner differs")
        keys = "module", "epoch", "step", "best", "finished", "data", "num_classes", "fusion"
        wrong += [
            f"{which}: {k} is {have.metadata.get(k)}, undisturbed {want.metadata.get(k)}"
            for k in keys
            if have.metadata.get(k) != want.metadata.get(k)
        ]
    if rows(folder) != rows(of.folder):
        ours, theirs = ({(r["step"], r["split"]): r for r in rows(f)} for f in (folder, of.folder))
        places = [(r["step"], r["split"]) for r in rows(folder)]
        unlike = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        wrong.append(
            f"metrics.jsonl: {len(places)} rows, undisturbed {len(theirs)}"
            + (
                f"; {len(unlike)} differ or are missing, first that of step {unlike[0][0]} ({unlike[0][1]})"
                if unlike
                else "; some twice or in another order"
            )
        )
    return wrong + broken + [f"{left} is left behind" for left, _ in sorted(unfinished(folder))]


def leftovers(folder: Path, of: Undisturbed) -> list[str]:
    """What else lies there and not in the undisturbed run's directory, or the other way about."""
    ours, theirs = ({p.name for p in f.iterdir()} for f in (folder, of.folder))
    return sorted(f"{n} is only here" for n in ours - theirs) + sorted(f"{n} is missing" for n in theirs - ours)


def no_traceback(said: Said) -> list[str]:
    """A complaint where Python's own words for an error reached the user."""
    text = said.out + said.err
    if "Traceback" not in text:
        return []
    errors = collections.Counter(re.findall(r"^[\w.]+(?:Error|Exception|Interrupt|Damaged): .{0,160}", text, re.M))
    return [f"{text.count('Traceback')} tracebacks, most often {(errors.most_common(1) or [['…']])[0][0]}"]


def one_sentence(said: Said) -> list[str]:
    """A complaint unless stderr is `Error: …` on one line, no traceback."""
    lines = [line for line in said.err.strip().splitlines() if line.strip()]
    if len(lines) != 1 or not lines[0].startswith("Error: "):
        return [f"stderr is not one sentence: {said.err[-300:]!r}"]
    return []


def remove(folder: Path) -> None:
    """rm -rf, also of what is still being written into."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
