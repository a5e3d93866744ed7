"""An image file without its metadata, for one whose pixels are good and whose EXIF, XMP, ICC or other tags are not.

What decides the pixels stays, byte for byte; so do tags of the resolution that are as they should be.
"""

import struct
import zlib

# width, height, bits, compression, photometric, fill order, strips, orientation, samples, planes, T4 and T6 options,
# predictor, palette, tiles, extra samples, sample format, JPEG and YCbCr
_TIFF_PIXELS = {
    256,
    257,
    258,
    259,
    262,
    266,
    273,
    274,
    277,
    278,
    279,
    284,
    292,
    293,
    317,
    320,
    322,
    323,
    324,
    325,
    338,
    339,
    *range(512, 522),
    347,
    *range(529, 533),
}
_TIFF_RESOLUTION = {282: (5, 1), 283: (5, 1), 296: (3, 1)}  # (type, count) of a tag that is as it should be


def without_metadata(raw: bytes) -> bytes | None:
    """The same picture as a file of the same format; None for a format whose metadata are not told from its pixels."""
    if raw.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(raw)
    if raw.startswith(b"\xff\xd8"):
        return _jpeg(raw)
    if raw[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(raw)
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return _webp(raw)
    if raw[4:8] == b"jP  ":
        start = raw.find(b"\xff\x4f\xff\x51")  # the code stream, which is a file of its own
        return raw[start:] if start > 0 else None
    return None


def _png(raw: bytes) -> bytes:
    out, at = [raw[:8]], 8
    while at + 8 <= len(raw):
        size, kind = struct.unpack_from(">I4s", raw, at)
        chunk = raw[at : at + 12 + size]
        sound = len(chunk) == 12 + size and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or (sound and (kind == b"tRNS" or (kind == b"pHYs" and size == 9))):
            out.append(chunk)  # as it is: a broken one is to be told
        at += 12 + size
    return b"".join(out)


def _jpeg(raw: bytes) -> bytes:
    out, at = [raw[:2]], 2
    while at + 4 <= len(raw) and raw[at] == 0xFF and raw[at + 1] != 0xDA:
        marker, size = raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "big")
        jfif = marker == 0xE0 and size >= 16 and raw[at + 4 : at + 9] == b"JFIF\0"
        if not 0xE0 <= marker <= 0xEF or jfif or marker == 0xEE:  # 0xEE, Adobe's, tells the colours
            out.append(raw[at : at + 2 + size])
        at += 2 + size
    return b"".join([*out, raw[at:]])


def _webp(raw: bytes) -> bytes:
    out, at = [], 12
    while at + 8 <= len(raw):
        kind, size = struct.unpack_from("<4sI", raw, at)
        chunk = raw[at : at + 8 + size + size % 2]
        if kind == b"VP8X" and len(chunk) >= 9:
            chunk = chunk[:8] + bytes([chunk[8] & 0b00010010]) + chunk[9:]  # animation and alpha, no ICC, EXIF or XMP
        if kind not in (b"EXIF", b"XMP ", b"ICCP"):
            out.append(chunk)
        at += 8 + size + size % 2
    body = b"".join(out)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def _tiff(raw: bytes) -> bytes | None:
    """All directories of the chain, each in its place, with fewer entries."""
    order = "<" if raw[:2] == b"II" else ">"
    out, (at,), seen = bytearray(raw), struct.unpack_from(order + "I", raw, 4), set()
    while at and at not in seen and (entries := tiff_entries(raw, at)) is not None:
        seen.add(at)
        kept = [raw[place : place + 12] for tag, place in entries if _needed(raw, order, tag, place)]
        end = at + 2 + 12 * len(entries)
        following = raw[end : end + 4].ljust(4, b"\0")
        short = struct.pack(order + "H", len(kept)) + b"".join(kept) + following
        out[at : at + len(short)] = short
        (at,) = struct.unpack(order + "I", following)
    return bytes(out) if seen else None


def tiff_entries(raw: bytes, at: int) -> list[tuple[int, int]] | None:
    """(tag, where its entry of 12 bytes stands) of the directory at `at`; None where the file ends within it."""
    order = "<" if raw[:2] == b"II" else ">"
    if at + 2 > len(raw):
        return None
    (count,) = struct.unpack_from(order + "H", raw, at)
    places = [at + 2 + 12 * i for i in range(count)]
    if not places or places[-1] + 12 > len(raw):
        return None
    return [(struct.unpack_from(order + "H", raw, place)[0], place) for place in places]


def tiff_numbers(raw: bytes, place: int) -> tuple[int, ...]:
    """The whole numbers of the entry at `place`; () where it holds others, or they lie beyond the file."""
    order = "<" if raw[:2] == b"II" else ">"
    kind, count = struct.unpack_from(order + "HI", raw, place + 2)
    letter = {1: "B", 3: "H", 4: "I", 13: "I"}.get(kind)
    if letter is None or not 0 < count < 100:
        return ()
    size = struct.calcsize(letter) * count
    start = place + 8 if size <= 4 else struct.unpack_from(order + "I", raw, place + 8)[0]
    return struct.unpack_from(f"{order}{count}{letter}", raw, start) if start + size <= len(raw) else ()


def _needed(raw: bytes, order: str, tag: int, place: int) -> bool:
    kind, count = struct.unpack_from(order + "HI", raw, place + 2)
    if tag == 274:  # an orientation that cannot be read is none
        return tiff_numbers(raw, place)[:1] in [(i,) for i in range(1, 9)]
    return tag in _TIFF_PIXELS or _TIFF_RESOLUTION.get(tag) == (kind, count)
