"""Lays one print on another: what moves where, and whether their ridges agree.

python -m ifvit.register A B --checkpoint ./checkpoints/dense_reg/dense_reg_ckpt --out OUT
python -m ifvit.register --pairs FILE.csv --checkpoint ./checkpoints/dense_reg/dense_reg_ckpt --out OUT    # columns a,b
"""

import csv
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ifvit import cli
from ifvit.errors import UserError
from ifvit.evaluate import check_ppi
from ifvit.files import whole, write_whole
from ifvit.paths import cache_dir, resolve_data

if TYPE_CHECKING:
    from ifvit.data.single import OnCanvas
    from ifvit.scoring.fit import Fit
    from ifvit.scoring.scorer import Scorer

DEFAULT = "./checkpoints/dense_reg/dense_reg_ckpt"
NOT_REGISTERED = 3  # exit code
WIDER = (
    1.5  # fingers whose ridges differ by more in width, at one resolution, are none that could be laid on each other
)
GRID = 0.04  # inches from line to line of the drawn grid, about two ridges
FILES = ("warped.png", "grid.png", "overlay.png", "matches.csv", "transform.json")
COLUMNS = ("n", "a", "b", "registered", "confidence", "agreement", "overlap", "matches")
log = logging.getLogger("ifvit")


@dataclass(frozen=True)
class Args:
    """Lays print A on print B with Module 1, however A is turned; exit code 3 where their ridges do not agree."""

    a: Annotated[str, tyro.conf.Positional] = ""
    """the print that is moved"""
    b: Annotated[str, tyro.conf.Positional] = ""
    """the print that it is laid on"""
    checkpoint: str | None = None
    """of Module 1, or of Module 2, whose own Module 1 is taken [./checkpoints/dense_reg/dense_reg_ckpt, else
    `pretrained`, the package's]"""
    out: str = "./registration"
    """folder for warped.png, grid.png, overlay.png, matches.csv, transform.json"""
    pairs: str = ""
    """CSV with the columns a and b, instead of A and B: OUT/1, OUT/2, …, and OUT/registrations.csv"""
    ppi: float | Literal["auto"] | None = None
    """resolution of all prints, whatever files and sets tell; `auto`: what they tell, unless the ridges tell another"""
    ridges: Literal["dark", "light"] = "dark"
    """in the images; `light` of sensors that show them white on black"""

    def run(self) -> int:
        from ifvit.checkpoint import or_packaged
        from ifvit.devices.sharding import use_cpu_cores
        from ifvit.scoring.scorer import Scorer

        if bool(self.pairs) == bool(self.a) or bool(self.a) != bool(self.b):
            raise UserError("Give two prints, A and B, or many by --pairs FILE.csv.")
        check_ppi(self.ppi)
        pairs = read_pairs(self.pairs) if self.pairs else [(self.a, self.b, "")]
        for a, b, where in pairs:  # before anything is computed
            for path in (a, b):
                if not Path(path).is_file():
                    raise UserError(f"{where}{path} is not there; check the path.")
        use_cpu_cores()
        cli.use_compilation_cache(cache_dir() / "compiled")
        scorer = Scorer.from_checkpoint(or_packaged(self.checkpoint, DEFAULT))
        scorer.registers  # noqa: B018 (refused before anything is written)
        if not self.pairs:
            found = self._pair(scorer, *pairs[0], self.out)
            print(_sentence(found))
            return 0 if found.registered else NOT_REGISTERED
        out = _folder(self.out)
        with whole(out / "registrations.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            count = 0
            for n, (a, b, where) in enumerate(pairs, 1):
                found = self._pair(scorer, a, b, where, out / str(n))
                count += found.registered
                numbers = (f"{v:.4f}" for v in (found.confidence, found.agreement, found.overlap))
                rows.writerow((n, a, b, int(found.registered), *numbers, len(found.xy_a)))
                log.info("%d/%d %s", n, len(pairs), _sentence(found))
        print(f"{count} of {len(pairs)} pairs registered; {out / 'registrations.csv'} has a line for each.")
        return 0

    def _pair(self, scorer: "Scorer", a: str, b: str, where: str, out: str | Path) -> "Fit":
        """Registers one pair and writes it to OUT, which is made once both prints could be read.

        The sentence of a user's mistake begins with its line in the list.
        """
        from ifvit.data.single import on_canvas
        from ifvit.scoring.fit import fit

        try:
            prints = [on_canvas(path, self.ppi, scorer.config.canvas_size, self.ridges) for path in (a, b)]
            _same_scale(*prints)
        except UserError as e:
            raise UserError(f"{where}{e}") from None
        out = _folder(out)
        prints[0], found = scorer.laid(*prints)
        found = fit(found, *(p.placement for p in prints), scorer.config)
        _write(out, found, a, b)
        return found


def read_pairs(path: str) -> list[tuple[str, str, str]]:
    """Of each line a, b, and how a sentence about it begins; a path that is not here lies beside the list."""
    from ifvit.data import pair_list

    file, pairs = resolve_data(path), []
    for row in pair_list.read(file):
        where = f"{path}, line {row.line}: "
        if not (row.a and row.b):
            raise UserError(f"{where}there is no pair; give two paths, a and b.")
        pairs.append((*(_beside(Path(file), name) for name in (row.a, row.b)), where))
    return pairs


def _beside(file: Path, name: str) -> str:
    here = resolve_data(name)
    beside = file.parent / name
    return here if Path(here).is_file() or not beside.is_file() else str(beside)


def _folder(path: str | Path) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path} is no folder, and a file is in the way; give another --out.") from None
    return Path(path)


def _same_scale(a: "OnCanvas", b: "OnCanvas") -> None:
    """UserError where the ridges of one print are far wider than the other's: one is read at a wrong resolution."""
    from ifvit.data.ridges import ridge_period

    periods = [ridge_period(p.canvas) for p in (a, b)]
    if all(periods) and max(periods) > WIDER * min(periods):
        raise UserError(
            f"The ridges of {a.name} are {periods[0]:.1f} px apart at 500 ppi and those of {b.name} "
            f"{periods[1]:.1f} px: one of them is read at a wrong resolution; --ppi auto takes what the ridges tell."
        )


def _sentence(found: "Fit") -> str:
    what = "registered" if found.registered else "not registered"
    return (
        f"{what}: agreement of the ridges {found.agreement:.3f}, overlap {found.overlap:.0%}, "
        f"confidence {found.confidence:.2f}, {len(found.xy_a)} matches"
    )


def _write(out: Path, found: "Fit", a: str, b: str) -> None:
    """The files of `out`: all of them, or transform.json alone, without a fit, where the prints do not register."""
    from PIL import Image

    from ifvit.data.images import decode
    from ifvit.scoring.fit_pictures import overlay, with_grid

    for name in FILES:  # of a pair before this one
        (out / name).unlink(missing_ok=True)
    told = {
        "a": a,
        "b": b,
        "registered": found.registered,
        "confidence": found.confidence,
        "agreement": found.agreement,
        "overlap": found.overlap,
        "similarity": None,
    }
    if found.registered:
        pa, pb = decode(a)[0], decode(b)[0]
        warped, there, xy = found.warped(pa, pb.shape)
        pictures = {
            "warped.png": warped,
            "grid.png": with_grid(warped, xy, there, GRID * found.ppi_a),
            "overlay.png": overlay(warped, there, pb),
        }
        for name, picture in pictures.items():
            with whole(out / name) as part:
                Image.fromarray(picture).save(part, format="png")
        with whole(out / "matches.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(("x1", "y1", "x2", "y2", "confidence"))
            for p, q, c in zip(found.xy_a, found.xy_b, found.match_confidence):
                rows.writerow([f"{v:.3f}" for v in (*p, *q)] + [f"{c:.4f}"])
        told["similarity"] = found.parameters
    write_whole(out / "transform.json", json.dumps(told, indent=1) + "\n")  # last: all is there


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.register"))
