"""Whose finger is it: compares prints with a gallery.

python -m ifvit.identify PRINT [PRINT …] --gallery G [--top 10]
"""

import json
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
        angles = AROUND if self.turned else (0,)
        fmr = 1 - (1 - self.fpir) ** (1 / (gallery.fingers * len(angles)))
        threshold = (matcher.scorer.fusion or agreement).threshold(fmr)
        probes = [matcher.read(Picture(path, self.ppi, self.ridges)) for path in self.prints]
        turned = [p.turned(angle) if angle else p for p in probes for angle in angles]
        found = self.candidates(gallery, matcher.scorer, turned)
        told = []
        for n, path in enumerate(self.prints):
            candidates = likest_of(found[n * len(angles) :][: len(angles)])
            for c in candidates:
                c["decision"] = "match" if c["score"] >= threshold else "no match"
            told.append({"print": path, "threshold": threshold, "fmr": fmr, "candidates": candidates[: self.top]})
        print(json.dumps(told, indent=1) if self.json else "\n".join(map(_lines, told)))
        return 0

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

    def candidates(self, gallery: "Gallery", scorer: "Scorer", probes: Sequence["OnCanvas"]) -> list[list[dict]]:
        """Of each probe the enrolled fingers, each with its likest impression, the likest first."""
        import numpy as np

        from ifvit.data.pairs import Pair
        from ifvit.data.single import Canvases
        from ifvit.gallery.pictures import Enrolled

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
        answers, first = [], 0
        for shortlist in shortlists:
            score, log_odds = (found[key][first:][: len(shortlist)] for key in ("score", "log_odds"))
            first += len(shortlist)
            fingers: dict[tuple[str, str], dict] = {}
            for i in np.argsort(-score, kind="stable"):
                e = shortlist[i]
                told = {"finger": f"{e.database}/{e.finger}", "print": e.name, "score": float(score[i])}
                fingers.setdefault((e.database, e.finger), told | {"llr": float(log_odds[i] / np.log(10))})
            answers.append([{"rank": n} | told for n, told in enumerate(fingers.values(), 1)])
        return answers


def likest_of(lists: Sequence[list[dict]]) -> list[dict]:
    """Candidates of one print that was looked for at several angles: each finger as it is likest, ranked anew."""
    fingers: dict[str, dict] = {}
    for c in sorted((c for some in lists for c in some), key=lambda c: -c["score"]):
        fingers.setdefault(c["finger"], c)
    return [c | {"rank": n} for n, c in enumerate(fingers.values(), 1)]


def _lines(told: dict) -> str:
    matching = [c for c in told["candidates"] if c["decision"] == "match"]
    who = matching[0]["finger"] if matching else "nobody"
    lines = [f"{told['print']}: {who} (threshold {told['threshold']:.4f})"]
    for c in told["candidates"]:
        lines.append(f"  {c['rank']:3d}. {c['finger']}  score {c['score']:.4f}, {c['decision']}  {c['print']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.identify"))
