"""Pairs with a print that the networks' window cuts are registered in a wider one, at the same resolution.

Networks are trained in the smaller window, which costs less; they are convolutions, attention and positions, and take
another size as well. Of a large print, rolled ones above all, the smaller window of either may show another part.
"""

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI, STRIDE
from ifvit.models.networks import Network
from ifvit.pixels.agreement import at_ppi, points_at_ppi
from ifvit.pixels.registration import CheckedRegistration, Registration, checked_registration

KEY = "wide_"  # before the names of a batch's rows that are of the wider window


def widened(config: Settings, times: float) -> Settings | None:
    """`config` with a window so many times as wide, no wider than the canvas; None where that is no wider one.

    It keeps as many matches for its area.
    """
    whole = config.canvas_size * config.input_ppi / CANVAS_PPI
    side = int(min(round(config.image_size * times / STRIDE), whole // STRIDE)) * STRIDE
    if side <= config.image_size:
        return None
    matches = round(config.alignment_matches * (side / config.image_size) ** 2)
    return config.replace(image_size=side, alignment_matches=matches)


def looked_at(
    aligner: Network, aligner_state: tuple, batch: dict, config: Settings, wide: Settings | None = None
) -> tuple[CheckedRegistration, Registration]:
    """`checked_registration` in the window of `config`, or of `wide`; told in px of the window of `config`.

    The deformation, and the registration by matches alone, are told where they were seen. `batch` is one of canvases,
    or of rows of the window that is taken, whose names begin with KEY where it holds others too.
    """
    if wide is None:
        return checked_registration(aligner, aligner_state, batch, config)
    rows = {k.removeprefix(KEY): v for k, v in batch.items() if k.startswith(KEY)} or batch
    found, by_matches = checked_registration(aligner, aligner_state, rows, wide)
    return in_window(found, wide, config), by_matches


def in_window(found: CheckedRegistration, wide: Settings, config: Settings) -> CheckedRegistration:
    """A registration in px of the wider window, in px of the other: points may lie outside of it."""
    return found._replace(
        similarity=at_ppi(found.similarity, wide, config),
        points0=points_at_ppi(found.points0, wide, config),
        points1=points_at_ppi(found.points1, wide, config),
    )
