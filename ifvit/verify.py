"""Compares two prints: same finger or not.

python -m ifvit.verify A B --checkpoint ./checkpoints/matcher/matcher_ckpt [--picture out.png]
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ifvit import cli
from ifvit.errors import UserError
from ifvit.evaluate import check_ppi
from ifvit.paths import cache_dir, resolve, resolve_data


@dataclass(frozen=True)
class Args:
    """Compares two prints with a trained matcher."""

    a: Annotated[str, tyro.conf.Positional]
    """one print"""
    b: Annotated[str, tyro.conf.Positional]
    """the other"""
    checkpoint: str = "./checkpoints/matcher/matcher_ckpt"
    """Module 2's final checkpoint"""
    fmr: float = 0.001
    """false match rate to decide at, by the checkpoint's calibration"""
    picture: str = ""
    """PNG of both prints with their matches as lines"""
    json: bool = False
    """print {"score", "decision", "matches"} as JSON"""
    ppi: float | Literal["auto"] | None = None
    """resolution of both prints, whatever files and sets tell; `auto`: what they tell, unless the ridges differ"""
    ridges: Literal["dark", "light"] = "dark"
    """in both images; `light` of sensors that show them white on black"""

    def run(self) -> int:
        from ifvit.data.pairs import Pair
        from ifvit.scoring.scorer import Scorer

        if not 0 < self.fmr < 1:
            raise UserError(f"--fmr is {self.fmr}; give a rate between 0 and 1, such as 0.001.")
        check_ppi(self.ppi)
        cli.use_compilation_cache(cache_dir() / "compiled")
        scorer = Scorer.from_checkpoint(self.checkpoint)
        if scorer.module != "matcher" or scorer.fusion is None:
            raise UserError(
                f"{self.checkpoint} has no calibrated score; give Module 2's final checkpoint (matcher_ckpt)."
            )
        prints = on_canvases(
            [resolve_data(self.a), resolve_data(self.b)], self.ppi, scorer.config.canvas_size, self.ridges
        )
        pair = Pair(0, 1, False)
        found = scorer.score(prints, [pair], 1)
        score, threshold = float(found["score"][0]), scorer.fusion.threshold(self.fmr)
        matches = int(found["matches"][0])
        decision = "match" if score >= threshold else "no match"
        if self.picture:
            scorer.picture(prints, pair, resolve(self.picture))
        if self.json:
            print(json.dumps({"score": score, "decision": decision, "matches": matches, "threshold": threshold}))
        else:
            print(f"score {score:.4f}, {decision} (threshold {threshold:.4f} at FMR {self.fmr:g}), {matches} matches")
        return 0


@dataclass(frozen=True)
class Canvases:
    """Prints decoded in memory, with what scoring asks of a PrintSet."""

    prints: tuple
    arrays: tuple

    def canvas(self, i: int):
        return self.arrays[i]


def on_canvases(
    paths: Sequence[str | os.PathLike], ppi: float | Literal["auto"] | None, canvas_size: int, ridges: str = "dark"
) -> Canvases:
    """Single files on their canvases, at the resolution of their set. UserError for a file that shows no print."""
    from ifvit.data import scale
    from ifvit.data.images import BrokenImage, decode, print_ppi, to_canvas
    from ifvit.data.names import known_ppi
    from ifvit.data.sources import Print

    arrays = []
    for path in paths:
        try:
            grey, tag = decode(path)
        except BrokenImage as e:
            raise UserError(f"{e}; give an image that can be read.") from None
        known = known_ppi(path) if ppi in (None, "auto") else ppi
        number = print_ppi(known, tag)
        if ppi == "auto":
            told = "the set" if known else "file's tag" if tag else "assumed"
            number = scale.fitted([("", scale.measured(path, grey, number, told))]).get(path, number)
        arrays.append(to_canvas(255 - grey if ridges == "light" else grey, number, canvas_size))
        if not arrays[-1][1].any():
            raise UserError(
                f"{path} shows no ridges: it is blank, too faint or too small; give another image, or its --ppi."
            )
    return Canvases(tuple(Print(p, "", str(i), "1", None) for i, p in enumerate(paths)), tuple(arrays))


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.verify"))
