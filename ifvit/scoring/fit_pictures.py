"""Pictures of a registration, as arrays: the warped print, the grid that shows how, both prints in two colours."""

import numpy as np
from jaxtyping import Bool, Float, UInt8

_GRID = (200, 30, 30)


def with_grid(
    warped: UInt8[np.ndarray, "H W"], xy: Float[np.ndarray, "H W 2"], there: Bool[np.ndarray, "H W"], step: float
) -> UInt8[np.ndarray, "H W 3"]:
    """The warped print, paler, and on it the lines that were every `step` px apart, and straight, in its own picture.

    A line is drawn where the number of the square that a pixel came from changes to the pixel on its right or below it.
    """
    square = np.floor(xy / step)
    line = np.zeros(there.shape, bool)
    line[:, :-1] |= (square[:, :-1] != square[:, 1:]).any(-1)
    line[:-1] |= (square[:-1] != square[1:]).any(-1)
    picture = np.repeat((128 + warped / 2)[..., None], 3, -1).astype(np.uint8)
    picture[line & there] = _GRID
    return picture


def overlay(
    warped: UInt8[np.ndarray, "H W"], there: Bool[np.ndarray, "H W"], b: UInt8[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Print a's ridges in magenta, b's in green: where both have one it is black, where neither has it is white."""
    a = np.where(there, warped, 255)
    return np.stack([b, a, b], -1)
