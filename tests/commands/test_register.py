"""`register` lays one print on another: in the pixels of their files, and not at all where the ridges do not agree."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from ifvit.config import PRESETS, DenseConfig, MatchConfig
from ifvit.data.placement import Placement
from ifvit.errors import UserError
from ifvit.models.matching import Matches
from ifvit.pixels.agreement import checked_config
from ifvit.pixels.registration import CheckedRegistration
from ifvit.scoring.fit import fit
from ifvit.scoring.fit_pictures import overlay, with_grid
from ifvit.scoring.scorer import Scorer

CONFIG = DenseConfig(**PRESETS["smoke"][0])  # canvas 256 at 500 ppi, window 64 at 200: w is at 127.5 + 2.5 (w − 31.5)
WINDOWS = checked_config(CONFIG).image_size // 8 - 1
FILES = {"warped.png", "grid.png", "overlay.png", "matches.csv", "transform.json"}


def found(similarity=(1.0, 0.0, 0.0, 0.0), registered=True, bend=(0.0, 0.0), points=((31.5, 31.5), (41.5, 31.5))):
    """What Module 1 might say of a pair: matches at `points` of print 0, the last of them no inlier."""
    p0 = np.float32([*points, (0, 0)])
    a, b, u, v = similarity
    p1 = np.stack([a * p0[:, 0] - b * p0[:, 1] + u, b * p0[:, 0] + a * p0[:, 1] + v], -1)
    inliers, n = np.array([True] * len(points) + [False]), len(p0)
    matches = Matches(np.arange(n), np.arange(n), np.linspace(0.9, 0.5, n, dtype=np.float32), inliers)
    field = np.broadcast_to(np.float32(bend), (WINDOWS, WINDOWS, 2))
    score = 0.8 if registered else 0.05
    return CheckedRegistration(
        similarity=np.float32(similarity),
        registered=np.bool_(registered),
        confidence=np.float32(score),
        agreement=np.float32(score),
        correlation=np.float32(0.9),
        windows=np.int32(100),
        overlap=np.float32(0.7),
        deformation=field,
        count=np.int32(len(points)),
        matches=matches,
        inliers=inliers,
        points0=p0,
        points1=p1,
    )


# --- to the pixels of the files -------------------------------------------------------------------


def test_matches_are_told_in_pixels_of_the_pictures():
    """Window 31.5 is canvas 127.5. Of a: (127.5 − 10 + ½) / 2 − ½ + 3 = 61.5 and (127.5 + 4 + ½) / 2 − ½ = 65.5."""
    a, b = Placement(cut=(3, 0), scale=2.0, shift=(10, -4)), Placement(cut=(0, 1), scale=1.0, shift=(-5, 7))
    told = fit(found(), a, b, CONFIG)
    np.testing.assert_allclose(told.xy_a, [(61.5, 65.5), (74.0, 65.5)])  # 10 px of the window are 25 of the canvas
    np.testing.assert_allclose(told.xy_b, [(132.5, 121.5), (157.5, 121.5)])
    np.testing.assert_allclose(told.match_confidence, [0.9, 0.7], atol=1e-6)
    assert told.parameters["scale"] == pytest.approx(2.0) and told.ppi_a == 250
    x, y = 61.5, 65.5
    p = told.parameters
    assert p["a"] * x - p["b"] * y + p["u"] == pytest.approx(132.5)
    assert p["b"] * x + p["a"] * y + p["v"] == pytest.approx(121.5)


def test_a_point_is_led_back_through_deformation_similarity_and_both_placements():
    """A quarter turn about the window's middle; the deformation moves by (3.5, 0) px at 350 ppi, 5 px of the canvas."""
    turned = (0.0, 1.0, 63.0, 0.0)  # (x, y) -> (63 − y, x)
    told = fit(found(turned, bend=(3.5, 0.0)), Placement(), Placement(shift=(20, 0)), CONFIG)
    # b's (107.5, 127.5) is the canvas's middle; 5 px to its right lies what a has 5 px above it
    np.testing.assert_allclose(told.back(np.array([[107.5, 127.5]])), [[127.5, 122.5]], atol=1e-4)


def test_a_print_is_warped_into_the_frame_of_the_other_and_white_beyond_itself():
    told = fit(found(), Placement(), Placement(shift=(-3, 2)), CONFIG)
    a = np.random.default_rng(0).integers(0, 200, (40, 50)).astype(np.uint8)
    warped, there, xy = told.warped(a, (45, 60))  # b's (x, y) is the canvas's (x − 3, y + 2), as a's is
    np.testing.assert_array_equal(warped[:38, 3:53], a[2:])
    assert (warped[~there] == 255).all() and there.sum() == 38 * 50
    np.testing.assert_allclose(xy[10, 10], (7, 12), atol=1e-4)


def test_the_overlay_is_black_where_both_have_a_ridge_and_the_grid_has_lines_of_its_step():
    dark, light = np.zeros((9, 9), np.uint8), np.full((9, 9), 255, np.uint8)
    there = np.ones((9, 9), bool)
    assert (overlay(dark, there, dark) == 0).all() and (overlay(light, there, light) == 255).all()
    assert overlay(dark, there, light)[0, 0].tolist() == [255, 0, 255]  # a's alone: magenta
    assert overlay(light, there, dark)[0, 0].tolist() == [0, 255, 0]  # b's alone: green
    assert overlay(dark, ~there, light)[0, 0].tolist() == [255, 255, 255]
    xy = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), -1)
    red = (with_grid(light, xy, there, 4.0) == (200, 30, 30)).all(-1)
    np.testing.assert_array_equal(np.flatnonzero(red[0]), [3, 7])
    np.testing.assert_array_equal(np.flatnonzero(red[:, 0]), [3, 7])


# --- the command ----------------------------------------------------------------------------------


def drawn(path, period=9.0, at=(0, 0), size=(200, 200), radius=90, blank=False, **how):
    """A picture of rings on a disc of 180 px whose upper left corner is `at`."""
    y, x = np.mgrid[: size[1], : size[0]] - np.array(at[::-1])[:, None, None]
    r = np.hypot(x - 100 * radius / 90, y - 100 * radius / 90)
    rings = 128 + 100 * np.cos(2 * np.pi * np.hypot(x - 80, y - 60) / period)
    grey = np.where((r < radius) & (not blank), rings, 250).astype(np.uint8)
    Image.fromarray(grey).save(path, **how)
    return path


@pytest.fixture
def answer(monkeypatch):
    """What the checkpoint says of every pair: answer(found(…)); no checkpoint is read."""

    class Answering:
        config, registers = CONFIG, None
        told = found()

        def laid(self, a, b):
            return a, self.told

    scorer = Answering()
    monkeypatch.setattr("ifvit.scoring.scorer.Scorer.from_checkpoint", lambda path: scorer)
    return lambda told: setattr(scorer, "told", told)


def register(command, cwd, *words):
    return command("register", *words, "--checkpoint", "CKPT", "--out", "OUT", cwd=cwd)


def test_a_pair_that_registers_leaves_these_files_in_pixels_of_the_files(command, answer, tmp_path):
    """b is a with 10 px more on its left and 6 above: on their canvases both lie in one place."""
    a = drawn(tmp_path / "a.png")
    b = drawn(tmp_path / "b.png", at=(10, 6), size=(210, 206))
    said = register(command, tmp_path, a, b)
    assert said.code == 0 and said.out.startswith("registered: agreement of the ridges 0.800, overlap 70%"), said
    assert {f.name for f in (tmp_path / "OUT").iterdir()} == FILES
    told = json.loads((tmp_path / "OUT/transform.json").read_text())
    assert told["registered"] is True and told["agreement"] == pytest.approx(0.8)
    assert told["overlap"] == pytest.approx(0.7) and 0 <= told["confidence"] <= 1
    expected = {"a": 1, "b": 0, "u": 10, "v": 6, "scale": 1, "degrees": 0}
    assert told["similarity"] == pytest.approx(expected, abs=1e-6)
    with (tmp_path / "OUT/matches.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["x1", "y1", "x2", "y2", "confidence"] and len(rows) == 2
    for row in rows:
        assert float(row["x2"]) - float(row["x1"]) == 10 and float(row["y2"]) - float(row["y1"]) == 6
    warped, there = np.asarray(Image.open(tmp_path / "OUT/warped.png")), np.asarray(Image.open(b))
    np.testing.assert_array_equal(warped[6:, 10:], there[6:, 10:])
    for name in ("grid.png", "overlay.png"):
        assert Image.open(tmp_path / "OUT" / name).size == (210, 206)


def test_prints_of_two_resolutions_are_laid_on_each_other_at_their_scale(command, answer, tmp_path):
    a = drawn(tmp_path / "a.png", period=18.0, radius=180, size=(400, 400), dpi=(1000, 1000))
    b = drawn(tmp_path / "b.png", dpi=(500, 500))
    assert register(command, tmp_path, a, b).code == 0
    assert json.loads((tmp_path / "OUT/transform.json").read_text())["similarity"]["scale"] == pytest.approx(0.5)


def test_prints_that_do_not_register_end_with_code_3_and_leave_no_fit(command, answer, tmp_path):
    a, b = drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png", period=8.0)
    assert register(command, tmp_path, a, b).code == 0
    answer(found(registered=False))
    said = register(command, tmp_path, a, b)
    assert said.code == 3 and said.out.startswith("not registered") and not said.err, said
    assert [f.name for f in (tmp_path / "OUT").iterdir()] == ["transform.json"]  # those of the fit before are gone
    told = json.loads((tmp_path / "OUT/transform.json").read_text())
    assert told["registered"] is False and told["similarity"] is None


def test_a_list_of_pairs_has_a_folder_and_a_line_for_each(command, answer, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        drawn(tmp_path / f"in/{name}.png")
    (tmp_path / "in/list.csv").write_text("b,a,note\nb.png,a.png,x\n\nc.png,a.png,y\n")  # beside the list
    said = register(command, tmp_path, "--pairs", "in/list.csv")
    assert said.code == 0 and "2 of 2 pairs registered" in said.out, said
    with (tmp_path / "OUT/registrations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["n"], r["a"][-5:], r["b"][-5:], r["registered"]) for r in rows] == [
        ("1", "a.png", "b.png", "1"),
        ("2", "a.png", "c.png", "1"),
    ]
    assert {f.name for f in (tmp_path / "OUT/2").iterdir()} == FILES


@pytest.mark.parametrize(
    "rows, told",
    [
        ("a,b\na.png,a.png\na.png,gone.png\n", "list.csv, line 3: gone.png is not there"),
        ("a,b\na.png,a.png\na.png,blank.png\n", "line 3: blank.png shows no ridges"),
        ("a,b\na.png\n", "line 2: there is no pair"),
        ("x,y\na.png,a.png\n", "does not name a,b"),
        ("a,b\n", "holds no pair"),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused_with_its_line(command, answer, tmp_path, rows, told):
    drawn(tmp_path / "a.png")
    drawn(tmp_path / "blank.png", blank=True)
    (tmp_path / "list.csv").write_text(rows)
    said = register(command, tmp_path, "--pairs", "list.csv")
    assert said.code == 2 and told in said.err and said.err.count("\n") == 1, said
    assert not (tmp_path / "OUT/registrations.csv").exists()


def test_a_print_whose_ridges_are_twice_as_wide_is_no_fit_but_a_wrong_resolution(command, answer, tmp_path):
    a = drawn(tmp_path / "a.png")
    b = drawn(tmp_path / "b.png", period=18.0, radius=180, size=(400, 400))
    said = register(command, tmp_path, a, b)
    assert said.code == 2 and "px apart at 500 ppi and those of" in said.err, said
    assert "--ppi auto" in said.err and not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (("a.png",), "Give two prints"),
        (("a.png", "a.png", "--pairs", "list.csv"), "Give two prints"),
        (("a.png", "gone.png"), "gone.png is not there"),
        (("a.png", "blank.png"), "blank.png shows no ridges"),
        (("a.png", "a.png", "--ppi", "-1"), "--ppi is -1"),
        (("--pairs", "gone.csv"), "gone.csv cannot be read"),
    ],
)
def test_mistakes_are_a_sentence_each(command, answer, tmp_path, words, told):
    drawn(tmp_path / "a.png")
    drawn(tmp_path / "blank.png", blank=True)
    said = register(command, tmp_path, *words)
    assert said.code == 2 and told in said.err and said.err.count("\n") == 1, said
    assert not (tmp_path / "OUT").exists()


# --- which Module 1 -------------------------------------------------------------------------------

MATCH = MatchConfig(**PRESETS["smoke"][1])


def test_a_matcher_registers_with_its_own_module_1():
    mine, module1 = ({"of": "module 2"}, {}), ({"of": "module 1"}, {})
    assert Scorer("matcher", MATCH, *mine, module1, CONFIG, 3, None).registers[1] == module1
    assert Scorer("dense_reg", CONFIG, *module1, None, None, 0, None).registers[1] == module1


def test_a_matcher_without_module_1_is_refused(command, monkeypatch, tmp_path):
    bare = Scorer("matcher", MATCH, {}, {}, None, None, 3, None)
    with pytest.raises(UserError, match="was trained without Module 1"):
        bare.registers  # noqa: B018
    monkeypatch.setattr("ifvit.scoring.scorer.Scorer.from_checkpoint", lambda path: bare)
    a = drawn(tmp_path / "a.png")
    said = register(command, tmp_path, a, a)
    assert said.code == 2 and "give Module 1's checkpoint" in said.err and not (tmp_path / "OUT").exists(), said
