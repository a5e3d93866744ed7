"""A registration in the pixels of the prints' own pictures: similarity, matches, and the map of the warp."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy.ndimage import map_coordinates

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI
from ifvit.data.placement import Map, Placement, mapped, similarity_map, window_to_canvas
from ifvit.pixels.agreement import CELL, seen_of
from ifvit.pixels.registration import CheckedRegistration


@dataclass(frozen=True, eq=False)
class Fit:
    """How print a lies on print b: pixels (x, y) of the pictures, their centres at whole numbers."""

    similarity: Map  # from a's picture to b's, without the deformation
    xy_a: Float[np.ndarray, "N 2"]  # matches that the similarity holds
    xy_b: Float[np.ndarray, "N 2"]
    match_confidence: Float[np.ndarray, " N"]
    deformation: Float[np.ndarray, "W W 2"]  # px at CHECK_PPI of b's window
    b_to_check: Map
    agreement: float
    overlap: float
    registered: bool
    confidence: float
    ppi_a: float  # that a's picture is read at

    @property
    def parameters(self) -> dict[str, float]:
        """x2 = a x1 − b y1 + u, y2 = b x1 + a y1 + v; the turn is clockwise as the picture is seen."""
        (a, _, u), (b, _, v) = self.similarity[:2]
        turn = {"scale": np.hypot(a, b), "degrees": np.degrees(np.arctan2(b, a))}
        return {k: float(x) for k, x in ({"a": a, "b": b, "u": u, "v": v} | turn).items()}

    def back(self, xy: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N 2"]:
        """Points of b's picture in a's: a's content there belongs here."""
        return bent_back(xy, self.similarity, self.deformation, self.b_to_check)

    def warped(
        self, a: UInt8[np.ndarray, "Ha Wa"], shape: tuple[int, int]
    ) -> tuple[UInt8[np.ndarray, "H W"], Bool[np.ndarray, "H W"], Float[np.ndarray, "H W 2"]]:
        """Picture a in the frame of picture b, of `shape` (height, width): pixels, white beyond it; where it has some;
        and where in a each of them lies."""
        y, x = np.mgrid[: shape[0], : shape[1]]
        xy = self.back(np.stack([x, y], -1).reshape(-1, 2).astype(np.float64)).reshape(*shape, 2)
        there = ((xy >= -0.5) & (xy <= np.array(a.shape[::-1]) - 0.5)).all(-1)
        values = map_coordinates(a.astype(np.float32), [xy[..., 1], xy[..., 0]], order=1, mode="nearest")
        return np.where(there, np.round(values), 255).astype(np.uint8), there, xy


def bent_back(
    xy: Float[np.ndarray, "N 2"], similarity: Map, deformation: Float[np.ndarray, "W W 2"], b_to_check: Map
) -> Float[np.ndarray, "N 2"]:
    """Points of b's frame in a's, by a similarity from a to b and a deformation, px at CHECK_PPI of b's window."""
    q = mapped(b_to_check, xy)
    row_column = ((q + 0.5) / CELL - 1)[:, ::-1].T  # among the windows' centres
    bend = [map_coordinates(deformation[..., k], row_column, order=1, mode="nearest") for k in (0, 1)]
    bent = mapped(np.linalg.inv(b_to_check), q + np.stack(bend, -1))
    return mapped(np.linalg.inv(similarity), bent)


def fit(found: CheckedRegistration, placement_a: Placement, placement_b: Placement, config: Settings) -> Fit:
    """Of one pair (no batch axis), on the host, from the networks' window back to the pictures, exactly."""
    window = window_to_canvas(config)
    a_to_window, b_to_window = (np.linalg.inv(window) @ p.to_canvas for p in (placement_a, placement_b))
    keep = np.asarray(found.inliers)
    return Fit(
        np.linalg.inv(b_to_window) @ similarity_map(found.similarity) @ a_to_window,
        mapped(np.linalg.inv(a_to_window), np.asarray(found.points0)[keep]),
        mapped(np.linalg.inv(b_to_window), np.asarray(found.points1)[keep]),
        np.asarray(found.matches.confidence)[keep],
        np.asarray(found.deformation),
        np.linalg.inv(window_to_canvas(seen_of(found.deformation, config))) @ placement_b.to_canvas,
        float(found.agreement),
        float(found.overlap),
        bool(found.registered),
        float(found.confidence),
        CANVAS_PPI / placement_a.scale,
    )
