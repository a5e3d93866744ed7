"""Kills a training run again and again with SIGKILL, and shows that it ends as if nothing had been.

Every run is killed up to five times at moments spread over its steps and its end, now and then while it
starts, and while a checkpoint is being written; the same command goes on each time. After each kill
every checkpoint has to be whole and the newest one what is gone on from; at the end the parameters, the
best ones and the metrics have to be those of a run that nobody touched.

    python tests/faults/kill.py --count 50 --inside 10     # about 20 minutes on two cores
"""

import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import tyro

from faults import (
    Process,
    Training,
    Undisturbed,
    Watch,
    checkpoints,
    differences,
    good,
    leftovers,
    no_traceback,
    remove,
    resumed,
    undisturbed,
    unfinished,
)
from ifvit.config import DenseConfig

PER_RUN = 5  # kills of one run; then it is left to end
START_UPS = 0.12  # share of the kills that are not inside a save: while the process starts, first step included


@dataclass
class Kill:
    """One kill, and what was there when the process was dead."""

    run: int
    aim: str  # `start-up`, `step` or `save`
    seconds: float  # after the start of the process
    step: int  # the largest that metrics or a checkpoint's name told of
    inside: list[str]  # what was being written and still lies there
    newest: int | None  # step of the newest whole checkpoint; None: there is none
    finished: bool  # that is the final one
    resumed: str = "unknown: killed before it said"

    def line(self, number: int, total: int) -> str:
        where = f"inside a save ({', '.join(self.inside)})" if self.inside else "outside a save"
        return (
            f"kill {number:3d}  run {self.run:2d}  {self.aim:8s}  {self.seconds:6.2f} s after start  "
            f"step {self.step:3d} of {total}  {where}; {self.resumed}"
        )


@dataclass
class Report:
    """All kills, and everything that was not as it should be."""

    count: int
    wanted_inside: int
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0  # that ended and were compared
    start: float = float("inf")  # seconds to the first sign of a step, the shortest so far
    complaints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # worth a look, no failure

    @property
    def inside(self) -> int:
        return sum(bool(k.inside) for k in self.kills)

    @property
    def ok(self) -> bool:
        return not self.complaints and len(self.kills) >= self.count and self.inside >= self.wanted_inside

    def summary(self) -> str:
        lines = [
            f"{len(self.kills)} kills, {self.inside} of them inside a save, {self.runs} runs compared with the "
            f"undisturbed one: {'all as if nothing had been' if self.ok else 'NOT as it should be'}"
        ]
        if len(self.kills) < self.count or self.inside < self.wanted_inside:
            lines.append(f"FAILURE  {self.count} kills, {self.wanted_inside} of them inside a save, were asked for")
        return "\n".join(lines + [f"FAILURE  {c}" for c in self.complaints] + [f"note     {n}" for n in self.notes])


def kill_run(
    count: int, inside: int, seed: int, out: Path, of: Undisturbed | None = None, training: Training | None = None
) -> Report:
    """Kills `count` times, `inside` of them while a checkpoint is written; all files lie under `out`.

    `of` is the run to compare with; without it `training` is run undisturbed first.
    """
    rng = random.Random(seed)
    of = of or undisturbed(training or default_training(), out)
    report = Report(count, inside, start=of.pace.start)
    while len(report.kills) < count or report.inside < inside:
        if len(report.kills) >= 3 * count + 10 or len(report.complaints) > 5:
            break  # it misses, or has shown enough
        _one_run(report, of, rng, out)
    return report


def _one_run(report: Report, of: Undisturbed, rng: random.Random, out: Path) -> None:
    """A run from its start to its end, killed up to PER_RUN times on the way, and compared."""
    number = report.runs + 1
    folder = out / f"run{number}"
    remove(folder)
    before = len(report.complaints)
    left = sorted(rng.uniform(0, of.total + of.pace.tail / of.pace.step) for _ in range(PER_RUN))
    life, last = 0, None
    while True:
        life += 1
        enough = len(report.kills) >= report.count and report.inside >= report.wanted_inside
        aim = _aim(report, rng) if left and not enough else None
        process = Process(of.training.words(folder), out / f"run{number}_life{life}")
        watch = Watch(folder, of.training.name)
        killed = aim and _kill_at(process, watch, aim, left.pop(0), report.start, of, rng)
        said = process.wait()
        if watch.first_sign:
            report.start = min(report.start, watch.first_sign - process.started)
        if last:
            report.complaints += _say_how_it_went_on(last, said, of, number)
            print(last.line(len(report.kills), of.total), flush=True)
        report.complaints += [f"run {number}: {c}" for c in no_traceback(said)]
        last = None
        if not killed:
            break
        last = _look_after(process, watch, aim, killed, number, of, report)
        report.kills.append(last)
    report.runs += 1
    if said.code:
        report.complaints.append(
            f"run {number} ended with {said.code}: {(said.err.strip().splitlines() or ['nothing said'])[-1][:300]}"
        )
    report.complaints += [f"run {number}: {c}" for c in differences(folder, of)]
    report.complaints += [f"run {number}: a kill has damaged {p.name}" for p in folder.glob("*.damaged*")]
    if len(report.complaints) == before:
        report.notes += [f"run {number}: {n}" for n in leftovers(folder, of)]
        remove(folder)
    else:
        report.notes.append(f"run {number} is kept in {folder}")


def _aim(report: Report, rng: random.Random) -> str:
    need, left = report.wanted_inside - report.inside, report.count - len(report.kills)
    if need > 0 and (left <= need or rng.random() < 1.5 * need / left):
        return "save"
    return "start-up" if rng.random() < START_UPS else "step"


def _kill_at(
    process: Process, watch: Watch, aim: str, point: float, start: float, of: Undisturbed, rng: random.Random
) -> float | None:
    """Kills at `point` steps (beyond the last: as long after it), or as `aim` has it; None where it ended before.

    Returns the seconds since the start of the process.
    """
    pace = of.pace
    moment = rng.uniform(0, start) if aim == "start-up" else None  # of the process
    writing_before: set = set()
    while process.alive:
        writing, now = watch.look(), time.monotonic()
        far_enough = watch.step >= min(int(point), of.total - 2)
        if aim == "save" and moment is None and writing - writing_before and far_enough:
            moment = now - process.started + rng.uniform(0, 0.8 * pace.save)
        if aim == "step" and watch.since is not None and watch.step + (now - watch.since) / pace.step >= point:
            moment = 0.0
        writing_before = writing
        if moment is not None and now - process.started >= moment:
            seconds = process.seconds
            process.kill()
            return seconds if process.said.code == -9 else None  # else it was quicker
        time.sleep(0.0007)
    return None


def _look_after(
    process: Process, watch: Watch, aim: str, seconds: float, run: int, of: Undisturbed, report: Report
) -> Kill:
    """What the dead process has left; every checkpoint has to be whole."""
    now = sorted(n for n, inode in unfinished(watch.folder) if (n, inode) not in watch.stale)
    found, wrong = good(checkpoints(watch.folder, of.training.name))
    report.complaints += [f"run {run}, after a kill at {seconds:.2f} s: {w}" for w in wrong]
    goes_on = [m for name, m in found.items() if not name.endswith("_best")]
    return Kill(
        run,
        aim,
        seconds,
        watch.step,
        now,
        max((m["step"] for m in goes_on), default=None),
        any(m["finished"] for m in goes_on),
    )


def _say_how_it_went_on(kill: Kill, said, of: Undisturbed, run: int) -> list[str]:
    """Completes the line of the kill before; a complaint where another checkpoint was gone on from."""
    if "is finished" in said.out:
        kill.resumed = "the next found it finished"
        return [] if kill.finished else [f"run {run}: said to be finished; the newest is of step {kill.newest}"]
    if went := resumed(said.out):
        kill.resumed = f"the next went on from {went[0]}, step {went[1]}"
        if kill.finished or went[1] < (kill.newest or 0):
            return [f"run {run}: went on from {went[0]}, step {went[1]}; the newest was of step {kill.newest}"]
    elif said.code == 0:
        kill.resumed = "the next began anew"
        if kill.newest is not None:
            return [f"run {run}: began anew, though there was a checkpoint of step {kill.newest}"]
    elif kill.newest is None:
        kill.resumed = "the next had nothing to go on from"
    return []


def default_training(sets: tuple[str, ...] = (), **changes) -> Training:
    """A checkpoint every epoch, and at every step where the configuration has a key for that; then `sets`."""
    often = ("save_every=1",) + (("save_steps=1",) if "save_steps" in DenseConfig.__dataclass_fields__ else ())
    return Training(sets=(*often, *sets), **changes)


@dataclass(frozen=True)
class Args:
    count: int = 50
    """kills"""
    inside: int = 10
    """at least so many of them while a checkpoint is being written"""
    seed: int = 0
    """of the moments"""
    out: str = ""
    """where everything lies; left out, a new folder in the temporary one"""
    module: Literal["dense", "match"] = "dense"
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """more of the configuration, `--set key=value`; may be repeated"""


def main(args: Args) -> int:
    out = Path(args.out or tempfile.mkdtemp(prefix="kill_")).absolute()
    print(f"everything lies in {out}", flush=True)
    module1 = ""
    if args.module == "match":
        module1 = str(undisturbed(default_training(), out / "module1").folder / "dense_reg_ckpt")
    of = undisturbed(default_training(args.set, module=args.module, module1=module1), out)
    print(
        f"undisturbed: {of.total} steps; {of.pace.start:.1f} s to the first sign of one, then {of.pace.step:.3f} s "
        f"each, {1000 * of.pace.save:.0f} ms a save, {of.pace.tail:.1f} s after the last",
        flush=True,
    )
    report = kill_run(args.count, args.inside, args.seed, out, of)
    print(report.summary())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__, use_underscores=True)))
