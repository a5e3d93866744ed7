"""Tells what folders of prints are read as, before anything is trained on them.

python -m ifvit.prints DIR [DIR …] [--sheet sheet.png] [--json]
"""

import json
import logging
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ifvit import cli
from ifvit.config import DenseConfig
from ifvit.errors import UserError
from ifvit.evaluate import check_ppi
from ifvit.paths import cache_dir, resolve

log = logging.getLogger("ifvit")


@dataclass(frozen=True)
class Args:
    """Tells what folders of prints are read as: databases, fingers, sizes, resolution, what is left out, the split."""

    roots: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of prints, as --dataset_root of the training commands takes them"""
    ppi: float | Literal["auto"] | None = None
    """resolution of all prints, whatever their files and sets tell; `auto`: what their ridges tell, where it differs"""
    ridges: Literal["dark", "light"] = "dark"
    """in the prints' images; `light` of sensors that show them white on black"""
    names: str = ""
    """how paths below the folder are to be read, such as '{database}/{finger}_{impression}' [as known sets' names]"""
    held_out: float = DenseConfig.held_out
    """share of fingers that training keeps for validation"""
    data_seed: int = DenseConfig.data_seed
    """chooses them"""
    sheet: str = ""
    """PNG of some prints of every database on their canvases, with the outline of what counts as print"""
    json: bool = False
    """print the same as JSON"""

    def run(self) -> int:
        from ifvit.data.gather import read_folders, split
        from ifvit.data.prepare import decoded, remarks
        from ifvit.data.summary import summarise

        if self.json:
            cli.log_to_stderr()
        check_ppi(self.ppi)
        if not self.roots:
            raise UserError("No folder is named; give one or more, such as python -m ifvit.prints DIR.")
        if not 0 < self.held_out <= 0.9:
            raise UserError(f"--held_out is {self.held_out}; give a share of the fingers, more than 0 and at most 0.9.")
        reading = read_folders(self.roots, self.ppi, self.ridges, self.names)
        found = decoded(reading.prints, DenseConfig.canvas_size, cache_dir())
        used, _ = found.without_copies(across=True)
        if not used:
            none = f"None of {len(found.broken)} images can be read, e.g. {found.broken[0][1]}"
            raise UserError(f"{none}. Give other prints.")
        summary = summarise(reading, found, used, split(used, self.held_out, self.data_seed))
        said = remarks(found, used) + refusals(summary, found)
        if self.json:
            print(json.dumps(summary.to_json() | {"data_seed": self.data_seed, "remarks": said}, indent=1))
        else:
            print("\n".join([*summary.table(), "", *said]))
        if self.sheet:
            from ifvit.data.sheet import contact_sheet

            captions = {p: caption(record) for p, record in found.readable}
            contact_sheet(resolve(self.sheet), found.everything.subset(used), [captions[p] for p in used])
            log.info("Contact sheet: %s", resolve(self.sheet))
        return 0


def caption(record: dict) -> str:
    """Size, resolution and ridge period of a print."""
    period = f", {record['period']:.1f} px" if record["period"] else ""
    return f"{record['width']}×{record['height']}, {record['ppi']:.4g} ppi{period}"


def refusals(summary, found) -> list[str]:
    """Why a training run would refuse these prints."""
    said = []
    if min(summary.training[1], summary.held_out[1]) < 2:
        said.append("⚠ Training needs two fingers or more to train on and two held out; give prints of more fingers.")
    if len(found.broken) > DenseConfig.max_broken * len(found.records):
        said.append(
            f"⚠ Training refuses more than {DenseConfig.max_broken:.0%} of images that cannot be read; "
            "replace or remove them, or allow more with --set max_broken=1."
        )
    return said


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.prints"))
