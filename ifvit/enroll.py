"""Enrols folders of prints in a gallery, for python -m ifvit.identify.

python -m ifvit.enroll DIR [DIR …] --gallery G [--checkpoint CKPT]
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ifvit import cli
from ifvit.errors import UserError
from ifvit.evaluate import check_ppi
from ifvit.paths import cache_dir, resolve

if TYPE_CHECKING:
    from ifvit.data.sources import Print
    from ifvit.gallery.store import Gallery
    from ifvit.scoring.scorer import Scorer

log = logging.getLogger("ifvit")
AT_ONCE = 64  # prints of one transaction: what a kill costs


@dataclass(frozen=True)
class Args:
    """Enrols the prints of folders; those that are enrolled already are passed over."""

    roots: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of prints, as --dataset_root of the training commands takes them"""
    gallery: str = ""
    """its folder; made where it is not there"""
    checkpoint: str | None = None
    """Module 2's final checkpoint, or one of Module 1 [./checkpoints/matcher/matcher_ckpt, else `pretrained`]"""
    replace: bool = False
    """where a file has another content than the one that was enrolled under its name, take the new one"""
    batch_size: int = 16
    """prints at once"""
    ppi: float | Literal["auto"] | None = None
    """resolution of all prints, whatever files and sets tell; `auto`: what they tell, unless the ridges tell another"""
    ridges: Literal["dark", "light"] = "dark"
    """in the prints' images; `light` of sensors that show them white on black"""
    names: str = ""
    """how to read paths below the folder, without extension: '{database}/{finger}_{impression}' [known sets' names]"""

    def run(self) -> int:
        check_ppi(self.ppi)
        if not self.gallery:
            raise UserError("--gallery is needed, the folder of the gallery.")
        if not self.roots:
            raise UserError("No folder is named; give one or more: python -m ifvit.enroll DIR --gallery G.")
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; give at least 1.")
        from ifvit.data.gather import local_root
        from ifvit.data.sources import read
        from ifvit.devices.sharding import use_cpu_cores
        from ifvit.gallery.store import Gallery
        from ifvit.matcher import Matcher

        prints = read([local_root(r) for r in self.roots], self.ppi, self.ridges, self.names).prints
        use_cpu_cores()
        cli.use_compilation_cache(cache_dir() / "compiled")
        scorer = Matcher.load(self.checkpoint).scorer
        gallery = Gallery.create(Path(resolve(self.gallery)), scorer.digest, scorer.template_size)
        if not scorer.template_size:
            log.info(
                "This checkpoint makes no template of one print: a probe will be compared with all enrolled prints."
            )
        todo = self.new(gallery, prints)
        enrolled = self.enroll(gallery, scorer, todo) if todo else 0
        print(
            f"{enrolled} prints enrolled, {len(prints) - len(todo)} were already, {len(todo) - enrolled} left out; "
            f"{self.gallery} has {len(gallery)} prints of {gallery.fingers} fingers"
        )
        return 0

    def new(self, gallery: "Gallery", prints: list["Print"]) -> list["Print"]:
        """Those that are not enrolled, under whatever name. UserError for a name that stands for another content."""
        from ifvit.data.walk import file_digest

        known = gallery.known([p.path for p in prints])
        differ = [p for p in prints if known.get(p.path) != file_digest(p.path)]
        todo = [p for p in differ if p.path in known or not gallery.has(file_digest(p.path))]
        if not self.replace and (changed := [p.path for p in todo if p.path in known]):
            raise UserError(
                f"{changed[0]} is enrolled with another content; give --replace to take the new one of "
                f"{len(changed)} such prints."
            )
        return todo

    def enroll(self, gallery: "Gallery", scorer: "Scorer", todo: list["Print"]) -> int:
        """How many were enrolled: others cannot be read, or show no ridges, and the log says which."""
        import numpy as np

        from ifvit.bar import bar
        from ifvit.data.prepare import decoded
        from ifvit.data.walk import file_digest
        from ifvit.gallery.pictures import as_png
        from ifvit.gallery.store import Entry

        found = decoded(todo, scorer.config.canvas_size, cache_dir())
        for _, why in found.broken[:5]:
            log.warning("Left out: %s", why)
        for p in (blank := [p for p, record in found.readable if record["blank"]])[:5]:
            log.warning("Left out: %s shows no ridges", p.path)
        usable = [p for p, record in found.readable if not record["blank"]]
        with bar("enrolling", len(usable), "print") as shown:
            for at in range(0, len(usable), AT_ONCE):
                some = found.everything.subset(usable[at : at + AT_ONCE])
                entries = [
                    Entry(p.path, file_digest(p.path), p.database, p.finger, as_png(*some.canvas(i)))
                    for i, p in enumerate(some.prints)
                ]
                templates = np.zeros((len(entries), 0), np.float32)
                if scorer.template_size:
                    templates = scorer.templates(some, self.batch_size)[:, 0]
                gallery.add(entries, templates, self.replace)
                shown.update(len(entries))
        return len(todo) - len(found.broken) - len(blank)


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.enroll", huge_pages=True))
