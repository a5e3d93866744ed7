"""Single prints on their canvases, of a file or in memory: what is compared outside of a data set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy.ndimage import affine_transform

from ifvit.constants import CANVAS_PPI, MASK_CELL
from ifvit.data import scale
from ifvit.data.images import BrokenImage, decode, place, print_ppi
from ifvit.data.levels import grey_levels
from ifvit.data.names import known_ppi
from ifvit.data.placement import Placement, turn
from ifvit.data.sources import Print
from ifvit.data.tags import believable_ppi, ppi_tags
from ifvit.errors import UserError
from ifvit.paths import resolve_data


@dataclass(frozen=True, eq=False)
class OnCanvas:
    """A print as the networks take it, and where its picture's pixels lie there."""

    name: str  # the file's path; of a picture in memory what it is
    canvas: UInt8[np.ndarray, "C C"]
    mask: Bool[np.ndarray, "C/8 C/8"]
    placement: Placement

    @property
    def mm2(self) -> float:
        """The area of skin that it shows, square millimetres."""
        return float(self.mask.sum() * (MASK_CELL / CANVAS_PPI * 25.4) ** 2)

    def turned(self, degrees: float) -> "OnCanvas":
        """Turned about the canvas' middle, from x towards y: what leaves the canvas is lost."""

        def of(x, order: int):
            middle = (len(x) - 1) / 2
            back = turn(-degrees, middle)[[1, 0]][:, [1, 0, 2]]  # of (row, column)
            return affine_transform(x, back[:, :2], back[:, 2], order=order, cval=float(x[0, 0]))

        mask = of(self.mask.astype(np.float32), 1) > 0.5
        placement = self.placement.turned(degrees, (len(self.canvas) - 1) / 2)
        return replace(self, canvas=of(self.canvas, 3), mask=mask, placement=placement)


class Canvases:
    """Prints in memory, with what scoring asks of a PrintSet."""

    def __init__(self, some: Sequence[OnCanvas]):
        self.some = tuple(some)
        self.prints = tuple(Print(p.name, "", str(i), "1", None) for i, p in enumerate(some))

    def canvas(self, i: int) -> tuple[UInt8[np.ndarray, "C C"], Bool[np.ndarray, "C/8 C/8"]]:
        return self.some[i].canvas, self.some[i].mask


def on_canvas(
    image: Any,
    ppi: float | str | None,
    canvas_size: int,
    ridges: str = "dark",
) -> OnCanvas:
    """A print on its canvas.

    `image` is a file's path, a picture of Pillow's, or an array of grey levels or colours. The resolution of a file is
    that of its set, else of its tag, else 500 ppi; that of a picture of Pillow's its tag's, else 500; an array tells
    none. A number for `ppi` comes before these, and with `auto` the ridges do where they tell another.

    UserError for what cannot be read, and for what shows no print.
    """
    name, grey, known, tag = _of_file(image) if isinstance(image, str | os.PathLike) else _in_memory(image)
    number = print_ppi(known if ppi in (None, "auto") else ppi, tag)
    if ppi == "auto":
        told = "the set" if known else "file's tag" if tag else "assumed"
        number = scale.fitted([("", scale.measured(name, grey, number, told))]).get(name, number)
    elif ppi is None and not isinstance(image, str | os.PathLike | Image.Image):
        raise UserError(f"{name} tells no resolution; give it with the array, such as Picture(array, ppi=500).")
    canvas, mask, placement = place(255 - grey if ridges == "light" else grey, number, canvas_size)
    if not mask.any():
        raise UserError(
            f"{name} shows no ridges: it is blank, too faint or too small; give another image, or its --ppi."
        )
    return OnCanvas(name, canvas, mask, placement)


def _of_file(path: str | os.PathLike) -> tuple[str, UInt8[np.ndarray, "H W"], float | None, float | None]:
    """Name, grey levels, and what its set and its tag tell of the resolution."""
    name = resolve_data(os.fspath(path))
    try:
        grey, tag = decode(name)
    except BrokenImage as e:
        raise UserError(f"{e}; give an image that can be read.") from None
    return name, grey, known_ppi(name), tag


def _in_memory(image: Any) -> tuple[str, UInt8[np.ndarray, "H W"], None, float | None]:
    """The same of a picture of Pillow's, or of an array."""
    if isinstance(image, Image.Image):
        name, picture = f"The picture of {image.width} × {image.height} px", image
        tag = believable_ppi(*ppi_tags(image))
    else:
        array, tag = np.asarray(image), None
        name = f"The array of shape {array.shape}"
        if array.ndim not in (2, 3) or not array.size:
            raise UserError(
                f"{name} is no picture; give grey levels (height, width), a file's path or Pillow's picture."
            )
        try:
            picture = Image.fromarray(array)
        except (TypeError, ValueError) as e:  # Pillow's, for kinds of numbers and channels that it knows no picture of
            raise UserError(
                f"{name} and {array.dtype} is no picture ({e}); give grey levels (height, width) of uint8."
            ) from None
    try:
        return name, grey_levels(picture), None, tag
    except OSError as e:  # a file of which Pillow has read no more than the head
        raise UserError(f"{name} cannot be read: {e}; give an image that is whole.") from None
