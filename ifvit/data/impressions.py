"""What skin lies where on two impressions of a finger.

A map from canvas 0 to canvas 1 is (G, G, 2) float32: of the points at every MAP_STEP px of canvas 0, from (0, 0) to the
first beyond its far edge, row by row, the px (x, y) of canvas 1 that show the same skin. The map of a print to itself
is the points themselves.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from ifvit.constants import MAP_STEP
from ifvit.data import synthetic
from ifvit.data.images import decode, place
from ifvit.data.placement import Map, mapped
from ifvit.data.sources import SYNTHETIC, Print

Grid = Float[np.ndarray, "R C 2"]
Points = Float[np.ndarray, "N 2"]


@dataclass(frozen=True)
class Warp:
    """A smooth map of the plane: an affine one and a residual, which beyond its samples is that of the nearest."""

    affine: Map
    residual: Grid  # at the points (column, row) · step
    step: float

    @classmethod
    def through(cls, values: Grid, step: float = 1.0) -> "Warp":
        """The map that takes (column, row) · step to the value there; the affine one fits best."""
        points = _points(*values.shape[:2], step)
        few = [a[::4, ::4].reshape(-1, 2).astype(np.float64) for a in (points, values)]
        fit = np.linalg.lstsq(np.column_stack([few[0], np.ones(len(few[0]))]), few[1], rcond=None)[0]
        affine = np.vstack([fit.T, [0, 0, 1]])
        residual = values - mapped(affine, points.reshape(-1, 2)).reshape(values.shape)
        return cls(affine, residual.astype(np.float32), step)

    def __call__(self, xy: Points) -> Points:
        at = xy[:, ::-1].T / self.step
        bend = [ndimage.map_coordinates(self.residual[..., k], at, order=1, mode="nearest") for k in (0, 1)]
        return mapped(self.affine, xy) + np.stack(bend, axis=-1)

    def inverse(self, xy: Points) -> Points:
        """The points that are taken to `xy`, by fixed-point iteration: the residual bends far less than the rest."""
        back = np.linalg.inv(self.affine)
        found = mapped(back, xy)
        for _ in range(20):
            found = found + (xy - self(found)) @ back[:2, :2].T
        return found


class Taught(NamedTuple):
    """Pairs of impressions of real fingers, and their maps."""

    pairs: Int[np.ndarray, "N 2"]  # indices of the prints
    map01: Float[np.ndarray, "N G G 2"]
    map10: Float[np.ndarray, "N G G 2"]


@dataclass(frozen=True)
class Impressions:
    """The prints of a run, and the maps between impressions of a finger: of generated ones, and those `taught`."""

    prints: tuple[Print, ...]
    canvas_size: int
    taught: Taught | None = None

    @property
    def known(self) -> bool:
        """Whether any two prints are mapped to each other."""
        made = Counter(p.identity for p in self.prints if p.database == SYNTHETIC)
        return bool(self._rows) or max(made.values(), default=0) > 1

    @cached_property
    def _rows(self) -> dict[tuple[int, int], int]:
        """Of two prints, in the order of `taught`, which row is theirs."""
        return {(i, j): n for n, (i, j) in enumerate(self.taught.pairs.tolist())} if self.taught else {}

    def mapped(self, i: int, finger: Sequence[int]) -> list[int]:
        """Of the prints `finger`, which are of one finger, those other than print i that are mapped to it."""
        if self.prints[i].database == SYNTHETIC:
            return [j for j in finger if j != i]
        return [j for j in finger if (i, j) in self._rows or (j, i) in self._rows]

    def maps(self, i: int, j: int) -> dict[str, Grid]:
        """`map01` from print i's canvas to print j's, and `map10` back; of prints that are not mapped both are idle."""
        if self.prints[i].identity != self.prints[j].identity or not self.mapped(i, [j]):
            same = canvas_points(self.canvas_size)
            return {"map01": same, "map10": same}
        if (j, i) in self._rows:
            there = self.maps(j, i)
            return {"map01": there["map10"], "map10": there["map01"]}
        if (row := self._rows.get((i, j))) is not None:
            return {"map01": self.taught.map01[row], "map10": self.taught.map10[row]}
        (skin0, back0), (skin1, back1) = (_skin(self.prints[k].path, self.canvas_size) for k in (i, j))
        through = lambda skin, back: back(skin.reshape(-1, 2)).reshape(skin.shape).astype(np.float32)
        return {"map01": through(skin0, back1), "map10": through(skin1, back0)}


@functools.lru_cache(maxsize=4096)
def _skin(path: str, canvas_size: int) -> tuple[Grid, Warp]:
    """Of a generated print: the px of the master finger at each point of its canvas's map, and the way back."""
    to_canvas = place(decode(path)[0], synthetic.PPI, canvas_size)[2].to_canvas
    to_master = Warp.through(synthetic.true_map(*synthetic.numbers(path)))
    points = canvas_points(canvas_size)
    skin = to_master(mapped(np.linalg.inv(to_canvas), points.reshape(-1, 2))).reshape(points.shape)
    master = _points(synthetic.HEIGHT // MAP_STEP + 1, synthetic.WIDTH // MAP_STEP + 1, MAP_STEP)
    back = mapped(to_canvas, to_master.inverse(master.reshape(-1, 2)))
    return skin.astype(np.float32), Warp.through(back.reshape(master.shape), MAP_STEP)


def canvas_points(canvas_size: int) -> Grid:
    """The points at which a map is known, as it has them: the map of a print to itself."""
    side = -(-canvas_size // MAP_STEP) + 1
    return _points(side, side, MAP_STEP)


def _points(rows: int, columns: int, step: float) -> Grid:
    """(x, y) of a grid's points."""
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    return np.stack([x, y], axis=-1) * np.float32(step)
