"""Prints as a gallery keeps them: their canvas with its foreground, as a PNG of grey levels with alpha."""

import io

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from ifvit.constants import MASK_CELL
from ifvit.data.prepare import Prints
from ifvit.data.sources import Print
from ifvit.errors import UserError
from ifvit.gallery.store import Entry


def as_png(canvas: UInt8[np.ndarray, "C C"], mask: Bool[np.ndarray, "C/8 C/8"]) -> bytes:
    alpha = mask.repeat(MASK_CELL, 0).repeat(MASK_CELL, 1).astype(np.uint8) * 255
    file = io.BytesIO()
    Image.fromarray(np.dstack([canvas, alpha])).save(file, "PNG")
    return file.getvalue()


def of_png(data: bytes) -> tuple[UInt8[np.ndarray, "C C"], Bool[np.ndarray, "C/8 C/8"]]:
    """The canvas and its foreground, to the bit."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    return pixels[..., 0].copy(), pixels[::MASK_CELL, ::MASK_CELL, 1] > 0


class Enrolled:
    """Prints of a gallery after probes, with what scoring asks of a PrintSet."""

    def __init__(self, probes: Prints, entries: list[Entry]):
        self._probes, self._entries = probes, entries
        self.prints = (*probes.prints, *(Print(e.name, e.database, e.finger, "", None) for e in entries))

    def canvas(self, i: int) -> tuple[UInt8[np.ndarray, "C C"], Bool[np.ndarray, "C/8 C/8"]]:
        if i < len(self._probes.prints):
            return self._probes.canvas(i)
        entry = self._entries[i - len(self._probes.prints)]
        try:
            return of_png(entry.picture)
        except (OSError, SyntaxError, ValueError, IndexError) as e:
            raise UserError(
                f"The gallery's picture of {entry.name} is damaged; take it out (python -m ifvit.gallery remove), then "
                "enrol its file again."
            ) from e
