"""The resolution that an image file tells: its tags of dots an inch, or a comment in NIST's form."""

import re

from PIL import Image

NOT_SQUARE = "tell two resolutions, one across and one down, and count as telling none"


def ppi_tags(image: Image.Image) -> tuple[float, float]:
    """Pixels an inch across and down, as Pillow reads them from any unit; (0, 0) where none are told, or oddly."""
    try:
        x, y = (float(v) for v in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return 0.0, 0.0
    return x, y


def believable_ppi(x: float, y: float) -> float | None:
    """The resolution that two tags agree on, in pixels an inch, or None.

    1, 72, 96 and 120 are what software writes for "unknown"; no sensor for prints lies
    below 250. Axes that differ by more than 2 % are not a square pixel's.
    """
    if _of_a_sensor(x) and _of_a_sensor(y) and abs(x - y) <= 0.02 * max(x, y):
        return (x + y) / 2
    return None


def not_square(x: float, y: float) -> bool:
    """Whether both tags could be a sensor's, and are not of one resolution."""
    return _of_a_sensor(x) and _of_a_sensor(y) and believable_ppi(x, y) is None


def _of_a_sensor(ppi: float) -> bool:
    return 250 <= ppi <= 2000


def jpeg_comments(image: Image.Image) -> bytes:
    """All comments of a JPEG; b"" of another format."""
    return b"\n".join(text for kind, text in getattr(image, "applist", []) if kind == "COM")


def wsq_comments(raw: bytes) -> bytes:
    """The comments that stand before the picture's data, wherever between its tables."""
    comments, at = [], 2
    while at + 4 <= len(raw) and raw[at] == 0xFF and raw[at + 1] != 0xA3:  # 0xA3: a block of data begins
        size = int.from_bytes(raw[at + 2 : at + 4], "big")
        if raw[at + 1] == 0xA8:
            comments.append(raw[at + 4 : at + 2 + size])
        at += 2 + max(size, 2)
    return b"\n".join(comments)


def nistcom_ppi(comments: bytes) -> float | None:
    """The resolution that a NISTCOM comment tells, as NIST's tools write it into WSQ and JPEG."""
    found = re.search(rb"^\s*PPI\s+(\d+(?:\.\d+)?)\s*$", comments, re.MULTILINE)
    return float(found[1]) if found else None
