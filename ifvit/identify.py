"""Whose finger is it: compares prints with a gallery.

python -m ifvit.identify PRINT [PRINT …] --gallery G [--top 10]
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ifvit import cli
from ifvit.errors import UserError
from ifvit.evaluate import check_ppi
from ifvit.paths import cache_dir, resolve

if TYPE_CHECKING:
    from ifvit.data.single import OnCanvas
    from ifvit.gallery.ranking import Compared
    from ifvit.gallery.store import Gallery
    from ifvit.scoring.scorer import Scorer

TURNS = tuple(range(-30, 31, 10))  # degrees that a probe is turned by for the shortlist
AROUND = tuple(range(0, 360, 60))  # and for --turned, each with its own shortlist


@dataclass(frozen=True)
class Args:
    """Names the enrolled fingers that prints are likest to, and says which of them match, or that nobody does."""

    prints: Annotated[tuple[str, ...], tyro.conf.Positional]
    """prints of unknown fingers"""
    gallery: str = ""
    """its folder (python -m ifvit.enroll)"""
    checkpoint: str | None = None
    """the one that made the gallery [./checkpoints/matcher/matcher_ckpt, else `pretrained`]"""
    top: int = 10
    """fingers that are named"""
    rescore: int = 50
    """enrolled prints with the likest templates, which are compared pairwise; without templates all are"""
    fpir: float = 0.01
    """false-positive identification rate to decide at: how often a print of nobody enrolled may be given a name"""
    turned: bool = False
    """the prints may lie at any angle, not only within 30°: each is looked for at six, which takes six times as long"""
    person: bool = False
    """the prints are fingers of one person: persons are named, by all of these prints together"""
    json: bool = False
    """print the answers as JSON"""
    batch_size: int = 16
    """pairs at once"""
    ppi: float | Literal["auto"] | None = None
    """resolution of the prints, whatever files and sets tell; `auto`: what they tell, unless the ridges tell another"""
    ridges: Literal["dark", "light"] = "dark"
    """in the images; `light` of sensors that show them white on black"""

    def run(self) -> int:
        self.check()
        if self.json:
            cli.log_to_stderr()
        from ifvit.devices.sharding import use_cpu_cores
        from ifvit.gallery.ranking import fingers
        from ifvit.gallery.store import Gallery
        from ifvit.matcher import Matcher, Picture
        from ifvit.pixels import agreement

        folder = Path(resolve(self.gallery))
        Gallery.open(folder)  # before anything that takes long
        use_cpu_cores()
        cli.use_compilation_cache(cache_dir() / "compiled")
        matcher = Matcher.load(self.checkpoint)
        gallery = Gallery.open(folder, matcher.scorer.digest)
        if not len(gallery):
            raise UserError(f"{self.gallery} is empty; enrol prints with python -m ifvit.enroll DIR --gallery G.")
        probes = [matcher.read(Picture(path, self.ppi, self.ridges)) for path in self.prints]
        angles = AROUND if self.turned else (0,)
        turned = [p.turned(angle) if angle else p for p in probes for angle in angles]
        found = self.compared(gallery, matcher.scorer, turned)
        found = [sum(found[n : n + len(angles)], []) for n in range(0, len(found), len(angles))]
        if self.person:
            told = self.persons(gallery, found, matcher.least_fmr, len(angles))
            print(json.dumps(told, indent=1) if self.json else _lines_of_persons(told))
            return 0
        fmr = 1 - (1 - self.fpir) ** (1 / (gallery.fingers * len(angles)))
        threshold = (matcher.scorer.fusion or agreement).threshold(fmr)
        told = []
        for path, some in zip(self.prints, found):
            candidates = fingers(some)
            for c in candidates:
                c["decision"] = "match" if c["score"] >= threshold else "no match"
            told.append({"print": path, "threshold": threshold, "fmr": fmr, "candidates": candidates[: self.top]})
        print(json.dumps(told, indent=1) if self.json else "\n".join(map(_lines, told)))
        return 0

    def persons(self, gallery: "Gallery", found: list[list["Compared"]], least_fmr: float, angles: int) -> dict:
        """The persons whose prints all of these are likest to, named where the likelihood ratio is high enough.

        A ratio of 1/x is reached by at most a share x of the impostors, if the ratios are calibrated.
        """
        from ifvit.gallery.ranking import persons

        enrolled = gallery.fingers_of_persons()
        fmr = 1 - (1 - self.fpir) ** (1 / len(enrolled))
        candidates = persons(found, enrolled, -math.log10(least_fmr), angles)[: self.top]
        for c in candidates:
            c["decision"] = "match" if c["llr"] >= -math.log10(fmr) else "no match"
        return {"prints": list(self.prints), "threshold": -math.log10(fmr), "fmr": fmr, "candidates": candidates}

    def check(self) -> None:
        """UserError for flags that do not fit; before anything is read."""
        check_ppi(self.ppi)
        if not self.gallery:
            raise UserError("--gallery is needed, the folder of the gallery.")
        if not self.prints:
            raise UserError("No print is named; give one or more: python -m ifvit.identify PRINT --gallery G.")
        for name in ("top", "rescore", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; give at least 1.")
        if not 0 < self.fpir < 1:
            raise UserError(f"--fpir is {self.fpir}; give a rate between 0 and 1, such as 0.01.")

    def compared(self, gallery: "Gallery", scorer: "Scorer", probes: Sequence["OnCanvas"]) -> list[list["Compared"]]:
        """What each probe was compared with: the enrolled prints with the likest templates."""
        import numpy as np

        from ifvit.data.pairs import Pair
        from ifvit.data.single import Canvases
        from ifvit.gallery.pictures import Enrolled
        from ifvit.gallery.ranking import Compared

        taken = Canvases(probes)
        if gallery.width:
            turned = scorer.templates(taken, min(self.batch_size, len(probes)), TURNS)  # none to fill a batch up
            shortlists = [gallery.likest(turns, self.rescore) for turns in turned]
        else:
            shortlists = [gallery.all()] * len(probes)
        entries = list({e.name: e for shortlist in shortlists for e in shortlist}.values())
        at = {e.name: i for i, e in enumerate(entries, len(probes))}
        pairs = [Pair(i, at[e.name], False) for i, shortlist in enumerate(shortlists) for e in shortlist]
        found = scorer.score(Enrolled(taken, entries), pairs, self.batch_size)
        rows = zip(found["score"].tolist(), (found["log_odds"] / np.log(10)).tolist())
        return [[Compared(e, *next(rows)) for e in shortlist] for shortlist in shortlists]


def _lines(told: dict) -> str:
    matching = [c for c in told["candidates"] if c["decision"] == "match"]
    who = matching[0]["finger"] if matching else "nobody"
    lines = [f"{told['print']}: {who} (threshold {told['threshold']:.4f})"]
    for c in told["candidates"]:
        lines.append(f"  {c['rank']:3d}. {c['finger']}  score {c['score']:.4f}, {c['decision']}  {c['print']}")
    return "\n".join(lines)


def _lines_of_persons(told: dict) -> str:
    matching = [c for c in told["candidates"] if c["decision"] == "match"]
    who = matching[0]["person"] if matching else "nobody"
    count = len(told["prints"])
    lines = [f"{count} print{'s' * (count > 1)}: {who} (log10 of the likelihood ratio from {told['threshold']:.1f} on)"]
    for c in told["candidates"]:
        fingers = f"{c['fingers']} finger{'s' * (c['fingers'] > 1)}"
        lines.append(f"  {c['rank']:3d}. {c['person']}  {c['llr']:.1f}, {c['decision']}  {fingers} enrolled")
        lines += [f"       {told['prints'][x['probe']]}: {x['finger']}  score {x['score']:.4f}" for x in c["likest"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.identify"))
