"""Metrics of a run: `metrics.jsonl`, trackers and a progress bar. A resumed run goes on with the same rows."""

import json
import logging
import math
import sys
import time
from pathlib import Path

import jax
from etils import epath
from tqdm import tqdm

from ifvit.files import write_whole
from ifvit.training import trackers
from ifvit.training.mirror import Mirror
from ifvit.training.watch import TENSORBOARD

log = logging.getLogger("ifvit")

ATTEMPTS = "attempts.jsonl"

# These values differ between two runs that are equal otherwise.
TIMES = (
    "seconds",
    "pairs_per_second",
    "checkpoint_seconds",
    "input_seconds",
    "compile_seconds",
    "goodput",
    "flops_per_second",
    "peak_share",
    "host",
    "probe_seconds",
    "step_seconds",
)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl. A last line that a crash has cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_bytes().decode("utf-8", "replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def in_steps(row: dict) -> float:
    """The seconds of a row of training that went into steps, without waits for prints, checkpoints and compiling."""
    if row["split"] != "train":
        return 0.0
    return max(0.0, row["seconds"] - sum(row.get(f"{k}_seconds", 0.0) for k in ("input", "compile", "checkpoint")))


def one_by_one(values: dict) -> dict[str, float]:
    """Numbers by their names. Numbers of several processes get the names `name/0`, `name/1` …"""
    each = {
        (f"{k}/{n}" if isinstance(v, list) else k): x
        for k, v in values.items()
        for n, x in enumerate(v if isinstance(v, list) else [v])
    }
    return {k: x for k, x in each.items() if not isinstance(x, str)}


class Metrics:
    """Writes a run's metrics under `folder`, and drops rows after `step` of an earlier attempt.

    Only the first of several processes writes. When the disk is full or the folder is gone, rows are kept in memory;
    `metrics.jsonl` is written anew, whole, as soon as that works. `attempts.jsonl` has a line for each time that the
    run was started. No line is ever dropped, because goodput counts from the first one. Where `folder` is in a bucket,
    the files are written to a local folder and copied from there. `tracked_by` names the trackers that are told every
    row, of a run with the configuration `config`.
    """

    def __init__(
        self,
        folder: epath.Path,
        step: int,
        total: int,
        name: str,
        tracked_by: tuple[str, ...] = TENSORBOARD,
        config: dict | None = None,
    ):
        self.mirror = Mirror(folder, ("metrics.jsonl", ATTEMPTS, *trackers.notes(name)))
        self.folder = self.mirror.here
        self.path = self.folder / "metrics.jsonl"
        self.lines = [json.dumps(r) + "\n" for r in read_rows(self.path) if r["step"] <= step]
        self.writes = jax.process_index() == 0
        self.behind = True  # whether lines are missing in the file
        self._write_lines()
        self.finished = False
        self.trackers = (
            trackers.open_trackers(tracked_by, self.folder, folder, name, step, config or {}) if self.writes else []
        )
        for row in self.rows():  # what a tracker has been told before it leaves out
            self._track(row)
        self.bar = tqdm(
            total=total,
            initial=step,
            desc=name,
            unit="step",
            file=sys.stderr,
            mininterval=1 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
            disable=not self.writes,
        )

    def attempt(self, first: int) -> None:
        """Notes that the run was started at step `first`."""
        file = self.folder / ATTEMPTS
        before = read_rows(file)
        self._began = before[0]["time"] if before else time.time()
        if self.writes:
            try:
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"time": time.time(), "from_step": first}) + "\n")
            except OSError as e:
                log.warning("⚠ %s could not be written (%s).", file, e.strerror)
        self._kept = sum(map(in_steps, map(json.loads, self.lines)))

    def write_steps(self, step: int, epoch: int, means: dict, times: dict) -> None:
        """Writes a row of training with its goodput: the share of the run's wall time that went into steps it kept."""
        self._kept += in_steps({"split": "train", **times})
        goodput = self._kept / max(time.time() - self._began, 1e-9)
        self.write(step, epoch, "train", means | times | {"goodput": goodput})

    def newest(self, split: str) -> dict:
        """The values in the newest row of a split."""
        row = next((r for r in map(json.loads, reversed(self.lines)) if r["split"] == split), {})
        return {k: v for k, v in row.items() if k not in ("split", "step", "epoch")}

    def progress(self, steps: int, loss: float, pairs_per_second: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.3f}, {pairs_per_second:.1f} pairs/s", refresh=False)
        self.bar.update(steps)

    def write(self, step: int, epoch: int, split: str, values: dict) -> None:
        """Writes one row. A value that is not finite is written as null."""
        row = {"step": step, "epoch": epoch, "split": split}
        finite = {k: v if isinstance(v, list) else float(v) if math.isfinite(v) else None for k, v in values.items()}
        self._write_lines(json.dumps(row | finite) + "\n")
        self._track(row | values)
        if self.writes:
            self.mirror.push()

    def keep(self, *files: epath.Path) -> None:
        """Files of the run that its trackers keep as artefacts."""
        for tracker in self.trackers:
            for file in files:
                tracker.keep(file)

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    def close(self) -> None:
        self.bar.close()
        self._write_lines()
        for tracker in self.trackers:
            tracker.close(self.finished)
        self.mirror.close()

    def _track(self, row: dict) -> None:
        values = {k: v for k, v in row.items() if k not in ("step", "epoch", "split") and v is not None}
        each = {k: float(v) for k, v in one_by_one(values).items()}
        for tracker in self.trackers:
            tracker.write(row["step"], row["epoch"], row["split"], each)

    def _write_lines(self, more: str = "") -> None:
        self.lines += [more] if more else []
        if not self.writes:
            return
        try:
            if self.behind or not self.path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self.path, "".join(self.lines))
            else:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(more)
            self.behind = False
        except OSError as e:
            if not self.behind:
                log.warning("⚠ %s could not be written (%s); its rows are kept until it can.", self.path, e.strerror)
            self.behind = True
