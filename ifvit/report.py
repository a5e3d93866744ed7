"""Writes a report of a training, at any time: its curves and its settings, in one HTML file.

python -m ifvit.report ./checkpoints/dense_reg [--out report.html]
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ifvit import cli
from ifvit.errors import UserError
from ifvit.paths import resolve


@dataclass(frozen=True)
class Args:
    """Writes the curves of a run, also of one that trains now, as one HTML file."""

    run_folder: Annotated[str, tyro.conf.Positional]
    """the run's --checkpoint_dir"""
    out: str = ""
    """the file [report.html in the run's folder]"""

    def run(self) -> int:
        from ifvit.checkpoint.places import as_path, is_local
        from ifvit.scoring import plots, report
        from ifvit.training.metrics import read_rows

        folder = as_path(self.run_folder)
        rows = read_rows(folder / "metrics.jsonl")
        if not rows:
            raise UserError(f"{folder} has no metrics.jsonl with a row in it; give a run's --checkpoint_dir.")
        if not self.out and not is_local(folder):
            raise UserError(f"{folder} lies in a bucket; give --out, a file on this machine.")
        out = Path(resolve(self.out)) if self.out else Path(folder) / "report.html"
        if out.is_dir():
            raise UserError(f"--out {self.out} is a folder; give the path of a file in it, such as report.html.")
        out.parent.mkdir(parents=True, exist_ok=True)
        settings = folder / "config.json"
        settings = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
        with tempfile.TemporaryDirectory() as drawn:
            curves = Path(drawn) / "curves.png"
            plots.curves(curves, rows)
            report.of_training(out, self.run_folder, rows, curves, settings)
        print(f"Report: {out}")
        return 0


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.report"))
