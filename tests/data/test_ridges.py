"""The distance of ridges is measured in pixels. A resolution that does not fit it gets a warning, or a better one."""

import importlib
import logging

import numpy as np
import pytest
from PIL import Image

from ifvit import cli
from ifvit.config import DenseConfig, MatchConfig, config_of, parse_value
from ifvit.data import single
from ifvit.data.prepare import prepare
from ifvit.data.ridges import fine_detail, ridge_period
from ifvit.data.sources import read_root
from ifvit.errors import UserError


def drawn(period: float, finger: int = 0, shape=(300, 260), angle: float | None = None) -> np.ndarray:
    """Ridges `period` px apart on an oval, with edges and noise: rings around a core, or parallel lines at an angle."""
    rng = np.random.default_rng(finger)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    cy, cx = np.array(shape) * rng.uniform(0.4, 0.6, 2)
    across = np.hypot(y - cy, x - cx) if angle is None else x * np.cos(angle) + y * np.sin(angle)
    inside = np.hypot((y - shape[0] / 2) / shape[0], (x - shape[1] / 2) / shape[1]) < 0.45
    grey = np.where(inside, 128 + 90 * np.tanh(2 * np.sin(2 * np.pi * across / period)), 235) + rng.normal(0, 12, shape)
    return grey.clip(0, 255).astype(np.uint8)


def resized(grey: np.ndarray, by: float) -> np.ndarray:
    return np.array(Image.fromarray(grey).resize([round(n * by) for n in grey.shape[::-1]], Image.Resampling.BICUBIC))


def a_set(folder, period: float, impressions=(1, 2), **how):
    folder.mkdir(exist_ok=True)
    for finger in range(1, 7):
        for i in impressions:
            Image.fromarray(drawn(period, 10 * finger + i)).save(folder / f"{finger}_{i}.png", **how)
    return folder


def prepared(folder, tmp_path, caplog, ppi=None):
    """The prints of a folder on canvases, and the warnings about their scale."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "ifvit"):
        found = prepare(read_root(folder, ppi), 512, 0.1, tmp_path / "cache")
    return found, [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def on_canvas(found) -> list[float]:
    return [ridge_period(found.canvas(i)[0]) for i in range(len(found))]


@pytest.mark.parametrize("angle", [None, 0.0, 0.4, np.pi / 4, np.pi / 2, 2.5])
@pytest.mark.parametrize("period", [3.2, 4.5, 7, 9, 12.3, 18])
def test_the_period_is_that_of_the_drawing(period, angle):
    assert ridge_period(drawn(period, angle=angle)) == pytest.approx(period, rel=0.03)


@pytest.mark.parametrize("shape", [(103, 96), (200, 152), (64, 400), (1600, 1500)])
def test_the_period_is_found_in_small_and_large_images(shape):
    period = 3.2 if shape[0] == 103 else 18 if shape[0] == 1600 else 8
    assert ridge_period(drawn(period, shape=shape)) == pytest.approx(period, rel=0.04)


def test_shade_and_a_frame_do_not_change_the_period():
    grey = drawn(9).astype(float)
    grey += np.linspace(-120, 120, grey.shape[1])
    grey[[0, 1, -1]] = 0
    assert ridge_period(grey.clip(0, 255).astype(np.uint8)) == pytest.approx(9, rel=0.03)


@pytest.mark.parametrize(
    "grey",
    [
        np.full((300, 300), 255, np.uint8),
        np.zeros((5, 400), np.uint8),
        np.zeros((1, 1), np.uint8),
        np.random.default_rng(0).normal(128, 20, (300, 300)).astype(np.uint8),
    ],
)
def test_where_there_are_no_ridges_there_is_no_period(grey):
    assert ridge_period(grey) is None


def test_generated_prints_have_the_period_that_they_were_made_with(generated):
    """9 px at 500 ppi is the middle of what the generator draws fingers with."""
    periods = [ridge_period(np.array(Image.open(file))) for file in generated.values()]
    assert np.median(periods) == pytest.approx(9, rel=0.12)


def test_an_enlarged_picture_has_no_fine_detail():
    assert fine_detail(drawn(7)) > 0.02 > fine_detail(resized(drawn(7), 1.67))


def test_prints_at_their_resolution_are_not_remarked_on(tmp_path, caplog):
    assert prepared(a_set(tmp_path / "a", 9.0), tmp_path, caplog)[1] == []
    assert prepared(a_set(tmp_path / "b", 18.0), tmp_path, caplog, ppi=1000)[1] == []
    assert prepared(a_set(tmp_path / "wide", 12.0), tmp_path, caplog)[1] == []  # some sensors' are


@pytest.mark.parametrize("by", [0.5, 1.67])
@pytest.mark.parametrize("period", [7.0, 9.0])
def test_halved_and_enlarged_prints_are_named_with_the_resolution_that_fits(tmp_path, caplog, period, by):
    folder = tmp_path / "taken"
    folder.mkdir()
    for finger in range(1, 7):
        Image.fromarray(resized(drawn(period, finger), by)).save(folder / f"{finger}_1.png")
    (told,) = prepared(folder, tmp_path, caplog)[1]
    fit = round(500 * by * period / 9 / 5) * 5
    assert "ridges of taken" in told and "6 of 6 prints" in told and "--ppi auto" in told
    assert float(told.split(" ppi would fit")[0].split()[-1]) == pytest.approx(fit, rel=0.03)


def test_pictures_that_show_no_ridges_are_told(tmp_path, caplog):
    folder = a_set(tmp_path / "coarse", 9.0, impressions=(1,), dpi=(480, 480))
    for finger in range(1, 7):
        coarse = np.random.default_rng(finger).normal(128, 40, (300, 260)).clip(0, 255).astype(np.uint8)
        Image.fromarray(coarse).save(folder / f"{finger}_2.png")
    told = prepared(folder, tmp_path, caplog)[1]
    assert any("cannot be measured on coarse, 6 prints read at 500 ppi" in t for t in told)


def test_two_resolutions_of_prints_of_one_size_are_told(tmp_path, caplog):
    a_set(tmp_path / "mixed", 9.0, impressions=(1,))
    a_set(tmp_path / "mixed", 9.0, impressions=(2,), dpi=(300, 300))
    _, told = prepared(tmp_path / "mixed", tmp_path, caplog)
    (mixed,) = [t for t in told if "one size" in t]
    assert "mixed" in mixed and "6 at 500 ppi (assumed)" in mixed and "6 at 300 ppi (file's tag)" in mixed


def test_two_resolutions_that_the_ridges_confirm_are_right(tmp_path, caplog):
    a_set(tmp_path / "mixed", 9.0, impressions=(1,))
    a_set(tmp_path / "mixed", 18.0, impressions=(2,), dpi=(1000, 1000))
    assert prepared(tmp_path / "mixed", tmp_path, caplog)[1] == []


def test_auto_brings_all_to_one_scale(tmp_path, caplog):
    a_set(tmp_path / "mixed", 9.0, impressions=(1,))
    a_set(tmp_path / "mixed", 9.0, impressions=(2,), dpi=(300, 300))
    found, told = prepared(tmp_path / "mixed", tmp_path, caplog, ppi="auto")
    assert told == [] and "6 prints are read at the resolution that their ridges tell" in caplog.text
    np.testing.assert_allclose(on_canvas(found), 9, rtol=0.04)
    found, _ = prepared(tmp_path / "mixed", tmp_path, caplog)  # not that of the cache
    assert max(on_canvas(found)) > 14


def test_auto_leaves_what_is_right(tmp_path, caplog):
    folder = a_set(tmp_path / "fine", 8.0)
    plain, _ = prepared(folder, tmp_path, caplog)
    auto, _ = prepared(folder, tmp_path, caplog, ppi="auto")
    for i in range(len(plain)):
        np.testing.assert_array_equal(plain.canvas(i)[0], auto.canvas(i)[0])


def test_a_single_print_is_scaled_by_its_ridges_too(tmp_path):
    Image.fromarray(drawn(9.0)).save(tmp_path / "a.png", dpi=(300, 300))
    Image.fromarray(drawn(9.0, 1)).save(tmp_path / "b.png")
    periods = [ridge_period(single.on_canvas(tmp_path / name, "auto", 512).canvas) for name in ("a.png", "b.png")]
    np.testing.assert_allclose(periods, 9, rtol=0.04)


@pytest.mark.parametrize("command", ["train_dense", "train_match", "train_all", "evaluate", "verify"])
def test_every_command_that_reads_prints_takes_auto(command):
    words = {"evaluate": ["--checkpoint", "c", "--dataset_root", "d"], "verify": ["a", "b"]}.get(command, [])
    args = importlib.import_module(f"ifvit.{command}").Args
    for ppi, value in (("auto", "auto"), ("569", 569.0)):
        assert cli.parse(args, command, [*words, "--ppi", ppi]).ppi == value
    with pytest.raises(UserError):
        cli.parse(args, command, [*words, "--ppi", "fast"])


def test_auto_is_a_resolution_in_flags_files_and_saved_configurations():
    assert parse_value(DenseConfig, "ppi", "auto") == "auto" and parse_value(DenseConfig, "ppi", "569") == 569.0
    assert DenseConfig(ppi="auto").ppi == "auto" and DenseConfig(ppi=500).ppi == 500.0
    for saved in (0.0, 569.0, "auto"):
        assert config_of(MatchConfig, MatchConfig().to_dict() | {"ppi": saved}).ppi == saved
    for wrong in ("automatic", True, -1.0, float("nan")):
        with pytest.raises(UserError, match="^ppi is"):
            DenseConfig(ppi=wrong)
    with pytest.raises(UserError, match="'fast'"):
        parse_value(DenseConfig, "ppi", "fast")
