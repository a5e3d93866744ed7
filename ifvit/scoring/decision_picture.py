"""Why two prints match or not, in one picture for an examiner's eye.

Above, both prints whole, with the matches, what the networks saw of them, what both show, and the part that the local
branch looked at. Below, print a laid on print b in two colours, and what each part of the score counts for.
"""

import os
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.patches import Polygon

from ifvit.config import Settings
from ifvit.data.placement import Placement, mapped, similarity_map, window_to_canvas
from ifvit.data.single import OnCanvas
from ifvit.pixels.agreement import seen_of
from ifvit.pixels.registration import CheckedRegistration
from ifvit.scoring import plots
from ifvit.scoring.fit import Fit, fit
from ifvit.scoring.fit_pictures import overlay

_GAP = 24  # px of the canvas, between the prints
_LABELS = {
    "log_clear": "agreement of the ridges",
    "log_ridges": "agreement of the ridges",
    "log_global": "global embedding",
    "log_local": "local embedding",
}
_SEEN, _SHARED, _LOCAL = "tab:gray", "tab:green", "tab:purple"


def decision(
    path: str | os.PathLike,
    a: OnCanvas,
    b: OnCanvas,
    found: CheckedRegistration,
    config: Settings,
    roi: Float[np.ndarray, "4 2"] | None,
    parts: Mapping[str, float],
    title: str,
) -> None:
    """Draws one pair as a PNG.

    `found` is the registration of one pair (no batch axis), on the host; `roi` the corners of the local branch's input
    in px of b's window, of Module 2; `parts` what each part of the score adds to the natural logarithm of the
    likelihood ratio.
    """
    figure = plots.new_figure(11, 9.5)
    figure.suptitle(plots.plain(title))
    above, laid, told = figure.subplot_mosaic([["above", "above"], ["laid", "told"]], height_ratios=[1.25, 1]).values()
    fitted = fit(found, Placement(), Placement(), config)
    shown = found.registered
    shared, drawn = _shared(a, b, fitted) if shown else (None, None)
    _prints(above, a, b, fitted, config, shared, roi if shown else None, found)
    _laid(laid, drawn, b, shared)
    _parts(told, parts)
    plots.save(figure, path)


def _shared(a: OnCanvas, b: OnCanvas, fitted) -> tuple[Bool[np.ndarray, "C C"], np.ndarray]:
    """Where both prints show skin, in b's frame, and the picture of a laid on b."""
    warped, there, xy = fitted.warped(a.canvas, b.canvas.shape)
    x, y = np.clip(np.round(xy).astype(int), 0, len(a.canvas) - 1).transpose(2, 0, 1)
    return there & _foreground(a)[y, x] & _foreground(b), overlay(warped, there, b.canvas)


def _foreground(p: OnCanvas) -> Bool[np.ndarray, "C C"]:
    return plots.pixels(p.mask)


def _prints(axes: Axes, a: OnCanvas, b: OnCanvas, fitted: Fit, config: Settings, shared, roi, found) -> None:
    (left_a, top_a, right_a, bottom_a), (left_b, top_b, right_b, bottom_b) = (plots.box(_foreground(p)) for p in (a, b))
    wide, high = right_a - left_a, max(bottom_a - top_a, bottom_b - top_b)
    both = np.full((high, wide + _GAP + right_b - left_b), 255, np.uint8)
    both[: bottom_a - top_a, :wide] = a.canvas[top_a:bottom_a, left_a:right_a]
    both[: bottom_b - top_b, wide + _GAP :] = b.canvas[top_b:bottom_b, left_b:right_b]
    to_a, to_b = np.array([-left_a, -top_a]), np.array([wide + _GAP - left_b, -top_b])

    axes.set_axis_off()
    plots.pale(axes, both)
    window, seen = window_to_canvas(config), seen_of(found.deformation, config)
    corners = mapped(window_to_canvas(seen), _corners(-0.5, -0.5, seen.image_size, seen.image_size))
    for box, move, label in (
        ((left_a, top_a, right_a, bottom_a), to_a, "what the networks see"),
        ((left_b, top_b, right_b, bottom_b), to_b, None),
    ):
        least, most = np.array(box[:2]) - 0.5, np.array(box[2:]) - 0.5
        _outline(axes, np.clip(corners, least, most) + move, _SEEN, label)
    if roi is not None:
        back = np.linalg.inv(similarity_map(found.similarity))
        _outline(axes, mapped(window, mapped(back, roi)) + to_a, _LOCAL, "what the local branch sees")
        _outline(axes, mapped(window, roi) + to_b, _LOCAL, None)
    if shared is not None and shared.any():
        y, x = np.mgrid[: len(shared), : shared.shape[1]]
        axes.contour(x + to_b[0], y + to_b[1], shared.astype(float), [0.5], colors=_SHARED, linewidths=1.2)
        axes.plot([], [], color=_SHARED, label="what both show")
    xy_a, xy_b = (fitted.xy_a, fitted.xy_b) if found.registered else (np.empty((0, 2)),) * 2
    plots.match_lines(axes, xy_a + to_a, xy_b + to_b, fitted.match_confidence[: len(xy_a)])
    axes.set_anchor("C")  # the colour bar has moved it
    axes.set_xlim(-0.5, both.shape[1] - 0.5)
    axes.set_ylim(both.shape[0] - 0.5, -0.5)
    axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, -0.09), ncols=3, frameon=False)


def _laid(axes: Axes, drawn, b: OnCanvas, shared) -> None:
    axes.set_axis_off()
    if drawn is None:
        axes.text(0.5, 0.5, "not registered:\nthe ridges do not agree anywhere", ha="center", va="center")
        return
    left, top, right, bottom = plots.box(_foreground(b) | shared)
    axes.imshow(drawn[top:bottom, left:right])
    axes.set_title("a (magenta) laid on b (green): black where both have a ridge", fontsize="small")


def _parts(axes: Axes, parts: Mapping[str, float]) -> None:
    names = [*(_LABELS.get(name, name) for name in parts), "together"]
    values = np.array([*parts.values(), sum(parts.values())]) / np.log(10)
    colours = ["tab:blue" if v >= 0 else "tab:orange" for v in values]
    axes.barh(range(len(names)), values, color=colours)
    axes.set_yticks(range(len(names)), [plots.plain(n) for n in names])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.bar_label(axes.containers[0], fmt="%+.1f", padding=3)
    axes.margins(x=0.18)
    axes.set_title("what each part adds to log10 of the likelihood ratio", fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)


def _corners(left: float, top: float, width: float, height: float) -> Float[np.ndarray, "4 2"]:
    return np.array([[left, top], [left + width, top], [left + width, top + height], [left, top + height]], np.float64)


def _outline(axes: Axes, corners, colour: str, label: str | None) -> None:
    axes.add_patch(Polygon(corners, fill=False, edgecolor=colour, linestyle="--", label=label))
