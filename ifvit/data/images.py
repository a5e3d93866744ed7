"""From a file to the canvas: decode, segment, bring to 500 ppi without squashing.

A print on the canvas is dark ridges on light ground, 500 ppi in both directions,
its foreground centred, with a mask that says where ridges are.
"""

import io
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy import ndimage

from ifvit.data.bare import without_metadata
from ifvit.data.levels import grey_levels
from ifvit.data.pages import SEVERAL_PAGES, larger_sub_picture, to_largest_page, upright
from ifvit.data.placement import Placement
from ifvit.data.tags import NOT_SQUARE, believable_ppi, jpeg_comments, nistcom_ppi, not_square, ppi_tags, wsq_comments
from ifvit.errors import UserError

CANVAS_PPI = 500.0
RIDGE_PERIOD = 9.0 / 500.0  # inches from ridge to ridge: about 0.46 mm in an adult
MASK_CELL = 8  # canvas pixels a mask cell, the stride of the networks

_BOMB_LOCK = threading.Lock()


class BrokenImage(ValueError):
    """An image file that cannot be decoded: empty, truncated, or not an image."""


@dataclass(frozen=True)
class Picture:
    """What an image file holds."""

    grey: UInt8[np.ndarray, "H W"]
    ppi: float | None  # of the file's tag; None where it has none that can be believed
    note: str = ""  # what its reader should know of how it was read; the same words for files of a kind


def decode(path: str | os.PathLike, max_megapixels: float = 20) -> tuple[UInt8[np.ndarray, "H W"], float | None]:
    """The pixels of an image file as grey levels, and the ppi that it claims. See `read_picture`."""
    picture = read_picture(path, max_megapixels)
    return picture.grey, picture.ppi


def read_picture(path: str | os.PathLike, max_megapixels: float = 20, data: bytes | None = None) -> Picture:
    """The print in an image file, of any format that Pillow reads by itself, and WSQ with the package `wsq`.

    `data` is what the file holds, where that was read already.

    Palettes are looked up, colour becomes luma, transparency is laid on white, 16 bits
    become 8. The orientation tag is applied: Pillow does so for TIFF whatever we want,
    and a phone's photograph lies on its side without it; sensors write none. Of several
    pages the largest is read, of equal ones the first. Tags that are malformed count as missing.

    Raises: UserError for a file that is not there, is larger than `max_megapixels`
    (known from the header, nothing is decoded), or needs a package that is missing;
    BrokenImage, with the reason, for one that cannot be decoded, or not whole.
    """
    data = read_bytes(path) if data is None else data
    if data[:2] == b"\xff\xa0":
        _need_wsq(path)
    try:  # by its name Pillow would map the file, wrongly where a TIFF lies on its side
        return _read(data, path, max_megapixels)
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise anything on a broken file
        bare = without_metadata(data)
        try:
            if bare is not None:  # it may be the metadata alone that are broken
                return _read(bare, path, max_megapixels)
        except UserError:
            raise
        except Exception:  # they are not: the first error tells
            pass
        raise BrokenImage(f"{path}: {_reason(error, data)}") from error


def seems_light(grey: UInt8[np.ndarray, "H W"], ppi: float) -> bool:
    """Whether the ridges seem to be light: around the print it is dark, as dark as the print's own darker lines.

    The background looks like the valleys, because neither touches the sensor. Around a print that was cut out and laid
    on black it is mostly darker than any of the print's lines. A print that fills the image tells nothing: False.
    """
    mask = foreground(grey, ppi)
    if not mask.any() or (~mask).mean() < 0.1:
        return False
    low, middle, high = np.percentile(grey[mask], [10, 50, 90])
    ground = np.median(grey[~mask])
    return bool(ground < middle and abs(ground - low) < 0.15 * (high - low))


def print_ppi(known: float | None, tag: float | None) -> float:
    """The ppi to read a print at: the set's, else the file's tag, else 500."""
    return known or tag or CANVAS_PPI


def foreground(grey: UInt8[np.ndarray, "H W"], ppi: float) -> Bool[np.ndarray, "H W"]:
    """Where the ridges are: one region without holes, all False on a blank image.

    The root mean square of the gradient over about 1.5 ridge periods, on cells of half a
    period, against a share of what the print's own strong areas have.
    """
    height, width = grey.shape
    cell = max(1, round(0.45 * RIDGE_PERIOD * ppi))
    if min(height, width) < 4 * cell:
        return np.zeros(grey.shape, bool)
    period = RIDGE_PERIOD * ppi / cell  # in cells, as all that follows
    energy = np.sqrt(ndimage.gaussian_filter(_gradient_power(grey, cell), 0.75 * period))
    strong = _strong_level(energy)
    if strong < 4.0:  # grey levels a pixel: sensor noise, no print
        return np.zeros(grey.shape, bool)
    mask = energy > 0.36 * strong
    # Opening cuts the bridges to specks and smears, and the strips of a sensor's rim.
    mask = _open_by_disc(mask, 1.2 * period, beyond="constant")
    # Closing heals creases, and takes off the half period by which the filter spreads.
    mask = ~_open_by_disc(~mask, 1.2 * period, 0.6 * period)
    mask = ndimage.binary_fill_holes(_main_regions(mask))
    fine = np.repeat(np.repeat(mask, cell, 0), cell, 1)
    return np.pad(fine, [(0, height - fine.shape[0]), (0, width - fine.shape[1])], "edge")


def to_canvas(
    grey: UInt8[np.ndarray, "H W"], ppi: float, canvas: int = 512
) -> tuple[UInt8[np.ndarray, "canvas canvas"], Bool[np.ndarray, "canvas/8 canvas/8"]]:
    """The canvas and the mask of `place`."""
    return place(grey, ppi, canvas)[:2]


def place(
    grey: UInt8[np.ndarray, "H W"], ppi: float, canvas: int = 512
) -> tuple[UInt8[np.ndarray, "canvas canvas"], Bool[np.ndarray, "canvas/8 canvas/8"], Placement]:
    """The print at 500 ppi, its foreground's centroid in the middle of a square canvas.

    Aspect is kept; what does not fit is cut; what the image does not cover has the
    print's background level, so that no black corner tells of the frame.

    Returns: the canvas; the mask, True for a cell of 8 x 8 pixels at least half of which
    is foreground; where the image's pixels lie on the canvas.
    """
    if not ppi > 0 or canvas % MASK_CELL:
        raise ValueError(f"ppi {ppi} must be positive, canvas {canvas} a multiple of 8")
    scale = CANVAS_PPI / ppi
    grey, cut = _without_frame(grey)
    grey = _resample(grey, scale)
    mask = foreground(grey, CANVAS_PPI)
    out = np.full((canvas, canvas), _background(grey, mask), np.uint8)
    out_mask = np.zeros((canvas, canvas), bool)
    there = mask if mask.any() else np.ones_like(mask)
    middle = (np.average(np.arange(n) + 0.5, weights=there.sum(1 - axis)) for axis, n in enumerate(grey.shape))
    down, across = (canvas // 2 - round(m) for m in middle)
    source, target = zip(*(_overlap(n, shift, canvas) for n, shift in zip(grey.shape, (down, across))))
    out[target] = grey[source]
    out_mask[target] = mask[source]
    cells = canvas // MASK_CELL
    share = out_mask.reshape(cells, MASK_CELL, cells, MASK_CELL).mean((1, 3))
    return out, share >= 0.5, Placement(cut, scale, (across, down))


def read_bytes(path: str | os.PathLike) -> bytes:
    """What a file holds. UserError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror}. Check the path and its rights."
        raise UserError(why) from error


def _need_wsq(path: str | os.PathLike) -> None:
    try:
        import wsq  # noqa: F401  (registers itself with Pillow)
    except ImportError as error:
        raise UserError(f"{path} is WSQ, not read yet: pip install 'ifvit[wsq]'") from error


# Formats that Pillow hands to other programs, or knows the names of alone.
_NOT_READ = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"}


def _open(file: io.BytesIO) -> Image.Image:
    """Pillow's open, header only, without its own limit: ours has a sentence to it."""
    Image.init()
    with _BOMB_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=[f for f in Image.ID if f not in _NOT_READ])
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read(data: bytes, path: str | os.PathLike, max_megapixels: float) -> Picture:
    """The picture in `data`, which is what the file at `path` holds, or the part of it that counts."""
    with _open(io.BytesIO(data)) as image:
        several = to_largest_page(image)
        sub_pictures = image.format == "TIFF" and 330 in image.tag_v2
        if sub_pictures and (larger := larger_sub_picture(data, image.width * image.height)):
            return _read(larger, path, max_megapixels)
        width, height = image.size
        if width * height > max_megapixels * 1e6:
            raise UserError(
                f"{path} is too large: {width} x {height} pixels, and at most "
                f"{max_megapixels:g} million are read. Cut it to one finger, or scale it "
                "to 500 ppi."
            )
        comments = wsq_comments(data) if image.format == "WSQ" else jpeg_comments(image)
        x, y = (nistcom_ppi(comments),) * 2 if nistcom_ppi(comments) else ppi_tags(image)
        image.load()
        if image.format != "TIFF":  # done by Pillow while loading
            image = upright(image)
        note = SEVERAL_PAGES if several else NOT_SQUARE if not_square(x, y) else ""
        return Picture(grey_levels(image), believable_ppi(x, y), note)


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError | NameError):  # wsq's, without a frame
        return "not an image, or its header is broken"
    return str(error) or type(error).__name__


def _gradient_power(grey: np.ndarray, cell: int) -> np.ndarray:
    """The mean squared gradient in each cell of `cell` pixels a side."""
    rows, columns = grey.shape[0] // cell, grey.shape[1] // cell
    levels = np.pad(grey, 1, "edge").astype(np.int16)
    down = (levels[2:, 1:-1] - levels[:-2, 1:-1]).astype(np.float32)
    across = (levels[1:-1, 2:] - levels[1:-1, :-2]).astype(np.float32)
    power = (down * down + across * across)[: rows * cell, : columns * cell]
    by_rows = np.add.reduceat(power, np.arange(0, rows * cell, cell), 0)
    return np.add.reduceat(by_rows, np.arange(0, columns * cell, cell), 1) / (4 * cell**2)


def _strong_level(energy: np.ndarray) -> float:
    """What the strong areas have: the median of the upper class by Otsu's threshold."""
    counts, edges = np.histogram(energy, 128)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    mass = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = mass / below - (mass[-1] - mass) / above
    between = np.nan_to_num(below * above * gap**2)
    upper = energy[energy > edges[np.argmax(between) + 1]]
    return float(np.median(upper)) if upper.size else 0.0


def _open_by_disc(mask: np.ndarray, radius: float, more: float = 0.0, beyond: str = "edge") -> np.ndarray:
    """Erode by a disc of `radius` cells, dilate by one of `radius + more`.

    Beyond the image all is as at its border ("edge") or False ("constant").
    """
    if mask.all() or not mask.any():
        return mask
    pad = int(radius) + 1
    padded = np.pad(mask, pad, beyond)
    # Two distance transforms: their cost does not grow with the radius.
    kept = ndimage.distance_transform_edt(padded) > radius
    if not kept.any():
        return kept[pad:-pad, pad:-pad]
    grown = ndimage.distance_transform_edt(~kept) <= radius + more
    return grown[pad:-pad, pad:-pad]


def _main_regions(mask: np.ndarray) -> np.ndarray:
    """The largest region and those at least half its size (a print torn in two)."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= 0.5 * sizes.max())[labels]


def _without_frame(grey: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Cuts lines of one grey level off the sides: frames, bars, blank margin. How many at the left, and at the top.

    At most a tenth of the side: SOCOFing frames its prints in one to four pixels.
    """

    def flat(line: np.ndarray) -> bool:
        return bool(np.mean(np.abs(line - np.median(line)) <= 6) >= 0.93)

    def cut(lines: np.ndarray) -> int:
        most = len(lines) // 10
        return next((i for i in range(most) if not flat(lines[i])), most)

    signed = grey.astype(np.int16)
    top, bottom = cut(signed), cut(signed[::-1])
    left, right = cut(signed.T), cut(signed.T[::-1])
    return grey[top : len(grey) - bottom, left : grey.shape[1] - right], (left, top)


def _resample(grey: np.ndarray, scale: float) -> np.ndarray:
    """`grey` at `scale` times its size, antialiased, the same in both directions."""
    if scale == 1:
        return grey
    height, width = (max(1, int(n * scale)) for n in grey.shape)
    # The box is the part that whole output pixels cover: the scale stays exact.
    box = (0, 0, min(width / scale, grey.shape[1]), min(height / scale, grey.shape[0]))
    image = Image.fromarray(np.ascontiguousarray(grey))
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC, box))


def _background(grey: np.ndarray, mask: np.ndarray) -> int:
    """The level around the print; where it fills the image, that of its valleys.

    Only what is lighter than the print counts: a smear of wet ink is outside the mask too.
    """
    if not mask.any():
        return int(np.median(grey))
    light = grey[~mask & (grey > grey[mask].mean())]
    enough = light.size >= 0.02 * grey.size
    return int(np.median(light) if enough else np.percentile(grey[mask], 90))


def _overlap(size: int, shift: int, canvas: int) -> tuple[slice, slice]:
    """Where an axis of `size`, moved by `shift`, and the canvas meet."""
    first, last = max(0, shift), min(canvas, size + shift)
    return slice(first - shift, last - shift), slice(first, last)
