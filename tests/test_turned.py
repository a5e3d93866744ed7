"""The packaged weights on the packaged prints, as they lie and turned: a whole answer, by the real network."""

import numpy as np
import pytest
from PIL import Image

from ifvit import Matcher, Picture, weights
from ifvit.data.placement import turn

pytestmark = pytest.mark.run
PRINTS = weights.FOLDER / "prints"


@pytest.fixture(scope="module")
def matcher():
    return Matcher.load("pretrained")


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
    upright = matcher.register(PRINTS / "1_1.png", PRINTS / "1_2.png").transform
    print_, through = turned("1_1.png", degrees)
    found = matcher.compare(print_, PRINTS / "1_2.png", turned=True)
    assert found.decision == "match" and found.llr > 2
    inside = np.array([[100, 100, 1], [200, 260, 1], [260, 120, 1]]).T
    for transform in (found.transform, matcher.register(print_, PRINTS / "1_2.png").transform):
        np.testing.assert_allclose((transform @ through @ inside)[:2], (upright @ inside)[:2], atol=4)


def test_upside_down_is_no_match_where_nobody_asked_and_another_finger_is_none_at_any_angle(matcher):
    print_, _ = turned("1_1.png", 180.0)
    assert matcher.compare(print_, PRINTS / "1_2.png").decision == "no match"
    assert matcher.compare(print_, PRINTS / "2_1.png", turned=True).decision == "no match"
