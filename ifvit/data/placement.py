"""Where the pixels of a picture lie on its canvas, and where those of the networks' window do.

A frame's pixels are (x, y) with pixel centres at whole numbers, so that the upper left corner of a frame is (−½, −½).
Maps between frames are 3 × 3 matrices for homogeneous columns (x, y, 1), in float64: they are inverted exactly.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI

Map = Float[np.ndarray, "3 3"]


@dataclass(frozen=True)
class Placement:
    """How `images.place` brought a picture to its canvas: lines cut off, scaled, moved by whole pixels.

    Then it may have been turned (`OnCanvas.turned`).
    """

    cut: tuple[int, int] = (0, 0)  # px of the picture that were cut off at its left, and at its top
    scale: float = 1.0  # px of the canvas a px of the picture
    shift: tuple[int, int] = (0, 0)  # px of the canvas
    degrees: float = 0.0  # from x towards y, which is clockwise as the picture is seen
    about: float = 0.0  # x and y on the canvas of what it was turned about

    @property
    def to_canvas(self) -> Map:
        """canvas = turn · (scale · (picture − cut + ½) − ½ + shift): corners, not pixel centres, are scaled."""
        move = [self.scale * (0.5 - cut) - 0.5 + shift for cut, shift in zip(self.cut, self.shift)]
        return turn(self.degrees, self.about) @ _scaled(self.scale, *move)

    def turned(self, degrees: float, about: float) -> "Placement":
        """The canvas was turned (again) about its point (about, about), the same one each time."""
        return replace(self, degrees=self.degrees + degrees, about=about)


def turn(degrees: float, about: float) -> Map:
    """Turns by so many degrees, from x towards y, about the point (about, about)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, about - c * about + s * about], [s, c, about - s * about - c * about], [0, 0, 1]])


def window_to_canvas(config: Settings) -> Map:
    """The networks' window, centred on the canvas (`views.plain_view`), to the canvas."""
    ratio = CANVAS_PPI / config.input_ppi
    move = (config.canvas_size - 1) / 2 - ratio * (config.image_size - 1) / 2
    return _scaled(ratio, move, move)


def similarity_map(similarity: Float[np.ndarray, "4"]) -> Map:
    """The similarity (a, b, u, v) of `pixels.geometry` as a matrix."""
    a, b, u, v = np.asarray(similarity, np.float64)
    return np.array([[a, -b, u], [b, a, v], [0, 0, 1]])


def mapped(through: Map, xy: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N 2"]:
    """Points of one frame in the other."""
    return xy.astype(np.float64) @ through[:2, :2].T + through[:2, 2]


def _scaled(scale: float, x: float, y: float) -> Map:
    return np.array([[scale, 0, x], [0, scale, y], [0, 0, 1]], np.float64)
