"""A trained matcher in a program of one's own: docs/python.md.

    from ifvit import Matcher
    print(Matcher.load().compare("a.png", "b.png").decision)

Nothing here imports JAX before a checkpoint is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from ifvit.errors import CheckpointNotFound, UserError

if TYPE_CHECKING:
    from ifvit.data.single import OnCanvas
    from ifvit.scoring.scorer import Scorer

LEAST_MM2 = 12.0  # of skin, about 68 × 68 px at 500 ppi: of less, ridges that differ or are not found tell nothing
DEFAULT = "./checkpoints/matcher/matcher_ckpt"


@dataclass(frozen=True, eq=False)
class Picture:
    """A print, and how it is to be read. UserError for a resolution or ridges that no print has."""

    image: Any  # a file's path, a picture of Pillow's, or an array (height, width) or (height, width, channels)
    ppi: float | str | None = None  # px an inch; None: what set and file tell; "auto": unless the ridges tell another
    ridges: str = "dark"  # in the image, or "light"

    def __post_init__(self):
        told = self.ppi in (None, "auto")
        if not told and not (isinstance(self.ppi, int | float) and 0 < self.ppi <= 5000):  # NaN neither
            raise UserError(f"ppi is {self.ppi!r}; give a resolution in pixels an inch, such as 500, or 'auto'.")
        if self.ridges not in ("dark", "light"):
            raise UserError(f"ridges is {self.ridges!r}; they are 'dark' or 'light'.")


@dataclass(frozen=True, eq=False)
class Registration:
    """How print a lies on print b. Points are (x, y) in pixels of the images, pixel centres at whole numbers."""

    matches: Float[np.ndarray, "N 4"]  # x, y in a, x, y in b: those that agree on one similarity, the surest first
    confidence: Float[np.ndarray, " N"]  # of each, 0 … 1
    transform: Float[np.ndarray, "3 3"] | None  # (x, y, 1) in a -> in b, a similarity; None where too few agree
    overlap: float  # share of the smaller print that both show; 0 without a transform


@dataclass(frozen=True, eq=False)
class Comparison(Registration):
    """Whether prints a and b are of one finger."""

    score: float  # of Module 2 the probability; of Module 1 how well the ridges agree, 0 … 1
    threshold: float  # of the score, at the false match rate that was asked for
    decision: Literal["match", "no match", "cannot decide"]  # whether it is reached; the last where little is seen
    probability: float  # that they are, were genuine and impostor pairs equally many
    llr: float  # log10 of the likelihood ratio: 2, a hundred times as likely of one finger as of two; −2, the reverse


@dataclass(frozen=True, eq=False)
class Matcher:
    """Module 2 with its calibration, and the Module 1 that aligns its pairs; or a Module 1 alone.

    Module 1 compares the ridges of prints once they are laid on each other. Its threshold for a false match rate is
    that of the packaged weights (`pixels.agreement.threshold`).
    Prints are paths, pictures of Pillow's, `Picture`s (an array needs one, for its ppi), or what `read` has returned.
    """

    checkpoint: str
    scorer: Scorer = field(repr=False)

    @classmethod
    def load(cls, checkpoint: str | os.PathLike | None = None) -> Matcher:
        """The matcher of a checkpoint; left out, of the one that training leaves below the current folder, else of the
        package's weights.

        UserError where there is none, or one that is damaged, or of Module 2 without a calibrated score.
        """
        import jax

        from ifvit import cli
        from ifvit.checkpoint import or_packaged
        from ifvit.paths import cache_dir, resolve
        from ifvit.scoring.scorer import Scorer

        if not jax.config.jax_compilation_cache_dir:  # the program's own choice stays
            cli.use_compilation_cache(cache_dir() / "compiled")
        path = or_packaged(checkpoint, DEFAULT)
        try:
            scorer = Scorer.from_checkpoint(path)
        except CheckpointNotFound:
            if checkpoint is not None:
                raise
            raise CheckpointNotFound(
                f"There is no trained matcher at {resolve(DEFAULT)}; train one with python -m ifvit.train_all, or give "
                "the path of one to Matcher.load."
            ) from None
        if scorer.module == "matcher" and scorer.fusion is None:
            raise UserError(f"{path} has no calibrated score; give Module 2's final checkpoint (matcher_ckpt).")
        return cls(path, scorer)

    def read(self, image: Any) -> OnCanvas:
        """A print, decoded once for several comparisons. UserError for a picture that shows none."""
        from ifvit.data.single import OnCanvas, on_canvas

        if isinstance(image, OnCanvas):
            return image
        picture = image if isinstance(image, Picture) else Picture(image)
        return on_canvas(picture.image, picture.ppi, self.scorer.config.canvas_size, picture.ridges)

    def compare(self, a: Any, b: Any, fmr: float = 0.001, turned: bool = False) -> Comparison:
        """One pair; `fmr` is the false match rate to decide at, by the checkpoint's calibration.

        `turned`: the prints may lie at any angle to each other. Without, they are often no match beyond 60° or
        so. What is no match as it lies is tried at eight angles, which an impostor has too (docs/figures.md).
        """
        return self.compare_many([(a, b)], fmr, 1, turned)[0]

    def compare_many(
        self, pairs: Iterable[Sequence[Any]], fmr: float = 0.001, batch_size: int = 16, turned: bool = False
    ) -> list[Comparison]:
        """Pairs (a, b), so many at once; in their order."""
        _check(fmr)
        return [found for *_, found in self._compared(pairs, fmr, batch_size, turned)]

    def draw(self, a: Any, b: Any, path: str | os.PathLike, fmr: float = 0.001, turned: bool = False) -> Comparison:
        """Compares one pair, and draws why it is decided so: a PNG at `path`. `turned` as `compare`.

        UserError for a matcher that was trained without Module 1: it lays no print on another.
        """
        from ifvit.data.pairs import Pair
        from ifvit.data.single import Canvases
        from ifvit.scoring.decision_picture import decision

        _check(fmr)
        self.scorer.registers  # noqa: B018 (refused before anything is compared)
        ((a, b, row, found),) = self._compared([(a, b)], fmr, 1, turned)
        prints, pair = Canvases([a, b]), Pair(0, 1, False)
        laid = self.scorer.registration(prints, pair)
        decision(
            path,
            a,
            b,
            laid,
            self.scorer.config,
            self.scorer.local_corners(prints, pair, laid),
            self.scorer.parts(row),
            f"{Path(a.name).name} (a), {Path(b.name).name} (b): {found.decision}, score {found.score:.4f} "
            f"(threshold {found.threshold:.4f} at FMR {fmr:g})",
        )
        return found

    @property
    def least_fmr(self) -> float:
        """The lowest false match rate that the calibration can show; a threshold for less is an estimate."""
        from ifvit.pixels import agreement

        return self.scorer.fusion.least_fmr if self.scorer.fusion else agreement.LEAST_FMR

    def register(self, a: Any, b: Any) -> Registration:
        """One pair by Module 1 alone, however they lie. UserError for a matcher that was trained without it."""
        if self.scorer.fusion and not self.scorer.aligner:
            raise UserError("This matcher was trained without Module 1 and registers nothing; compare still works.")
        ((a, b, row),) = self._rows(self.scorer.registrations, [(a, b)], 1)
        if upright := self.scorer.upright(a, b, row["similarity"] if row["aligned"] else None):
            ((upright, _, again),) = self._rows(self.scorer.registrations, [(upright, b)], 1)
            if again["aligned"]:
                a, row = upright, again
        return Registration(**_registration(row, a, b, self.scorer.config))

    def embed(self, prints: Iterable[Any], batch_size: int = 16) -> Float[np.ndarray, "N E"]:
        """A template of each print by itself, so many at once: unit rows, alike where their product is near 1.

        UserError for a checkpoint that makes none.
        """
        from ifvit.data.single import Canvases

        read = [self.read(p) for p in prints]
        return self.scorer.templates(Canvases(read), batch_size)[:, 0]

    def _compared(self, pairs, fmr: float, batch_size: int, turned: bool) -> list[tuple]:
        """(a, b, what the scorer answers, Comparison) of each pair, a as it was turned."""
        if turned:
            self.scorer.registers  # noqa: B018 (refused before anything is compared)
        rows = self._rows(self.scorer.answers, pairs, batch_size)
        found = [(*row, self._comparison(*row, fmr)) for row in rows]
        for n, (a, b, row, comparison) in enumerate(found if turned else ()):
            similarity = row["similarity"] if comparison.decision == "match" and row["aligned"] else None
            if upright := self.scorer.upright(a, b, similarity):
                (again,) = self._compared([(upright, b)], fmr, 1, False)
                found[n] = max(found[n], again, key=lambda one: one[-1].score)
        return found

    def _comparison(self, a: OnCanvas, b: OnCanvas, row: dict[str, Any], fmr: float) -> Comparison:
        from ifvit.pixels import agreement

        threshold = (self.scorer.fusion or agreement).threshold(fmr)
        laid = _registration(row, a, b, self.scorer.config)
        return Comparison(
            **laid,
            score=float(row["score"]),
            threshold=threshold,
            decision="match" if row["score"] >= threshold else _no_match(a, b, laid),
            probability=float(row.get("probability", row["score"])),
            llr=float(row["log_odds"] / np.log(10)),
        )

    def _rows(self, ask, pairs, batch_size: int) -> list[tuple[OnCanvas, OnCanvas, dict[str, Any]]]:
        """What the scorer answers of each pair, and its prints on their canvases."""
        from ifvit.data.pairs import Pair
        from ifvit.data.single import Canvases

        read = [(self.read(a), self.read(b)) for a, b in pairs]
        if not read:
            return []
        prints = list({id(p): p for pair in read for p in pair}.values())
        number = {id(p): n for n, p in enumerate(prints)}
        found = ask(Canvases(prints), [Pair(number[id(a)], number[id(b)], False) for a, b in read], batch_size)
        return [(a, b, {k: v[i] for k, v in found.items()}) for i, (a, b) in enumerate(read)]


def _check(fmr: float) -> None:
    if not 0 < fmr < 1:
        raise UserError(f"fmr is {fmr}; give a rate between 0 and 1, such as 0.001.")


def _no_match(a: OnCanvas, b: OnCanvas, laid: dict[str, Any]) -> Literal["no match", "cannot decide"]:
    """What a score below the threshold means: nothing, where a print or what both show is less than LEAST_MM2."""
    seen = min(a.mm2, b.mm2)
    if laid["transform"] is not None:
        seen *= laid["overlap"]
    return "cannot decide" if seen < LEAST_MM2 else "no match"


def _registration(row: dict[str, Any], a: OnCanvas, b: OnCanvas, config) -> dict[str, Any]:
    """The fields of a `Registration`: from px of the window to px of both pictures."""
    from ifvit.data.placement import mapped, similarity_map, window_to_canvas

    if "similarity" not in row:  # Module 2 without Module 1
        return dict(matches=np.empty((0, 4)), confidence=np.empty(0), transform=None, overlap=0.0)
    to_a, to_b = (np.linalg.inv(p.placement.to_canvas) @ window_to_canvas(config) for p in (a, b))
    keep = row["inliers"]
    through = to_b @ similarity_map(row["similarity"]) @ np.linalg.inv(to_a)
    return dict(
        matches=np.hstack([mapped(to_a, row["points0"][keep]), mapped(to_b, row["points1"][keep])]),
        confidence=row["confidence"][keep].astype(np.float64),
        transform=through if row["aligned"] else None,
        overlap=float(row["overlap"]) if row["aligned"] else 0.0,
    )
