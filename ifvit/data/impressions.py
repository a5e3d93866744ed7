"""What skin lies where on two impressions of a finger.

A map from canvas 0 to canvas 1 is (G, G, 2) float32: of the points at every MAP_STEP px of canvas 0, from (0, 0) to the
first beyond its far edge, row by row, the px (x, y) of canvas 1 that show the same skin. The map of a print to itself
is the points themselves.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
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


@dataclass(frozen=True)
class Impressions:
    """The prints of a run, and the maps between impressions of a finger: those of generated fingers are known."""

    prints: tuple[Print, ...]
    canvas_size: int

    @property
    def known(self) -> bool:
        """Whether any two prints are mapped to each other."""
        made = Counter(p.identity for p in self.prints if p.database == SYNTHETIC)
        return max(made.values(), default=0) > 1

    def mapped(self, i: int, finger: Sequence[int]) -> list[int]:
        """Of the prints `finger`, which are of one finger, those other than print i that are mapped to it."""
        return [j for j in finger if j != i] if self.prints[i].database == SYNTHETIC else []

    def maps(self, i: int, j: int) -> dict[str, Grid]:
        """`map01` from print i's canvas to print j's, and `map10` back; of prints that are not mapped both are idle."""
        if self.prints[i].identity != self.prints[j].identity or not self.mapped(i, [j]):
            same = canvas_points(self.canvas_size)
            return {"map01": same, "map10": same}
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
