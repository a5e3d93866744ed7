"""The packaged weights on the packaged prints, as they lie and turned: a whole answer, by the real network."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ifvit import Matcher, Picture, weights
from ifvit.data.placement import turn
from ifvit.scoring.fit import fit

pytestmark = pytest.mark.run
PRINTS = weights.FOLDER / "prints"


@pytest.fixture(scope="module")
def matcher():
    return Matcher.load("pretrained")


@pytest.fixture(scope="module")
def enrolled(command, tmp_path_factory):
    """A gallery of two fingers, a print each; its folder's parent, which has `probe.png`, upside down, of the first."""
    cwd = tmp_path_factory.mktemp("turned")
    (cwd / "DB").mkdir()
    for name in ("1_2.png", "2_1.png"):
        shutil.copy(PRINTS / name, cwd / "DB")
    Image.fromarray(turned("1_1.png", 180.0)[0].image).save(cwd / "probe.png", dpi=(500, 500))
    said = command("enroll", cwd / "DB", "--gallery", "g", "--checkpoint", "pretrained", cwd=cwd)
    assert said.code == 0 and "2 prints enrolled" in said.out, said
    return cwd


@pytest.mark.parametrize("words, decision, angles", [((), "no match", 1), (("--turned",), "match", 6)])
def test_a_probe_upside_down_is_identified_where_it_may_be_turned(command, enrolled, words, decision, angles):
    said = command(
        "identify", "probe.png", "--gallery", "g", "--checkpoint", "pretrained", "--json", *words, cwd=enrolled
    )
    (told,) = json.loads(said.out)
    assert told["fmr"] == pytest.approx(1 - 0.99 ** (1 / (2 * angles)))
    assert [c["rank"] for c in told["candidates"]] == [1, 2]
    assert {c["finger"] for c in told["candidates"]} == {"DB/1", "DB/2"}
    assert {c["finger"]: c["decision"] for c in told["candidates"]} == {"DB/1": decision, "DB/2": "no match"}


@pytest.mark.parametrize("words, decision", [((), "no match"), (("--turned",), "match")])
def test_verify_says_the_same_of_one_pair_of_a_list_and_in_a_picture(command, enrolled, words, decision):
    to = ("--checkpoint", "pretrained", *words)
    said = command("verify", "probe.png", "DB/1_2.png", "--picture", "why.png", *to, cwd=enrolled)
    assert f", {decision} (threshold" in said.out and Image.open(enrolled / "why.png").width > 500, said
    (enrolled / "pairs.csv").write_text("a,b\nprobe.png,DB/1_2.png\n")
    assert command("verify", "--pairs", "pairs.csv", "--out", "s.csv", *to, cwd=enrolled).code == 0
    assert (enrolled / "s.csv").read_text().splitlines()[1].split(",")[3] == decision


def test_register_lays_it_the_right_way_up(command, enrolled):
    said = command("register", "probe.png", "DB/1_2.png", "--checkpoint", "pretrained", "--out", "OUT", cwd=enrolled)
    assert said.code == 0 and said.out.startswith("registered"), said
    told = json.loads((enrolled / "OUT/transform.json").read_text())
    assert abs(told["similarity"]["degrees"]) > 165 and told["similarity"]["scale"] == pytest.approx(1, abs=0.05)


def turned(name: str, degrees: float) -> tuple[Picture, np.ndarray]:
    """A packaged print in a square of white, turned in it; and the map from the print's pixels to the square's."""
    picture = Image.open(PRINTS / name).convert("L")
    square = Image.new("L", (600, 600), 255)
    corner = [(600 - n) // 2 for n in picture.size]
    square.paste(picture, corner)
    through = turn(degrees, 299.5) @ [[1, 0, corner[0]], [0, 1, corner[1]], [0, 0, 1]]
    return Picture(np.asarray(square.rotate(-degrees, Image.Resampling.BICUBIC, fillcolor=255)), ppi=500), through


def test_two_impressions_of_a_finger_match_and_two_fingers_do_not(matcher):
    same, other = matcher.compare_many([(PRINTS / "1_1.png", PRINTS / f"{n}.png") for n in ("1_2", "2_1")])
    assert same.decision == "match" and same.llr > 2 and other.decision == "no match" and other.llr < 1


@pytest.mark.parametrize("degrees", [180.0, 137.0])
def test_a_print_at_any_angle_is_laid_as_the_upright_one_is(matcher, degrees):
    """By the smaller window alone: one similarity is the other's."""
    config = matcher.scorer.config.replace(wide_window=1.0)
    matcher = dataclasses.replace(matcher, scorer=dataclasses.replace(matcher.scorer, config=config))
    upright = matcher.register(PRINTS / "1_1.png", PRINTS / "1_2.png").transform
    print_, through = turned("1_1.png", degrees)
    found = matcher.compare(print_, PRINTS / "1_2.png", turned=True)
    assert found.decision == "match" and found.llr > 2
    inside = np.array([[100, 100, 1], [200, 260, 1], [260, 120, 1]]).T
    for transform in (found.transform, matcher.register(print_, PRINTS / "1_2.png").transform):
        np.testing.assert_allclose((transform @ through @ inside)[:2], (upright @ inside)[:2], atol=4)


@pytest.mark.parametrize("degrees", [180.0, 137.0])
def test_a_large_print_at_any_angle_is_laid_as_the_upright_one_is(matcher, degrees):
    """Both prints are cut by the smaller window. Of so much bent skin the similarity alone tells less."""
    upright = matcher.register(PRINTS / "1_1.png", PRINTS / "1_2.png").transform
    print_, through = turned("1_1.png", degrees)
    found = matcher.compare(print_, PRINTS / "1_2.png", turned=True)
    assert found.decision == "match" and found.llr > 2
    y, x = np.mgrid[100:300:40, 80:260:40].reshape(2, -1).astype(float)
    lain = laid(matcher, PRINTS / "1_1.png", np.column_stack([x, y]))
    again = laid(matcher, print_, np.column_stack([x, y]))
    again = (np.linalg.inv(through) @ np.column_stack([again, np.ones(len(again))]).T)[:2].T
    assert np.linalg.norm(again - lain, axis=1).mean() < 1
    points = np.column_stack([lain, np.ones(len(lain))]).T
    for transform in (found.transform, matcher.register(print_, PRINTS / "1_2.png").transform):
        assert np.linalg.norm(((transform @ through - upright) @ points)[:2], axis=0).mean() < 4


def laid(matcher, picture, xy):
    """Where in a picture of finger 1 the points of 1_2.png lie, by `ifvit.register`: similarity and deformation."""
    b = matcher.read(PRINTS / "1_2.png")
    a, found = matcher.scorer.laid(matcher.read(picture), b)
    return fit(found, a.placement, b.placement, matcher.scorer.config).back(xy)


def test_upside_down_is_no_match_where_nobody_asked_and_another_finger_is_none_at_any_angle(matcher):
    print_, _ = turned("1_1.png", 180.0)
    assert matcher.compare(print_, PRINTS / "1_2.png").decision == "no match"
    assert matcher.compare(print_, PRINTS / "2_1.png", turned=True).decision == "no match"
