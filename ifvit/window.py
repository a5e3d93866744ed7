"""What of a print the networks' window holds, which is centred on its canvas."""

from typing import Any

from jaxtyping import Bool, Float

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI, MASK_CELL

CUT = 0.15  # of a print's foreground: a window that leaves out more cuts it


def share_seen(mask: Bool[Any, "*N M M"], config: Settings) -> Float[Any, "*N"]:
    """The share of a print's foreground that the window of `config` holds; 1 of a print without any."""
    side = config.image_size * CANVAS_PPI / config.input_ppi / MASK_CELL
    first = max(round((mask.shape[-1] - side) / 2), 0)
    last = mask.shape[-1] - first
    return (mask[..., first:last, first:last].sum((-2, -1)) + 1e-9) / (mask.sum((-2, -1)) + 1e-9)


def cuts(mask: Bool[Any, "*N M M"], config: Settings) -> Bool[Any, "*N"]:
    """Whether the window of `config` leaves out too much of prints, by their masks."""
    return share_seen(mask, config) < 1 - CUT
