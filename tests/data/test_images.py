"""Files decode to grey levels, and the canvas keeps scale, aspect and foreground."""

import os
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from ifvit.data.images import (
    BrokenImage,
    believable_ppi,
    decode,
    foreground,
    print_ppi,
    to_canvas,
)
from ifvit.errors import UserError

RAMP = np.arange(24 * 40, dtype=np.uint32).reshape(24, 40) * 255 // 959


def ridges(shape, period_y=0.0, period_x=0.0):
    """Sinusoidal ridges of the given period, dark on light, in grey levels."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    phase = (y / period_y if period_y else 0) + (x / period_x if period_x else 0)
    return (128 + 100 * np.cos(2 * np.pi * phase)).astype(np.uint8)


def round_print(shape, centre, radius, period=9.0, background=230):
    y, x = np.mgrid[: shape[0], : shape[1]]
    inside = np.hypot(y - centre[0], x - centre[1]) < radius
    return np.where(inside, ridges(shape, period_x=period), background).astype(np.uint8), inside


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.tiff", "a.bmp"])
def test_grey_files_come_back_to_the_level(tmp_path, name):
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / name)
    grey, ppi = decode(tmp_path / name)
    assert grey.dtype == np.uint8 and ppi is None
    np.testing.assert_array_equal(grey, RAMP)


def test_jpeg_comes_back_nearly(tmp_path):
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(decode(tmp_path / "a.jpg")[0].astype(int), RAMP, atol=8)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.bmp"])
def test_a_palette_is_looked_up(tmp_path, name):
    image = Image.fromarray(RAMP.astype(np.uint8), "P")
    image.putpalette([255 - i for i in range(256) for _ in range(3)])
    image.save(tmp_path / name)
    np.testing.assert_array_equal(decode(tmp_path / name)[0], 255 - RAMP)


@pytest.mark.parametrize("name", ["a.bmp", "a.png", "a.tif"])
def test_transparency_lies_on_white(tmp_path, name):
    pixels = np.repeat(RAMP[..., None], 4, 2).astype(np.uint8)
    pixels[..., 3] = 255
    pixels[:, :10] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / name)
    if name == "a.bmp":  # Pillow writes no alpha mask that it would read: 32 bits, BITFIELDS
        rows = pixels[::-1, :, [2, 1, 0, 3]].tobytes()
        head = struct.pack("<IiiHHIIiiII", 108, 40, 24, 1, 32, 3, len(rows), 0, 0, 0, 0)
        masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
        start = struct.pack("<2sIHHI", b"BM", 122 + len(rows), 0, 0, 122)
        (tmp_path / name).write_bytes(start + head + masks + rows)
    grey, _ = decode(tmp_path / name)
    assert (grey[:, :10] == 255).all()
    np.testing.assert_array_equal(grey[:, 10:], RAMP[:, 10:])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("bits, unit", [(16, 257), (14, 16383 / 255), (12, 4095 / 255), (10, 1023 / 255), (8, 1)])
def test_sixteen_bits_become_eight(tmp_path, name, bits, unit):
    Image.fromarray(np.rint(RAMP * unit).astype(np.uint16)).save(tmp_path / name)
    np.testing.assert_array_equal(decode(tmp_path / name)[0], RAMP)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp"])
def test_one_bit_is_black_and_white(tmp_path, name):
    Image.fromarray(RAMP > 99).save(tmp_path / name)
    np.testing.assert_array_equal(decode(tmp_path / name)[0], np.where(RAMP > 99, 255, 0))


def test_wsq_is_read_or_names_its_package(tmp_path, monkeypatch):
    path = tmp_path / "a.wsq"
    pytest.importorskip("wsq")
    Image.fromarray(ridges((200, 256), 10, 10)).save(path)
    grey, _ = decode(path)
    assert np.abs(grey.astype(int) - ridges((200, 256), 10, 10)).mean() < 4
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BrokenImage):
        decode(path)
    monkeypatch.setitem(sys.modules, "wsq", None)
    with pytest.raises(UserError, match=r"pip install 'ifvit\[wsq\]'"):
        decode(path)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.jpg", "a.wsq"])
def test_broken_files_say_so(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(BrokenImage, match=f"{name}: the file is empty"):
        decode(path)
    path.write_bytes(b"not an image at all")
    with pytest.raises(BrokenImage, match="not an image"):
        decode(path)
    if name != "a.wsq":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-1500])
        with pytest.raises(BrokenImage, match=name):
            decode(path)


def test_a_missing_file_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="nowhere.png cannot be read"):
        decode(tmp_path / "nowhere.png")


@pytest.mark.parametrize("side", [5000, 60000])
def test_a_huge_image_is_refused_by_its_header(tmp_path, side):
    size = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", size) + png_chunk(b"IDAT", b"")
    (tmp_path / "big.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(UserError, match=f"big.png is too large: {side} x {side} pixels"):
        decode(tmp_path / "big.png")


def test_the_limit_can_be_raised_beyond_pillows_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png")[0].shape == (24, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize(
    "dpi, ppi",
    [
        ((500, 500), 500),
        ((1000, 1000), 1000),
        ((500, 505), 502.5),
        ((500, 600), None),
        ((1, 1), None),
        ((72, 72), None),
        ((96, 96), None),
        ((120, 120), None),
        ((9999, 9999), None),
    ],
)
def test_only_a_sensors_ppi_is_believed(tmp_path, dpi, ppi):
    assert believable_ppi(*dpi) == ppi
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.tif", dpi=dpi)
    assert decode(tmp_path / "a.tif")[1] == (pytest.approx(ppi, abs=0.1) if ppi else None)


def test_the_sets_ppi_comes_before_the_tag_before_500():
    assert (print_ppi(569, 1000), print_ppi(None, 1000), print_ppi(None, None)) == (569, 1000, 500)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "ppi, period, on_canvas", [(250, 9, 18), (500, 9, 9), (1000, 18, 9), (569, 10.242, 9), (175, 3.15, 9)]
)
def test_a_period_is_scaled_to_500_ppi_in_both_directions(axis, ppi, period, on_canvas):
    shape = (int(0.5 * ppi), int(0.8 * ppi))  # 250 x 400 pixels at 500 ppi: not square
    canvas, _ = to_canvas(ridges(shape, **{("period_y", "period_x")[axis]: period}), ppi)
    window = canvas[156:356, 156:356].mean(1 - axis)
    spectrum = np.abs(np.fft.rfft((window - window.mean()) * np.hanning(200), 20000))
    assert 20000 / spectrum.argmax() == pytest.approx(on_canvas, rel=0.01)


def test_the_foreground_is_the_print_without_holes_or_specks():
    grey, inside = round_print((512, 512), (250, 230), 150)
    grey[240:260, 220:240] = 20  # wet, no ridges there
    grey[20:28, 480:488] = 0  # a speck
    mask = foreground(grey, 500)
    assert (mask & inside).sum() / (mask | inside).sum() > 0.93
    assert mask[250, 230] and not mask[24, 484]


@pytest.mark.parametrize(
    "grey",
    [
        np.full((300, 300), 255, np.uint8),
        np.random.default_rng(0).normal(128, 2, (300, 300)).astype(np.uint8),
        np.zeros((1, 1), np.uint8),
        np.zeros((3, 700), np.uint8),
    ],
)
def test_a_blank_image_has_no_foreground_and_still_a_canvas(grey):
    assert not foreground(grey, 500).any()
    canvas, mask = to_canvas(grey, 500)
    assert canvas.shape == (512, 512) and mask.shape == (64, 64) and not mask.any()


def test_the_foregrounds_centroid_comes_to_the_middle_on_the_prints_background():
    grey, inside = round_print((300, 400), (110, 120), 90)
    canvas, mask = to_canvas(grey, 500)
    assert (canvas[:40] == 230).all() and (canvas[:, -40:] == 230).all()
    rows, columns = np.nonzero(mask)
    assert abs(rows.mean() - 31.5) < 0.7 and abs(columns.mean() - 31.5) < 0.7
    assert mask.sum() == pytest.approx(inside.sum() / 64, rel=0.1)


def test_what_does_not_fit_is_cut_around_the_middle():
    grey, _ = round_print((900, 700), (450, 350), 340)
    canvas, mask = to_canvas(grey, 500, canvas=256)
    assert canvas.shape == (256, 256) and mask.shape == (32, 32) and mask.all()


@pytest.mark.parametrize("level", [0, 105, 160])
def test_a_frame_is_not_foreground(level):
    grey, inside = round_print((103, 96), (50, 48), 30, period=3.2, background=255)
    grey[[0, 1, -1, -2]] = level
    grey[:, [0, 1, -1, -2]] = level
    canvas, mask = to_canvas(grey, 175)
    assert mask.sum() == pytest.approx(inside.sum() * (500 / 175) ** 2 / 64, rel=0.15)
    assert (canvas[0] == 255).all()


def test_segmenting_a_512_square_takes_less_than_15_ms():
    grey, _ = round_print((512, 512), (256, 256), 200)

    def once():
        start = time.process_time()
        foreground(grey, 500)
        return time.process_time() - start

    assert min(once() for _ in range(5)) < 0.015


@pytest.mark.skipif("IFVIT_TEST_DATA" not in os.environ, reason="needs IFVIT_TEST_DATA")
def test_every_sensor_at_hand_gives_a_plausible_foreground():
    from ifvit.data.sources import read_root

    for p in read_root(os.environ["IFVIT_TEST_DATA"])[::40]:
        grey, tag = decode(p.path)
        _, mask = to_canvas(grey, print_ppi(p.ppi, tag))
        assert 0.05 < mask.mean() < 0.9, p.path
