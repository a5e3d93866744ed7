"""A contact sheet: prints of every database on their canvases, as the networks get them, their masks outlined."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from ifvit.data.canvases import MASK_CELL
from ifvit.data.prepare import PrintSet
from ifvit.errors import UserError

MOST = 60  # prints on a sheet
COLUMNS = 10
SIDE = 240  # px of a print's picture
CAPTION = 30  # px below it, for two lines
EDGE = (220, 30, 30)


def contact_sheet(path: str | os.PathLike, prints: PrintSet, captions: Sequence[str]) -> None:
    """Writes a PNG of at most `MOST` of the prints, spread over databases and in each over fingers.

    `captions`: of each print, a line below its name. UserError where the file cannot be written.
    """
    chosen = spread([p.database for p in prints.prints], MOST)
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(chosen)) * SIDE, rows * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 11)
    for place, i in enumerate(chosen):
        row, column = divmod(place, COLUMNS)
        x, y = column * SIDE, row * (SIDE + CAPTION)
        picture = Image.fromarray(outlined(*prints.canvas(i)))
        sheet.paste(picture.resize((SIDE - 4, SIDE - 4), Image.Resampling.BOX), (x + 2, y + 2))
        p = prints.prints[i]
        for line, text in enumerate((f"{p.database} {p.finger}_{p.impression}", captions[i])):
            draw.text((x + 4, y + SIDE - 1 + 14 * line), fitting(text, font, SIDE - 8), "black", font)
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # the sheet is there whole or not at all
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(part, format="PNG")
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"The sheet {path} cannot be written: {e.strerror}. Give --sheet a path that can.") from e
    finally:
        if part.exists():
            part.unlink()


def spread(databases: Sequence[str], most: int) -> list[int]:
    """At most `most` numbers of prints: of each database as many as of others where it has them, spread over it."""
    members: dict[str, list[int]] = {}
    for i, name in enumerate(databases):
        members.setdefault(name, []).append(i)
    share, left = {}, most
    # What small databases leave is for larger ones.
    for n, name in enumerate(sorted(members, key=lambda name: len(members[name]))):
        share[name] = min(len(members[name]), left // (len(members) - n))
        left -= share[name]
    return [mine[k * len(mine) // share[name]] for name, mine in members.items() for k in range(share[name])]


def outlined(canvas: UInt8[np.ndarray, "C C"], mask: Bool[np.ndarray, "C/8 C/8"]) -> UInt8[np.ndarray, "C C 3"]:
    """The canvas in colours, the mask's edge drawn; outside of the mask it is paler."""
    fine = np.kron(np.pad(mask, 1), np.ones((MASK_CELL, MASK_CELL), bool))
    edge = (ndimage.binary_dilation(fine, iterations=2) & ~fine)[MASK_CELL:-MASK_CELL, MASK_CELL:-MASK_CELL]
    inside = fine[MASK_CELL:-MASK_CELL, MASK_CELL:-MASK_CELL]
    grey = np.where(inside, canvas, 128 + canvas // 2)
    return np.where(edge[..., None], np.uint8(EDGE), grey[..., None].astype(np.uint8))


def fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The end of a text that is too long for `width` px; bytes that are not UTF-8 are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    while font.getlength(text) > width:
        text = "…" + text.lstrip("…")[1:]
    return text
