"""Fingers and persons by hand, from pairs that were compared."""

import math

import pytest

from ifvit.gallery.ranking import Compared, fingers, persons
from ifvit.gallery.store import Entry


def compared(name: str, llr: float) -> Compared:
    """Of a print SUBJECT_FINGER_IMPRESSION; the score goes with the ratio."""
    subject, finger, _ = name.split("_")
    return Compared(Entry(name, "", "DB", f"{subject}_{finger}", subject=subject), llr / 10, llr)


def test_a_finger_is_as_like_as_its_likest_impression():
    told = fingers([compared("a_1_1", 1), compared("b_1_1", 2), compared("a_1_2", 3)])
    assert [(c["rank"], c["finger"], c["print"]) for c in told] == [(1, "DB/a_1", "a_1_2"), (2, "DB/b_1", "b_1_1")]


def test_a_persons_ratio_is_the_product_over_probes_of_the_mean_over_fingers():
    """Two probes; a has two fingers, b one. What was not compared counts as the least like of its probe."""
    first = [compared("a_1_1", 2), compared("a_1_2", 1), compared("a_2_1", 0), compared("b_1_1", 1)]
    second = [compared("a_2_1", 1), compared("b_1_1", -1)]
    a, b = persons([first, second], {("DB", "a"): 2, ("DB", "b"): 1}, most=3)
    assert (a["person"], a["rank"], b["person"], b["rank"]) == ("DB/a", 1, "DB/b", 2)
    assert a["llr"] == pytest.approx(math.log10((100 + 1) / 2 * (10 + 0.1) / 2))
    assert b["llr"] == pytest.approx(1 - 1)
    assert [(x["probe"], x["print"]) for x in a["likest"]] == [(0, "a_1_1"), (1, "a_2_1")]


def test_no_probe_tells_more_than_a_calibration_can_show_and_angles_share_their_chance():
    (a,) = persons([[compared("a_1_1", 9)]], {("DB", "a"): 1}, most=3)
    assert a["llr"] == pytest.approx(3)
    (a,) = persons([[compared("a_1_1", 2), compared("a_1_1", 0)]], {("DB", "a"): 1}, most=3, angles=6)
    assert a["llr"] == pytest.approx(math.log10(100 / 6))


def test_a_finger_of_nobody_known_is_a_person_of_its_own():
    assert Entry("x", "", "DB", "7").person == ("DB", "7")
