"""The picture of a decision: what it shows is what the networks told."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ifvit import Matcher
from ifvit.data.placement import Placement
from ifvit.data.single import OnCanvas
from ifvit.errors import UserError
from ifvit.scoring import decision_picture, plots
from ifvit.scoring.decision_picture import _shared


def square(left, top, side=96, size=256):
    """A print of vertical stripes in a square of the canvas; left, top and side divide by 8."""
    canvas, mask = np.full((size, size), 255, np.uint8), np.zeros((size // 8, size // 8), bool)
    canvas[top : top + side, left : left + side : 8] = 0
    mask[top // 8 : (top + side) // 8, left // 8 : (left + side) // 8] = True
    return OnCanvas("a square", canvas, mask, Placement())


def test_what_both_show_is_where_one_lies_on_the_other():
    a, b = square(40, 40), square(80, 64)

    def warped(canvas, shape):  # 40 px to the right, 16 down: the upper part of b has nothing of a on it
        y, x = np.mgrid[: shape[0], : shape[1]]
        xy = np.stack([x - 40, y - 16], -1).astype(float)
        return np.roll(canvas, (16, 40), (0, 1)), (xy >= 0).all(-1), xy

    shared, drawn = _shared(a, b, SimpleNamespace(warped=warped))
    assert plots.box(shared) == (80 - 8, 64 - 8, 176 + 8, 152 + 8)  # a's 56 … 152, b's 64 … 160
    np.testing.assert_array_equal(drawn[100, 80], (0, 0, 0))  # a stripe of both
    np.testing.assert_array_equal(drawn[100, 82], (255, 255, 255))
    np.testing.assert_array_equal(drawn[156, 80], (0, 255, 0))  # of b alone: green


@pytest.fixture
def told(monkeypatch):
    """What `decision` is called with, before it draws."""
    calls, draw = [], decision_picture.decision
    monkeypatch.setattr(decision_picture, "decision", lambda *words: (calls.append(words), draw(*words)))
    return calls


@pytest.mark.run
def test_a_decision_of_the_package_is_drawn(told, tmp_path):
    from ifvit.weights import FOLDER

    matcher = Matcher.load("pretrained")
    a, b, other = (FOLDER / "prints" / f"{n}.png" for n in ("1_1", "1_2", "2_1"))
    for pair, decision in (((a, b), "match"), ((a, other), "no match")):
        found = matcher.draw(*pair, tmp_path / f"{decision}.png")
        assert found.decision == decision and found.score == pytest.approx(matcher.compare(*pair).score, abs=1e-5)
        *_, parts, title = told[-1]
        assert sum(parts.values()) / np.log(10) == pytest.approx(found.llr, abs=1e-3) and decision in title
        with Image.open(tmp_path / f"{decision}.png") as image:
            image.load()
            assert image.format == "PNG"
    registration, config = told[0][3:5]
    assert registration.registered and told[0][5] is None  # Module 1 has no local branch
    decision_picture.decision(  # nothing is laid on anything
        tmp_path / "none.png", *told[0][1:3], registration._replace(registered=np.False_), config, *told[0][5:]
    )
    assert (tmp_path / "none.png").stat().st_size < (tmp_path / "match.png").stat().st_size


@pytest.mark.run
def test_a_decision_of_module_2_shows_what_its_local_branch_saw(module2, generated, told, tmp_path):
    matcher = Matcher.load(module2.path)
    found = matcher.draw(generated[1, 1], generated[1, 1], tmp_path / "out.png")
    *_, corners, parts, _ = told[-1]
    size, roi = matcher.scorer.config.image_size, matcher.scorer.config.roi_size
    np.testing.assert_array_equal(corners[2] - corners[0], (roi, roi))
    assert (corners >= -0.5).all() and (corners <= size - 0.5).all()
    assert set(parts) == {"log_clear", "overlap", "log_global", "log_local"}
    assert sum(parts.values()) / np.log(10) == pytest.approx(found.llr, abs=1e-3)
    alone = Matcher("alone", replace(matcher.scorer, aligner=None))
    with pytest.raises(UserError, match="without Module 1"):
        alone.draw(generated[1, 1], generated[1, 1], tmp_path / "alone.png")
