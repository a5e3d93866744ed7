"""Pictures: DET curves, score histograms, training curves, matches. PNG files, written whole or not at all.

Figures are made without pyplot, so there is no global state, no window, and threads do not meet.
"""

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from jaxtyping import Bool, Float, Num, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ifvit.config import Settings
from ifvit.constants import MASK_CELL
from ifvit.data.placement import mapped, window_to_canvas
from ifvit.errors import UserError
from ifvit.files import whole
from ifvit.scoring.rates import eer_of_curve

_GENUINE, _IMPOSTOR = "tab:blue", "tab:orange"
_GAP = 16  # px of white between two prints
_MARGIN = 8  # px of the canvas about a print that is cut out of it


def det(path: str | os.PathLike, curves: Mapping[str, tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]]) -> None:
    """DET curves, name -> (FMR, FNMR) as fractions with ascending thresholds, on log axes in per cent.

    A rate of 0 has no place on a log axis: it is drawn at the axis' lower end. The dotted diagonal
    is where both rates are equal.
    """
    lowest = 100 * min((rates[rates > 0].min() for pair in curves.values() for rates in pair if rates.any()), default=1)
    floor = min(0.1, 10 ** np.floor(np.log10(lowest / 1.01)))
    figure = new_figure(6.5, 6)
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlim=(floor, 100), ylim=(floor, 100), aspect="equal",
        xlabel="FMR (%)", ylabel="FNMR (%)",
    )  # fmt: skip
    axes.plot([floor, 100], [floor, 100], ":", color="grey", linewidth=1, label="FMR = FNMR")
    for name, (fmr, fnmr) in curves.items():
        x, y = np.maximum(100 * fmr, floor), np.maximum(100 * fnmr, floor)
        # "pre": between two FMRs that thresholds give, only the lower one's FNMR can be had.
        label = f"{plain(name)}: EER {100 * eer_of_curve(fmr, fnmr):.2f} %"
        axes.step(x, y, where="pre", clip_on=False, zorder=3, label=label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(which="major", alpha=0.4)
    axes.legend(fontsize="small", loc="best" if len(curves) < 6 else "lower left")
    save(figure, path)


def cmc(path: str | os.PathLike, curves: Mapping[str, Sequence[float]]) -> None:
    """CMC curves, name -> share of probes found at rank 1, 2, …, in per cent over ranks."""
    figure = new_figure(6.5, 4.5)
    axes = figure.add_subplot(xlabel="rank", ylabel="probes whose finger is among the likest (%)")
    for name, shares in curves.items():
        ranks = np.arange(1, len(shares) + 1)
        axes.plot(ranks, 100 * np.asarray(shares), ".-", label=f"{plain(name)}: rank-1 {100 * shares[0]:.1f} %")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.4)
    axes.legend(fontsize="small", loc="lower right")
    save(figure, path)


def plain(text: str) -> str:
    """A text as it stands, for Matplotlib: a dollar sign begins no formula, bytes that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def histogram(path: str | os.PathLike, genuine: ArrayLike, impostor: ArrayLike, threshold: float | None = None) -> None:
    """How the scores of genuine and impostor pairs spread: shares of each kind, over common bins.

    Raises UserError when there is no score at all.
    """
    ends = [end(kind) for kind in (genuine, impostor) if len(kind) for end in (np.min, np.max)]
    if not ends:
        raise UserError("There are no scores to draw. Give prints of which pairs can be made.")
    edges = np.histogram_bin_edges(np.array(ends, np.float64), bins=40)
    figure = new_figure(7, 4)
    axes = figure.add_subplot(xlabel="score", ylabel="share of the kind (%)")
    for kind, scores, color in (("impostor", impostor, _IMPOSTOR), ("genuine", genuine, _GENUINE)):
        share = 100 * np.histogram(scores, edges)[0] / max(len(scores), 1)
        axes.hist(edges[:-1], edges, weights=share, color=color, alpha=0.6, label=f"{kind} ({len(scores)})")
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.4g}")
    axes.legend()
    save(figure, path)


def curves(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Training curves over the steps, a panel a metric, from the rows of a metrics.jsonl.

    A row has `step`, `epoch`, `split` ("train" or "val"), and metrics by name; what is no finite
    number is left out. Where a resumed run logged a step twice, the later row counts.

    Raises UserError when no row has a metric.
    """
    metrics: dict[str, dict[str, dict[int, float]]] = {}  # metric -> split -> step -> value
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch", "split") and isinstance(value, Real) and np.isfinite(value):
                metrics.setdefault(name, {}).setdefault(row["split"], {})[row["step"]] = float(value)
    if not metrics:
        raise UserError("There are no metrics to draw. Train for at least one step first.")

    columns = min(3, len(metrics))
    panels_down = -(-len(metrics) // columns)
    figure = new_figure(4 * columns, 2.6 * panels_down)
    for position, (name, splits) in enumerate(metrics.items(), start=1):
        axes = figure.add_subplot(panels_down, columns, position)
        for split, color, style in (("train", _GENUINE, "-"), ("val", _IMPOSTOR, "o-")):
            points = sorted(splits.get(split, {}).items())
            if points:
                # A single point makes no line, so it gets a marker.
                axes.plot(*zip(*points), style if len(points) > 1 else "o", color=color, markersize=4, label=split)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("step", fontsize="small")
        axes.tick_params(labelsize="small")
        axes.grid(alpha=0.4)
        axes.legend(fontsize="small")
    save(figure, path)


def matches(
    path: str | os.PathLike,
    a: Num[np.ndarray, "Ha Wa"],
    b: Num[np.ndarray, "Hb Wb"],
    xy_a: Num[np.ndarray, "N 2"],
    xy_b: Num[np.ndarray, "N 2"],
    confidence: Float[np.ndarray, " N"],
    title: str,
) -> None:
    """Two prints side by side (uint8 0 to 255, or float 0 to 1) and a line for each match.

    Positions are (x, y) in pixels of the print's own picture, confidence 0 to 1. N may be 0.
    """
    height, width = max(len(a), len(b)), a.shape[1] + _GAP + b.shape[1]
    both = np.ones((height, width))
    both[: len(a), : a.shape[1]] = _unit(a)
    both[: len(b), a.shape[1] + _GAP :] = _unit(b)

    figure = new_figure(9.5, max(3, 8 * height / width + 0.6))
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(plain(title))
    pale(axes, both)
    match_lines(axes, np.asarray(xy_a), np.asarray(xy_b) + (a.shape[1] + _GAP, 0), confidence)
    save(figure, path)


def whole_print(
    canvas: UInt8[np.ndarray, "C C"], mask: Bool[np.ndarray, "C/8 C/8"], seen: Settings, xy: Float[np.ndarray, "N 2"]
) -> tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "N 2"]]:
    """A print cut out of its canvas, 0 to 1, pale outside of the window of `seen`; and points of the canvas in it."""
    foreground = pixels(mask)
    left, top, right, bottom = box(foreground)
    low, high = np.percentile(canvas[foreground], [2, 98]) if foreground.any() else (0, 255)
    picture = np.clip((canvas - low) / max(high - low, 1), 0, 1)
    edges = mapped(window_to_canvas(seen), np.array([[-0.5, -0.5], [seen.image_size - 0.5] * 2])).round().astype(int)
    first, last = np.clip(edges + (edges < 0), 0, len(canvas))
    inside = np.zeros(canvas.shape, bool)
    inside[first[1] : last[1] + 1, first[0] : last[0] + 1] = True
    picture = np.where(inside, picture, 0.75 + 0.15 * picture)
    return picture[top:bottom, left:right], xy - [left, top]


def pixels(mask: Bool[np.ndarray, "M M"]) -> Bool[np.ndarray, "8*M 8*M"]:
    """The foreground of a canvas, pixel by pixel."""
    return mask.repeat(MASK_CELL, 0).repeat(MASK_CELL, 1)


def box(mask: Bool[np.ndarray, "C C"]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what is true, with a margin."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    (top, bottom), (left, right) = ((int(some[0]), int(some[-1]) + 1) for some in (rows, columns))
    return (
        max(left - _MARGIN, 0),
        max(top - _MARGIN, 0),
        min(right + _MARGIN, mask.shape[1]),
        min(bottom + _MARGIN, mask.shape[0]),
    )


def pale(axes: Axes, image: Num[np.ndarray, "H W"]) -> None:
    """Draws a print paler than it is, so that lines stand out from dark ridges."""
    axes.imshow(0.6 + 0.4 * _unit(image), cmap="gray", vmin=0, vmax=1)


def match_lines(
    axes: Axes, start: Num[np.ndarray, "N 2"], end: Num[np.ndarray, "N 2"], confidence: Float[np.ndarray, " N"]
) -> None:
    """A line from start to end of each match, (x, y) of the axes, its colour the confidence, 0 to 1. N may be 0."""
    weakest_first = np.argsort(confidence)  # what is drawn last lies on top
    start, end = (np.asarray(xy, np.float64).reshape(-1, 2)[weakest_first] for xy in (start, end))
    shade = matplotlib.colors.Normalize(0, 1)
    lines = LineCollection(np.stack([start, end], axis=1), cmap="turbo", norm=shade, linewidths=1, alpha=0.85)
    lines.set_array(np.asarray(confidence, np.float64)[weakest_first])
    axes.add_collection(lines, autolim=False)
    for ends in (start, end):
        axes.scatter(*ends.T, c=lines.get_array(), cmap="turbo", norm=shade, s=8, linewidths=0)
    axes.figure.colorbar(lines, ax=axes, label="confidence", fraction=0.03, pad=0.02)


def _unit(image: np.ndarray) -> np.ndarray:
    return image / 255 if np.issubdtype(image.dtype, np.integer) else image


def new_figure(width: float, height: float) -> Figure:
    """A figure of that many inches, at 100 dots an inch."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        figure.savefig(part, format="png")
