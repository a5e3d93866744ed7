"""Pixels come out of a file as they went in, whatever its format, levels, pages and metadata; a cut file is refused."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from ifvit.data.images import BrokenImage, decode, read_picture
from ifvit.data.pages import SEVERAL_PAGES
from ifvit.data.prepare import prepare
from ifvit.data.sources import Print
from ifvit.data.tags import NOT_SQUARE

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of what is malformed on purpose

Y, X = np.mgrid[:60, :80]
RINGS = (128 + 100 * np.sin(np.hypot(X - 30, Y - 25) * 0.7)).astype(np.uint8)
EXIF_JUNK = [
    b"",
    b"\0",
    b"Exif\0\0\x00\x08\x00\x02",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x05\0\x06\0\0\0\0\0\0",
    bytes(range(256)),
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x08\0\0\0\x08\0\0\0\0\0\0\0",
]


def saved(format: str, image=None, **how) -> bytes:
    out = io.BytesIO()
    (image or Image.fromarray(RINGS)).save(out, format, **how)
    return out.getvalue()


def read(path, raw: bytes):
    path.write_bytes(raw)
    return decode(path)


def png_with(kind: bytes, body: bytes, crc: int = 0) -> bytes:
    png = saved("PNG")
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ crc)
    return png[:33] + chunk + png[33:]  # behind IHDR


def jpeg_with(marker: int, body: bytes) -> bytes:
    jpeg = saved("JPEG", quality=95)
    return jpeg[:20] + struct.pack(">BBH", 255, marker, 2 + len(body)) + body + jpeg[20:]  # behind JFIF's


def tiff_with(tag: int, kind: int, count: int, value: int, **how) -> bytes:
    """A TIFF with one more entry in its directory, or one in another's place."""
    raw = saved("TIFF", **how)
    (at,) = struct.unpack_from("<I", raw, 4)
    (n,) = struct.unpack_from("<H", raw, at)
    entries = [raw[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(n)]
    entries = [e for e in entries if e[:2] != struct.pack("<H", tag)] + [struct.pack("<HHII", tag, kind, count, value)]
    directory = (
        struct.pack("<H", len(entries)) + b"".join(sorted(entries, key=lambda e: struct.unpack("<H", e[:2]))) + bytes(4)
    )
    return raw[:4] + struct.pack("<I", len(raw)) + raw[8:] + directory


@pytest.mark.parametrize(
    "name, how",
    [
        ("a.pgm", {}),
        ("a.pnm", {}),
        ("a.jp2", {}),
        ("a.j2k", {}),
        ("a.gif", {}),
        ("a.webp", {"lossless": True}),
        ("a.tga", {}),
        ("a.sgi", {}),
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
    ],
)
def test_every_lossless_format_comes_back_to_the_level_and_one_that_is_cut_is_told(tmp_path, name, how):
    Image.fromarray(RINGS).save(tmp_path / name, **how)
    raw = (tmp_path / name).read_bytes()
    np.testing.assert_array_equal(decode(tmp_path / name)[0], RINGS)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(BrokenImage, match=name):
            read(tmp_path / name, raw[: int(share * len(raw))])


def test_a_plain_pgm_with_comments_is_read(tmp_path):
    text = f"P2\n# a scanner's\n80 60\n# and its own\n255\n{' '.join(map(str, RINGS.ravel()))}\n"
    np.testing.assert_array_equal(read(tmp_path / "a.pgm", text.encode())[0], RINGS)


@pytest.mark.parametrize("body", EXIF_JUNK)
@pytest.mark.parametrize("kind", [b"eXIf", b"iCCP", b"pHYs", b"zTXt", b"iTXt", b"gAMA", b"acTL", b"fcTL"])
def test_a_pngs_broken_chunks_cost_no_pixel(tmp_path, kind, body):
    np.testing.assert_array_equal(read(tmp_path / "a.png", png_with(kind, body))[0], RINGS)
    np.testing.assert_array_equal(read(tmp_path / "a.png", png_with(kind, body, crc=1))[0], RINGS)


@pytest.mark.parametrize("body", EXIF_JUNK)
@pytest.mark.parametrize(
    "marker, begin",
    [
        (0xE1, b"Exif\0\0"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"MPF\0"),
        (0xED, b"Photoshop 3.0\0"),
        (0xFE, b""),
        (0xE0, b"JFIF\0"),
    ],
)
def test_a_jpegs_broken_segments_cost_no_pixel(tmp_path, marker, begin, body):
    plain = np.array(Image.open(io.BytesIO(saved("JPEG", quality=95))))
    np.testing.assert_array_equal(read(tmp_path / "a.jpg", jpeg_with(marker, begin + body))[0], plain)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("tag", [274, 282, 283, 296, 305, 306, 330, 700, 34377, 34665, 34675, 34853])
def test_a_tiffs_tags_of_odd_types_cost_no_pixel(tmp_path, tag, compression):
    for kind in (0, 1, 2, 3, 5, 7, 12, 16, 99):
        for count, value in ((1, 9), (1000, 8), (3, 2**31)):
            raw = tiff_with(tag, kind, count, value, compression=compression)
            np.testing.assert_array_equal(read(tmp_path / "a.tif", raw)[0], RINGS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "format, how", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_a_print_on_its_side_is_turned_upright(tmp_path, orientation, format, how):
    tags = Image.Exif()
    tags[274] = orientation
    image = Image.fromarray(RINGS)
    image.getexif()[274] = orientation
    upright = np.array(ImageOps.exif_transpose(image))
    how = how | ({"tiffinfo": {274: orientation}} if format == "TIFF" else {"exif": tags.tobytes()})
    np.testing.assert_array_equal(read(tmp_path / f"a.{format.lower()}", saved(format, **how))[0], upright)


@pytest.mark.parametrize("top", [1.0, 1.02, 255, 258, 1023, 4095, 65535, 66000])
@pytest.mark.parametrize("low", [0.0, -0.02])
def test_floating_point_levels_keep_all_ridges(tmp_path, top, low):
    levels = np.linspace(low * top, top, 60 * 80).reshape(60, 80).astype(np.float32)
    grey, _ = read(tmp_path / "a.tif", saved("TIFF", Image.fromarray(levels)))
    np.testing.assert_allclose(grey, np.linspace(0, 255, 60 * 80).reshape(60, 80), atol=6)


def test_faint_floating_point_levels_stay_faint_and_odd_ranges_are_stretched(tmp_path):
    ramp = np.linspace(0, 1, 60 * 80).reshape(60, 80).astype(np.float32)
    of = lambda levels: read(tmp_path / "a.tif", saved("TIFF", Image.fromarray(levels.astype(np.float32))))[0].astype(
        int
    )
    assert of(0.5 * ramp).max() == pytest.approx(128, abs=1)
    for scale, shift in ((6, -3), (3, 0), (5, -7)):  # mean 0, or anything
        np.testing.assert_allclose(of(scale * ramp + shift), 255 * ramp, atol=1.5)
    assert of(0.7 + 0 * ramp).std() == 0


def test_levels_that_are_no_numbers_are_white_and_infinite_ones_the_ends(tmp_path):
    levels = np.linspace(0, 1, 60 * 80).reshape(60, 80).astype(np.float32)
    levels[0, :3] = np.nan, np.inf, -np.inf
    grey, _ = read(tmp_path / "a.tif", saved("TIFF", Image.fromarray(levels)))
    assert list(grey[0, :3]) == [255, 255, 0]
    np.testing.assert_allclose(grey[1:], 255 * levels[1:], atol=0.51)
    assert (read(tmp_path / "a.tif", saved("TIFF", Image.fromarray(levels * np.nan)))[0] == 255).all()


@pytest.mark.parametrize(
    "mode, value, grey",
    [
        ("LA", (90, 255), 90),
        ("LA", (90, 0), 90),
        ("RGBA", (90, 90, 90, 0), 90),
        ("CMYK", (0, 0, 0, 165), 90),
        ("LAB", (90, 128, 128), 90),
    ],
)
def test_colour_models_become_their_lightness(tmp_path, mode, value, grey):
    """An alpha channel that is nothing but 0 is no transparency: all pixels would be lost."""
    got, _ = read(tmp_path / "a.tif", saved("TIFF", Image.new(mode, (40, 30), value)))
    assert got.shape == (30, 40) and set(np.unique(got)) == {grey}


@pytest.mark.parametrize(
    "image, dark",
    [
        (Image.fromarray(RINGS), RINGS),
        (Image.fromarray(RINGS.astype(np.uint16) * 257), RINGS),
        (Image.fromarray(RINGS > 128), np.where(RINGS > 128, 255, 0)),
    ],
)
def test_where_white_is_zero_it_is_white(tmp_path, image, dark):
    raw = saved("TIFF", image)
    (at,) = struct.unpack_from("<I", raw, 4)
    entries = range(at + 2, at + 2 + 12 * struct.unpack_from("<H", raw, at)[0], 12)
    place = next(e for e in entries if raw[e : e + 2] == struct.pack("<H", 262))
    raw = raw[: place + 8] + struct.pack("<H", 0) + raw[place + 10 :]
    np.testing.assert_array_equal(read(tmp_path / "a.tif", raw)[0], 255 - dark)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_of_several_pages_the_largest_is_the_print(tmp_path, at):
    pages = [Image.fromarray(RINGS).resize((40, 30)), Image.fromarray(RINGS).resize((20, 15))]
    pages.insert(at, Image.fromarray(RINGS))
    (tmp_path / "a.tif").write_bytes(saved("TIFF", pages[0], save_all=True, append_images=pages[1:]))
    picture = read_picture(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture.grey, RINGS)
    assert picture.note == ""  # the others are of the same picture


def test_the_print_may_lie_below_its_thumbnail(tmp_path):
    """As a SubIFD, entry 330 of the first page's directory."""
    full, small = saved("TIFF"), saved("TIFF", Image.fromarray(RINGS).resize((20, 15)))
    (at,) = struct.unpack_from("<I", full, 4)
    n = struct.unpack_from("<H", full, at)[0]
    raw = bytearray(full)
    sub = len(raw)  # the full picture's directory, again at the end; the thumbnail's goes into the first one's place
    raw += full[at : at + 6 + 12 * n]
    moved = len(raw)
    raw += small
    (there,) = struct.unpack_from("<I", small, 4)
    entries = [
        bytearray(small[there + 2 + 12 * i : there + 14 + 12 * i])
        for i in range(struct.unpack_from("<H", small, there)[0])
    ]
    for e in entries:
        if struct.unpack_from("<H", e)[0] == 273:
            struct.pack_into("<I", e, 8, struct.unpack_from("<I", e, 8)[0] + moved)
    entries.append(bytearray(struct.pack("<HHII", 330, 4, 1, sub)))
    entries.sort(key=lambda e: struct.unpack_from("<H", e))
    raw[4:8] = struct.pack("<I", len(raw))
    raw += struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    np.testing.assert_array_equal(read(tmp_path / "a.tif", bytes(raw))[0], RINGS)


@pytest.mark.parametrize("format", ["TIFF", "GIF"])
def test_files_with_several_pictures_are_named(tmp_path, format, caplog):
    other = Image.fromarray(255 - RINGS)
    files = [tmp_path / f"{i}.{format.lower()}" for i in (1, 2)]
    for file in files:
        file.write_bytes(saved(format, save_all=True, append_images=[other]))
        np.testing.assert_array_equal(decode(file)[0], RINGS)
    with_ridges = Image.fromarray((128 + 100 * np.sin(np.mgrid[:200, :200][0] * 0.7)).astype(np.uint8))
    with_ridges.save(tmp_path / "3.png")
    prints = [Print(str(f), "db", f.stem, "1", 500) for f in (*files, tmp_path / "3.png")]
    prepare(prints, 256, 0.1, tmp_path / "cache")
    assert f"2 files {SEVERAL_PAGES}, such as {files[0]}" in caplog.text


def test_a_thumbnail_whose_print_is_cut_off_is_told(tmp_path):
    raw = saved("TIFF", Image.fromarray(RINGS).resize((20, 15)), save_all=True, append_images=[Image.fromarray(RINGS)])
    with pytest.raises(BrokenImage):
        read(tmp_path / "a.tif", raw[:-500])
    (tmp_path / "a.tif").write_bytes(raw[:-5000])  # its directory too
    with contextlib.suppress(BrokenImage):
        assert read_picture(tmp_path / "a.tif").note == SEVERAL_PAGES


@pytest.mark.parametrize(
    "raw, ppi",
    [
        (saved("TIFF", dpi=(1000, 1000)), 1000),
        (saved("PNG", dpi=(1000, 1000)), 1000),
        (saved("BMP", dpi=(1000, 1000)), 1000),
        (saved("JPEG", dpi=(1000, 1000)), 1000),
        (saved("TIFF", tiffinfo={282: 393.7, 283: 393.7, 296: 3}), 1000),  # a centimetre
        (saved("TIFF", tiffinfo={282: 1000.0, 283: 1000.0, 296: 1}), None),  # of no unit
        (png_with(b"pHYs", struct.pack(">IIB", 39370, 39370, 1)), 1000),
        (png_with(b"pHYs", struct.pack(">IIB", 39370, 39370, 0)), None),
        (jpeg_with(0xFE, b"NIST_COM 9\nPIX_WIDTH 80\nPPI 1000\nLOSSY 1\n"), 1000),
        (jpeg_with(0xFE, b"at 1000 PPI"), None),
        (saved("PNG", pnginfo=PngImagePlugin.PngInfo()), None),
    ],
)
def test_a_resolution_is_read_in_any_unit(tmp_path, raw, ppi):
    told = read(tmp_path / "a.img", raw)[1]
    assert told == (pytest.approx(ppi, rel=1e-3) if ppi else None)


def test_pixels_that_are_not_square_are_told(tmp_path):
    (tmp_path / "a.png").write_bytes(saved("PNG", dpi=(500, 1000)))
    picture = read_picture(tmp_path / "a.png")
    assert (picture.ppi, picture.note) == (None, NOT_SQUARE)


@pytest.mark.parametrize("before", [b"", b"calibration " * 700])
@pytest.mark.parametrize("place", ["first", "behind tables"])
def test_a_wsqs_resolution_is_read_wherever_its_comment_stands(tmp_path, before, place):
    pytest.importorskip("wsq")
    Image.fromarray(np.tile(RINGS, (3, 3))).save(tmp_path / "a.wsq")
    raw = (tmp_path / "a.wsq").read_bytes()
    comment = lambda text: b"\xff\xa8" + struct.pack(">H", 2 + len(text)) + text
    assert raw[2:4] == b"\xff\xa8"  # what the encoder itself tells, 500
    raw = raw[:2] + raw[4 + int.from_bytes(raw[4:6], "big") :]
    at = 2
    if place == "behind tables":
        while raw[at : at + 2] != b"\xff\xa2":  # the frame's header
            at += 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    told = (comment(before) if before else b"") + comment(b"NIST_COM 9\nPIX_WIDTH 240\nPPI 1000\nLOSSY 1\n")
    grey, ppi = read(tmp_path / "a.wsq", raw[:at] + told + raw[at:])
    assert ppi == 1000 and grey.shape == (180, 240)


def test_a_file_of_another_program_is_not_handed_to_it(tmp_path):
    with pytest.raises(BrokenImage, match="not an image"):
        read(tmp_path / "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n")
