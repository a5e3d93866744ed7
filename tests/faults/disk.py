"""Takes a training run's disk away, and shows what the run says, keeps and mends.

The disk is full and then read-only for a while, full to the end, read-only from the start; and the
checkpoint directory is removed under a run. The disk is a small one of its own (tmpfs), made by mount where
that is allowed, else inside a user namespace (unshare); where neither is, only the last is shown.

    python tests/faults/disk.py     # about two minutes on two cores
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import tyro

from faults import (
    Process,
    Said,
    Training,
    Undisturbed,
    checkpoints,
    differences,
    good,
    no_traceback,
    one_sentence,
    remove,
    rows,
    undisturbed,
)

SIZE = "96m"  # some hundred smoke checkpoints
FULL = r"no space left|disk is full|disk full|not enough space|ENOSPC"
READ_ONLY = r"read-only file system|read-only|EROFS"


class Unavailable(Exception):
    """No file system can be mounted here; the message says why."""


class Disk:
    """A small disk that can be filled and made read-only; a process has to be started `before`-hand to see it.

    path: where processes on it find it; outside: where this process does.
    """

    def __init__(self, how: Literal["mount", "unshare", ""] = ""):
        self.path = self.outside = Path(tempfile.mkdtemp(prefix="disk_"))
        self.before: list[str] = []
        self._holder: subprocess.Popen | None = None
        self._filling = threading.Event()
        self._filler: threading.Thread | None = None
        why = []
        if how in ("", "mount"):
            if not (no := self._try("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(self.path))):
                return
            why.append(no)
        if how in ("", "unshare"):
            if not (no := self._unshare()):
                return
            why.append(no)
        self.path.rmdir()
        raise Unavailable(f"no disk of its own can be mounted: {'; '.join(why)}")

    def _unshare(self) -> str:
        """A namespace that lives as long as its `cat`; '' or why there is none."""
        script = f"mount -t tmpfs -o size={SIZE} tmpfs {self.path} && echo ready && exec cat"
        try:
            self._holder = subprocess.Popen(
                ["unshare", "-rm", "sh", "-c", script],
                stdin=subprocess.PIPE,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as e:
            return str(e)
        if self._holder.stdout.readline() != "ready\n":
            return self._holder.communicate()[1].strip()
        number = str(self._holder.pid)
        self.before = ["nsenter", "-t", number, "-U", "-m", "--preserve-credentials"]
        self.outside = Path(f"/proc/{number}/root{self.path}")
        return ""

    def _try(self, *words: str) -> str:
        """'' or what a command that is run on the disk says when it fails."""
        try:
            ended = subprocess.run([*self.before, *words], capture_output=True, text=True)
        except OSError as e:
            return str(e)
        return "" if not ended.returncode else ended.stderr.strip() or f"{words[0]} ended with {ended.returncode}"

    def fill(self) -> None:
        """Full to the last byte until `free`, whatever else is removed from it meanwhile."""
        full = threading.Event()

        def pour():
            with open(self.outside / "filler", "ab", buffering=0) as file:
                while self._filling.is_set():
                    for size in (1 << 20, 4096):
                        try:
                            while self._filling.is_set() and file.write(bytes(size)):
                                pass
                        except OSError:
                            pass
                    full.set()
                    time.sleep(0.005)

        self._filling.set()
        self._filler = threading.Thread(target=pour, daemon=True)
        self._filler.start()
        full.wait(60)

    def free(self) -> None:
        self._filling.clear()
        self._filler.join()
        (self.outside / "filler").unlink()

    def read_only(self) -> None:
        """For everything that is opened from now on; what is open stays writable (a remount would be refused)."""
        for _ in range(50):
            if no := self._try("mount", "--bind", str(self.path), str(self.path)):
                break
            if not (no := self._try("mount", "-o", "remount,ro,bind", str(self.path))):
                return
            self.writable()
            if "busy" not in no:  # a file was opened for writing between the two, else
                break
            time.sleep(0.05)
        raise Unavailable(f"no read-only mount: {no}")

    def writable(self) -> None:
        self._try("umount", "-l", str(self.path))

    def close(self) -> None:
        self._filling.clear()
        if self._holder:
            self._holder.communicate()  # its stdin is closed: `cat`, and with it the namespace, ends
        else:
            while os.path.ismount(self.path) and not self._try("umount", "-l", str(self.path)):
                pass
        shutil.rmtree(self.path, ignore_errors=True)


# ---- what is shown; each returns what was not as it should be


def for_a_while(disk: Disk, of: Undisturbed, out: Path) -> list[str]:
    """Full, then read-only for a while: it says each time that a checkpoint could not be written and why, trains on,
    tries again, loses nothing of what was there, and ends as ever."""
    run = disk.path / "run", disk.outside / "run"
    remove(run[1])
    process = Process(of.training.words(run[0]), out / "for_a_while", disk.before)
    if not process.until(lambda: _under_way(run[1], of)):
        return [f"it ended before anything was done to it: {_last_words(process.wait())}"]
    wrong, copies = [], []
    for what, reason, begin, end in (
        ("full", FULL, disk.fill, disk.free),
        ("read-only", READ_ONLY, disk.read_only, disk.writable),
    ):
        before = _names(run[1], of)
        begin()
        told = lambda: _complaints(process.said, of, reason)
        if not process.until(lambda: bool(told())):
            wrong.append(f"{what}: it does not say that a checkpoint could not be written, and why")
        elif not process.until(lambda: len(told()) > 1):
            wrong.append(f"{what}: it does not try again at the next checkpoint, or does not say so")
        copies.append((what, _copied(run[1], of, out / f"while_{what}"), before))
        there = _names(run[1], of)
        end()
        if not process.until(lambda: bool(_names(run[1], of) - there)):
            wrong.append(f"{what}: no checkpoint was written afterwards")
    said = process.wait()
    wrong += [f"{what}: {w}" for what, copy, before in copies for w in _kept(copy, before, of)]
    if said.code:
        wrong.append(f"exit code {said.code}, not 0: {_last_words(said)}")
    return wrong + no_traceback(said) + _compared(run[1], of, out / "for_a_while_copy", best=False)


def full_to_the_end(disk: Disk, of: Undisturbed, out: Path) -> list[str]:
    """Full and never freed: exit code 1 and a sentence; the same command, when there is room, ends as ever."""
    run = disk.path / "run", disk.outside / "run"
    remove(run[1])
    process = Process(of.training.words(run[0]), out / "full_to_the_end", disk.before)
    if not process.until(lambda: _under_way(run[1], of)):
        return [f"it ended before the disk was full: {_last_words(process.wait())}"]
    before = _names(run[1], of)
    disk.fill()
    said = process.wait()
    wrong = _kept(_copied(run[1], of, out / "while_full_to_the_end"), before, of) + no_traceback(said)
    disk.free()
    if said.code != 1:
        wrong.append(f"exit code {said.code}, not 1: {_last_words(said)}")
    if not re.search(r"^Error: .*checkpoint", said.err, re.M):
        wrong.append(f"no sentence `Error: …` that tells of a checkpoint: {_last_words(said)}")
    if not re.search(FULL, said.out + said.err, re.I):
        wrong.append("it does not say that the disk is full")
    said = Process(of.training.words(run[0]), out / "freed", disk.before).wait()
    if said.code:
        wrong.append(f"with room again the same command ended with {said.code}: {_last_words(said)}")
    return wrong + no_traceback(said) + _compared(run[1], of, out / "full_to_the_end_copy")


def read_only_at_start(disk: Disk, of: Undisturbed, out: Path) -> list[str]:
    """Read-only from the start: exit code 2, one sentence, nothing trained."""
    remove(disk.outside / "run")
    disk.read_only()
    try:
        said = Process(of.training.words(disk.path / "run"), out / "read_only_at_start", disk.before).wait()
    finally:
        disk.writable()
    wrong = one_sentence(said) + no_traceback(said)
    if said.code != 2:
        wrong.append(f"exit code {said.code}, not 2: {_last_words(said)}")
    if not re.search(READ_ONLY, said.err, re.I) or str(disk.path / "run") not in said.err:
        wrong.append(f"stderr does not say that {disk.path / 'run'} is read-only: {said.err[-300:]!r}")
    return wrong


def removed(of: Undisturbed, out: Path) -> list[str]:
    """The checkpoint directory is removed under a run, which goes on, makes it anew and ends as ever."""
    folder = out / "removed"
    remove(folder)
    process = Process(of.training.words(folder), out / "removed_said")
    if not process.until(lambda: _under_way(folder, of)):
        return [f"it ended before the directory was removed: {_last_words(process.wait())}"]
    remove(folder)  # returns when it is gone
    said = process.wait()
    wrong = no_traceback(said)
    if said.code:
        wrong.append(f"exit code {said.code}, not 0: {_last_words(said)}")
    if not folder.exists():
        return wrong + ["the directory was not made anew"]
    wrong += [f"{file} is missing" for file in ("config.json", "metrics.jsonl") if not (folder / file).exists()]
    return wrong + differences(folder, of, best=False)


SHOWN: dict[str, Callable] = {f.__name__: f for f in (for_a_while, full_to_the_end, read_only_at_start)}


# ---- their parts


def _under_way(folder: Path, of: Undisturbed) -> bool:
    """A quarter of the run is done, and there is a checkpoint of it."""
    done = max((r["step"] for r in rows(folder)), default=0)
    return 4 * done >= of.total and bool(_names(folder, of))


def _names(folder: Path, of: Undisturbed) -> set[str]:
    """Names of the checkpoints that a run goes on from."""
    return {p.name for p in checkpoints(folder, of.training.name)} - {f"{of.training.name}_best"}


def _complaints(said: Said, of: Undisturbed, reason: str) -> list[str]:
    """Lines of the run that tell of a checkpoint and of `reason`."""
    lines = re.split(r"[\n\r]", said.out + "\n" + said.err)
    of_a_checkpoint = rf"checkpoint|{of.training.name}_"
    return [line for line in lines if re.search(reason, line, re.I) and re.search(of_a_checkpoint, line)]


def _kept(copies: Path, before: set[str], of: Undisturbed) -> list[str]:
    """Complaints unless a copy is as far as the furthest of `before`, and all of them are whole.

    The furthest itself may be gone by policy: a run gets on while a disk fills.
    """
    found, wrong = good(checkpoints(copies, of.training.name))
    there = max((metadata["step"] for name, metadata in found.items() if name != f"{of.training.name}_best"), default=0)

    def step(name: str) -> int:
        if name == f"{of.training.name}_ckpt":
            return of.total
        return int(re.sub(r"\D", "", name)) * (of.steps_per_epoch if "_epoch_" in name else 1)

    lost = there < max(map(step, before))
    return wrong + [f"of {sorted(before)}, which were there before, it kept {sorted(found)}"] * lost


def _copied(folder: Path, of: Undisturbed, to: Path) -> Path:
    """Copies of the checkpoints, on a disk that is at peace; the run may be replacing one meanwhile."""
    remove(to)
    to.mkdir()
    for path in checkpoints(folder, of.training.name):
        for _ in range(100):
            try:
                shutil.copytree(path, to / path.name)
                break
            except (OSError, shutil.Error):
                remove(to / path.name)
                time.sleep(0.01)
                if not path.exists():
                    break
    return to


def _compared(folder: Path, of: Undisturbed, copy: Path, best: bool = True) -> list[str]:
    remove(copy)
    shutil.copytree(folder, copy)
    return differences(copy, of, best)


def _last_words(said: Said) -> str:
    lines = [line for line in re.split(r"[\n\r]", said.err) if line.strip()]
    return f"exit code {said.code}, {lines[-1][:200] if lines else 'nothing said'!r}"


@dataclass(frozen=True)
class Args:
    out: str = ""
    """where everything lies; left out, a new folder in the temporary one"""
    how: Literal["mount", "unshare", ""] = ""
    """how the disk is made; left out, whatever works"""


def main(args: Args) -> int:
    out = Path(args.out or tempfile.mkdtemp(prefix="disk_out_")).absolute()
    print(f"everything lies in {out}", flush=True)
    of = undisturbed(Training(), out)
    failures = 0

    def show(name: str, what: str, wrong: list[str]) -> None:
        nonlocal failures
        failures += bool(wrong)
        print(
            f"{'FAILURE' if wrong else 'good':8s} {name}: {what}",
            *(f"         {w}" for w in wrong),
            sep="\n",
            flush=True,
        )

    for name, shown in SHOWN.items():
        what = " ".join(shown.__doc__.split())
        try:
            disk = Disk(args.how)
            try:
                show(name, what, shown(disk, of, out))
            finally:
                disk.close()
        except Unavailable as e:
            print(f"left out {name}: {e}", flush=True)
    show("removed", removed.__doc__, removed(of, out))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
