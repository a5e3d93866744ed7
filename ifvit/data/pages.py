"""Which picture of a file is the print: the page that is largest, the right way up."""

import struct

from PIL import Image

from ifvit.data.bare import tiff_entries, tiff_numbers

SEVERAL_PAGES = "hold several pages, of which the largest is read, of equal ones the first"

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_largest_page(image: Image.Image) -> bool:
    """Turns to the page with the most pixels, of equal ones the first; whether others are more than its thumbnails."""
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # a broken page further on does not make this one worse
        return True
    if count == 1 or image.format not in ("TIFF", "MPO"):  # the frames of other formats have one size
        return count > 1
    sizes = [_page_size(image, i) for i in range(count)]
    areas = [width * height for width, height in (size or (0, 0) for size in sizes)]
    best = areas.index(max(areas))
    image.seek(best)
    return not all(i == best or size and _is_thumbnail(size, sizes[best]) for i, size in enumerate(sizes))


def larger_sub_picture(raw: bytes, pixels: int) -> bytes | None:
    """Of a TIFF with a larger picture below its first page (a SubIFD) the file with that as first page; else None."""
    order = "<" if raw[:2] == b"II" else ">"
    first = tiff_entries(raw, struct.unpack_from(order + "I", raw, 4)[0]) if raw[2:4] in (b"*\0", b"\0*") else None
    places = [offset for tag, place in first or [] if tag == 330 for offset in tiff_numbers(raw, place)]
    sizes = {offset: _sub_size(raw, offset) for offset in places}
    if not sizes or max(sizes.values()) <= pixels:
        return None
    return raw[:4] + struct.pack(order + "I", max(sizes, key=sizes.get)) + raw[8:]


def upright(image: Image.Image) -> Image.Image:
    """Turned as its orientation tag says; as it is where that cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(274))
    except Exception:  # Pillow's reader of EXIF raises anything on a broken block; the pixels are good
        turn = None
    return image if turn is None else image.transpose(turn)


def _page_size(image: Image.Image, page: int) -> tuple[int, int] | None:
    """None for a page that cannot be read; (0, 0) for a mask (bit 2 of a TIFF's kind of page)."""
    try:
        image.seek(page)
        mask = image.format == "TIFF" and image.tag_v2.get(254, 0) & 4
    except Exception:  # Pillow's readers raise anything on a broken file
        return None
    return (0, 0) if mask else image.size


def _sub_size(raw: bytes, offset: int) -> int:
    """Pixels of the directory at `offset`; 0 for one that cannot be read."""
    sides = [
        numbers[0]
        for tag, place in tiff_entries(raw, offset) or []
        if tag in (256, 257)
        if (numbers := tiff_numbers(raw, place))
    ]
    return sides[0] * sides[1] if len(sides) == 2 else 0


def _is_thumbnail(size: tuple[int, int], of: tuple[int, int]) -> bool:
    """Smaller, and of the same proportions; so is a mask, of no size."""
    across, down = (a / b for a, b in zip(size, of))
    return max(across, down) < 0.8 and abs(across - down) <= 0.05 * max(across, down, 0.2)
