"""Metrics of a run: `metrics.jsonl`, TensorBoard, a progress bar; the rows of a resumed run go on where it does."""

import json
import math
import os
import sys
from pathlib import Path

import tensorboardX
from tqdm import tqdm

TIMES = ("seconds", "pairs_per_second", "checkpoint_seconds")  # what differs between two equal runs


def read_rows(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class Metrics:
    """Writes a run's metrics under `folder`; rows after `step` of an earlier attempt are dropped."""

    def __init__(self, folder: Path, step: int, total: int, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        kept = [r for r in read_rows(self.path) if r["step"] <= step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(part, self.path)
        self.file = self.path.open("a")
        self.board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=total, initial=step, desc=name, unit="step", file=sys.stderr,
                        mininterval=1 if sys.stderr.isatty() else 30, dynamic_ncols=True)

    def progress(self, steps: int, loss: float, pairs_per_second: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.3f}, {pairs_per_second:.1f} pairs/s", refresh=False)
        self.bar.update(steps)

    def write(self, step: int, epoch: int, split: str, values: dict) -> None:
        """One row; a value that is not finite is written as null."""
        row = {"step": step, "epoch": epoch, "split": split}
        row |= {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for k, v in values.items():
            self.board.add_scalar(f"{split}/{k}", v, step)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.board.close()

