"""What a sweep knows of its trials. All of it lies in their folders, so that it is kept whatever process dies.

SWEEP/trials/007/values.jsonl   the values searched; a line more when population-based training changes them
                 ended.json     how it ended; not there while it runs, or after it was interrupted
                 …              a run's folder: checkpoints, metrics.jsonl, config.json; log.txt
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from ifvit.files import write_whole
from ifvit.training.metrics import read_rows


@dataclass
class Record:
    number: int
    values: dict
    rows: list[dict] = field(default_factory=list)  # one for each epoch: its validation, and its last training row
    steps: int = 0  # optimiser steps done
    step_seconds: float = 0.0  # time spent in these steps
    end: dict | None = None  # `how`: finished, stopped (by the scheduler) or failed; `reason`; `seconds`

    @property
    def epochs(self) -> int:
        return self.rows[-1]["epoch"] if self.rows else 0

    def last(self, metric: str) -> float | None:
        return self.rows[-1].get(metric) if self.rows else None


def folder_of(sweep: str | os.PathLike, number: int) -> Path:
    return Path(sweep) / "trials" / f"{number:03d}"


def note_values(sweep: str | os.PathLike, number: int, values: dict, epoch: int = 0, clone_of: str = "") -> None:
    """Notes the values that a trial has from `epoch` on. `clone_of`: the checkpoint it takes its parameters from."""
    folder = folder_of(sweep, number)
    folder.mkdir(parents=True, exist_ok=True)
    line = {"from_epoch": epoch, "values": values} | ({"clone_of": clone_of} if clone_of else {})
    # A trial that begins overwrites the file, because a crash may have left half a line there.
    with (folder / "values.jsonl").open("a" if epoch else "w", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def note_end(sweep: str | os.PathLike, number: int, how: str, reason: str, seconds: float) -> None:
    folder = folder_of(sweep, number)
    write_whole(
        folder / "ended.json", json.dumps({"how": how, "reason": reason, "seconds": seconds, "time": time.time()})
    )


def read(sweep: str | os.PathLike, number: int) -> Record:
    folder = folder_of(sweep, number)
    lines = read_rows(folder / "values.jsonl")
    rows = read_rows(folder / "metrics.jsonl")
    steps = [r for r in rows if r["split"] == "train"]
    epochs, newest = [], {}
    for r in rows:
        if r["split"] == "train":
            newest = r
        elif r["split"] == "val":
            epochs.append(newest | r)
    try:
        end = json.loads((folder / "ended.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged: the trial goes on, and its run knows how far it is
        end = None
    return Record(
        number,
        lines[-1]["values"] if lines else {},
        epochs,
        steps[-1]["step"] if steps else 0,
        sum(r["seconds"] for r in steps),
        end,
    )


def read_all(sweep: str | os.PathLike) -> list[Record]:
    """All trials that were begun, in the order of their numbers. Trials whose values a crash has lost are left out."""
    numbers = sorted(int(p.parent.name) for p in Path(sweep).glob("trials/*/values.jsonl") if read_rows(p))
    return [read(sweep, n) for n in numbers]


def order(records: list[Record], metric: str, higher_is_better: bool) -> list[Record]:
    """Trials with a value and no failure, best first. More epochs are better; among equals the last value decides."""
    valued = [r for r in records if r.last(metric) is not None and (r.end or {}).get("how") != "failed"]
    return sorted(valued, key=lambda r: (-r.epochs, -r.last(metric) if higher_is_better else r.last(metric), r.number))
