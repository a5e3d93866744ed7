"""`from ifvit import Matcher`: prints from anywhere compared in a program of one's own."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ifvit import Matcher, Picture
from ifvit.config import PRESETS, MatchConfig
from ifvit.data import synthetic
from ifvit.data.pairs import Pair
from ifvit.data.single import Canvases
from ifvit.errors import UserError
from ifvit.scoring.fit import fit
from ifvit.window import cuts

CONFIG = MatchConfig(**PRESETS["smoke"][1])  # 200 ppi in a window of 64 px, canvas of 256


@pytest.fixture(scope="module")
def matcher(pipeline):
    return Matcher.load(pipeline.module2)


@pytest.fixture
def made_up():
    """A matcher whose network answers on every pair: four matches, of which three agree, print 1 turned by 90°."""
    centre = (CONFIG.image_size - 1) / 2

    def answers(prints, pairs, batch_size):
        points0 = centre + np.array([[0, 0], [10, 0], [0, 10], [9, 9]], np.float32)
        points1 = centre + np.array([[0, 0], [0, 10], [-10, 0], [0, 0]], np.float32)
        row = {
            "score": np.float64(0.9),
            "similarity": np.array([0, 1, 2 * centre, 0], np.float32),
            "aligned": np.bool_(True),
            "points0": points0,
            "points1": points1,
            "confidence": np.array([0.9, 0.8, 0.7, 0.6], np.float32),
            "inliers": np.array([True, True, True, False]),
            "overlap": np.float32(0.5),
            "log_odds": np.float32(np.log(100)),
        }
        return {k: np.stack([v] * len(pairs)) for k, v in row.items()}

    scorer = SimpleNamespace(
        config=CONFIG,
        aligner=({}, {}),
        registers=None,
        fusion=SimpleNamespace(threshold=lambda fmr: 1 - fmr),
        answers=answers,
        registrations=answers,
        upright=lambda a, b, similarity: None,
    )
    return Matcher("made up", scorer)


def drawn(height=300, width=280, period=9.0) -> np.ndarray:
    """A round print of concentric ridges on white, its middle in the picture's."""
    rows, columns = np.mgrid[:height, :width] - (np.array([height, width]) - 1).reshape(2, 1, 1) / 2
    radius = np.hypot(rows, columns)
    grey = 128 + 100 * np.cos(2 * np.pi * radius / period)
    grey[radius > 0.4 * min(height, width)] = 255
    return grey.astype(np.uint8)


def test_matches_are_in_pixels_of_the_pictures(made_up):
    """A window's pixel is 2.5 of a picture at 500 ppi, and 5 of one at 1000; its middle is the drawing's."""
    a, b = drawn(), drawn(600, 560, 18.0)
    found = made_up.compare(Picture(a, ppi=500), Picture(b, ppi=1000))
    x, y, u, v = found.matches.T
    np.testing.assert_allclose((x[0], y[0]), (139.5, 149.5), atol=1)
    np.testing.assert_allclose((u[0], v[0]), (279.5, 299.5), atol=2)
    np.testing.assert_allclose(found.matches - found.matches[0], [[0] * 4, [25, 0, 0, 50], [0, 25, -50, 0]], atol=1e-4)
    np.testing.assert_allclose(found.confidence, [0.9, 0.8, 0.7], rtol=1e-6)


def test_the_transform_takes_pixels_of_a_to_pixels_of_b(made_up):
    found = made_up.register(Picture(drawn(), ppi=500), Picture(drawn(600, 560, 18.0), ppi=1000))
    homogeneous = np.c_[found.matches[:, :2], np.ones(3)] @ found.transform.T
    np.testing.assert_allclose(homogeneous[:, :2], found.matches[:, 2:], atol=1e-4)
    np.testing.assert_allclose(found.transform[:2, :2], [[0, -2], [2, 0]], atol=1e-6)  # 90°, twice as many pixels


def test_a_turned_print_is_told_in_pixels_of_its_own_picture(made_up):
    """What the network finds in a print that was turned by 90° is led back to the picture, which was not."""
    plain = made_up.register(Picture(drawn(), ppi=500), Picture(drawn(), ppi=500))
    made_up.scorer.upright = lambda a, b, similarity: a.turned(90.0)
    found = made_up.register(Picture(drawn(), ppi=500), Picture(drawn(), ppi=500))
    off = plain.matches[:, :2] - plain.matches[0, :2]
    np.testing.assert_allclose(found.matches[:, :2] - found.matches[0, :2], off @ [[0, -1], [1, 0]], atol=1e-4)
    np.testing.assert_allclose(found.matches[:, 2:], plain.matches[:, 2:], atol=1e-4)
    homogeneous = np.c_[found.matches[:, :2], np.ones(3)] @ found.transform.T
    np.testing.assert_allclose(homogeneous[:, :2], found.matches[:, 2:], atol=1e-4)


def test_turned_prints_are_compared_as_they_are_most_alike(made_up):
    asked, answers = [], made_up.scorer.answers
    a, b = (made_up.read(Picture(drawn(), ppi=500)) for _ in range(2))

    def upright(a, b, similarity):
        asked.append(similarity)
        return a.turned(180.0)

    def scored(prints, pairs, batch_size):
        turned = prints.some[pairs[0][0]].placement.degrees
        return answers(prints, pairs, batch_size) | {"score": np.array([by[turned]] * len(pairs))}

    made_up.scorer.upright, made_up.scorer.answers = upright, scored
    for by, best in (({0: 0.1, 180: 0.8}, 0.8), ({0: 0.2, 180: 0.1}, 0.2)):
        assert made_up.compare(a, b, turned=True).score == best
        assert made_up.compare(a, b).score == by[0]
    assert asked == [None, None]
    by = {0: 0.9995, 180: 0.9997}  # a match as it lies, and turned by the network's own account
    assert made_up.compare(a, b, turned=True).score == 0.9997 and asked[-1][1] == 1


def test_a_match_is_a_score_that_reaches_the_threshold_of_the_rate(made_up):
    pair = Picture(drawn(), 500), Picture(drawn(), 500)
    lax, strict = (made_up.compare(*pair, fmr=fmr) for fmr in (0.2, 0.01))
    assert (lax.threshold, lax.decision) == (0.8, "match") and lax.llr == pytest.approx(2)
    assert (strict.threshold, strict.decision) == (0.99, "no match")
    with pytest.raises(UserError, match="fmr is 2; give a rate between 0 and 1"):
        made_up.compare(*pair, fmr=2)


def test_a_print_is_the_same_as_a_file_a_picture_and_an_array(made_up, tmp_path):
    grey = drawn()
    Image.fromarray(grey).save(tmp_path / "a.png", dpi=(1000, 1000))
    colours = np.dstack([grey] * 3)
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.open(tmp_path / "a.png"),
        Picture(grey, ppi=1000),
        Picture(colours, ppi=1000),
        Picture(grey / np.float32(255), ppi=1000),
        Picture(255 - grey, ppi=1000, ridges="light"),
        Picture(tmp_path / "a.png", ppi=1000),
    ]
    read = [made_up.read(form) for form in forms]
    for one in read[1:]:
        np.testing.assert_allclose(one.canvas.astype(int), read[0].canvas, atol=1)
        assert one.placement.scale == pytest.approx(0.5, rel=1e-5)  # PNG counts pixels a metre
        assert (one.placement.cut, one.placement.shift) == (read[0].placement.cut, read[0].placement.shift)
    assert made_up.read(read[0]) is read[0]


@pytest.mark.parametrize(
    "image, told",
    [
        (drawn(), "tells no resolution; give it with the array"),
        ("nowhere.png", "nowhere.png cannot be read: No such file"),
        (Picture(np.full((300, 300), 230, np.uint8), 500), "shows no ridges"),
        (Picture(np.zeros((3, 4, 5, 6), np.uint8), 500), "is no picture"),
        (Picture(np.zeros((30, 30), np.complex64), 500), "is no picture"),
        (Picture("text", 500), "cannot be read"),
        (Picture({"a": 1}, 500), "is no picture"),
    ],
)
def test_what_is_no_print_is_told_in_a_sentence(made_up, image, told):
    with pytest.raises(UserError, match=told):
        made_up.read(image)


@pytest.mark.parametrize("how", [dict(ppi=-500), dict(ppi=float("nan")), dict(ppi="500"), dict(ridges="white")])
def test_a_resolution_or_ridges_that_no_print_has_are_refused(how):
    with pytest.raises(UserError, match=f"{next(iter(how))} is"):
        Picture("a.png", **how)


def test_without_a_checkpoint_a_sentence_says_how_to_get_one(no_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained matcher at ./checkpoints/matcher/matcher_ckpt; train one"):
        Matcher.load()
    with pytest.raises(UserError, match="Checkpoint not found: elsewhere"):
        Matcher.load("elsewhere")


def test_on_kaggle_the_default_lies_below_its_working_folder(no_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    with pytest.raises(UserError, match="at /kaggle/working/IFViT/checkpoints/matcher/matcher_ckpt"):
        Matcher.load()


def test_a_small_print_decides_nothing_unless_it_matches(made_up):
    """At 1000 ppi a print of 100 px shows 2.5 mm a side."""
    pair = Picture(drawn(), 500), Picture(drawn(100, 100, 18.0), 1000)
    assert [made_up.compare(*pair, fmr=fmr).decision for fmr in (0.2, 0.01)] == ["match", "cannot decide"]


def test_without_a_fusion_there_is_no_calibrated_score(matcher, monkeypatch):
    from dataclasses import replace

    monkeypatch.setattr(
        "ifvit.scoring.scorer.Scorer.from_checkpoint", lambda path: replace(matcher.scorer, fusion=None)
    )
    with pytest.raises(UserError, match="no calibrated score"):
        Matcher.load(matcher.checkpoint)


@pytest.mark.run
def test_the_package_compares_where_nothing_was_trained(packed, generated, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    found = Matcher.load()
    (said,) = caplog.messages
    assert "none lies at ./checkpoints/matcher/matcher_ckpt: the packaged weights are used" in said
    compared = found.compare(generated[1, 1], generated[1, 1])
    assert 0 <= compared.score <= 1 and 0 <= compared.probability <= 1
    assert compared.decision == ("match" if compared.score >= compared.threshold else "no match")
    assert compared.decision == "no match" or compared.transform is not None
    np.testing.assert_array_equal(found.register(generated[1, 1], generated[1, 1]).matches, compared.matches)


def test_what_was_trained_goes_before_the_package(packed, untrained, tmp_path, monkeypatch, caplog):
    from ifvit.checkpoint import or_packaged

    monkeypatch.chdir(untrained.parent)
    assert or_packaged(None, "./dense_reg_ckpt") == "./dense_reg_ckpt" and not caplog.messages
    assert or_packaged("elsewhere", "./nowhere") == "elsewhere" and not caplog.messages
    assert or_packaged(None, "./nowhere") == "pretrained" and len(caplog.messages) == 1


def test_importing_the_matcher_starts_neither_jax_nor_a_command(process, tmp_path):
    said = process(
        "-c",
        "import sys; from ifvit import Matcher, Picture, cli; Picture('a.png', 500); del sys.modules['ifvit.cli'];"
        "print('jax' in sys.modules, 'ifvit.matcher' in sys.modules)",
        cwd=tmp_path,
    )
    assert said.out.split() == ["False", "True"], said


def test_what_the_package_does_not_offer_is_missing():
    with pytest.raises(AttributeError, match="'Matchmaker'"):
        sys.modules["ifvit"].Matchmaker  # noqa: B018


def test_pairs_are_told_the_same_together_and_alone(matcher, generated):
    pairs = [(generated[1, 1], generated[1, 2]), (generated[1, 1], generated[2, 1]), (generated[3, 1], generated[3, 3])]
    together, alone = matcher.compare_many(pairs, batch_size=2), [matcher.compare(*pair) for pair in pairs]
    for one, other in zip(together, alone):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert len(one.matches) == len(one.confidence) and 0 <= one.overlap <= 1
    assert matcher.compare_many([]) == []


def test_a_print_that_was_moved_in_its_picture_is_found_moved(matcher, generated):
    """Both come to the same canvas, so that a cell's match is known: itself, 12 px further to the right and 5 down."""
    grey = np.asarray(Image.open(generated[1, 1]).convert("L"))
    moved = np.pad(grey, ((5, 0), (12, 0)), constant_values=255)
    plain, shifted = (matcher.read(Picture(g, 500)) for g in (grey, moved))
    np.testing.assert_array_equal(plain.canvas, shifted.canvas)
    found = matcher.register(plain, shifted)
    assert found.transform is not None and found.overlap > 0.5
    same = np.abs(found.matches[:, 2:] - found.matches[:, :2] - (12, 5)).max(axis=1) < 1e-6
    assert same.mean() > 0.5


def test_registering_says_what_comparing_says(matcher, generated):
    pair = generated[1, 1], generated[1, 2]
    registered, compared = matcher.register(*pair), matcher.compare(*pair)
    np.testing.assert_allclose(registered.matches, compared.matches, atol=1e-3)
    assert registered.overlap == pytest.approx(compared.overlap, abs=0.02)


def test_a_matcher_without_module_1_compares_and_registers_nothing(matcher, generated):
    from dataclasses import replace

    from ifvit.scoring.fusion import Fusion

    fusion = Fusion((1.0, 1.0), 0.0, (0.5,), ("log_global", "log_local"))  # without ridges
    alone = Matcher("alone", replace(matcher.scorer, aligner=None, fusion=fusion))
    found = alone.compare(generated[1, 1], generated[1, 2])
    assert found.matches.shape == (0, 4) and found.transform is None and 0 <= found.score <= 1
    with pytest.raises(UserError, match="without Module 1"):
        alone.register(generated[1, 1], generated[1, 2])


def test_templates_are_unit_rows_of_prints_in_their_order(matcher, generated):
    prints = [generated[1, 1], Picture(drawn(), ppi=500), Image.open(generated[1, 1])]
    rows = matcher.embed(prints, batch_size=2)
    assert rows.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-5)
    assert matcher.embed([]).shape == (0, 32)
    with pytest.raises(UserError, match="nowhere.png cannot be read"):
        matcher.embed(["nowhere.png"])


@pytest.mark.run
def test_a_large_print_is_laid_where_it_belongs_in_the_pixels_of_its_picture(tmp_path):
    """Two cuttings of one finger's skin, 120 px apart: both are larger than the window of 320 px."""
    ridges = synthetic.master_finger(2026, 5).ridges
    skin = np.clip(127 - 100 * ridges, 0, 255).astype(np.uint8)
    upper, lower = (Picture(skin[top : top + 420], ppi=500) for top in (0, 120))
    matcher = Matcher.load("pretrained")
    a, b = matcher.read(upper), matcher.read(lower)
    assert cuts(a.mask, matcher.scorer.config) and cuts(b.mask, matcher.scorer.config)
    alone, *both = (matcher.compare(a, b), *matcher.compare_many([(a, b), (b, a)]))
    drawn = matcher.draw(a, b, tmp_path / "why.png")
    for found, down in ((alone, -120), (both[0], -120), (both[1], 120), (drawn, -120), (matcher.register(a, b), -120)):
        np.testing.assert_allclose(found.transform @ [210, 210 - down / 2, 1], [210, 210 + down / 2, 1], atol=3)
        moved = found.matches[:, 2:] - found.matches[:, :2]
        np.testing.assert_allclose(moved, [[0, down]] * len(moved), atol=15)
    assert alone.decision == "match" and alone.score == pytest.approx(both[0].score, abs=1e-4)
    laid, registered = matcher.scorer.laid(a, b)
    fitted = fit(registered, laid.placement, b.placement, matcher.scorer.config)
    xy = np.array([[100.0, 100.0], [300.0, 200.0], [210.0, 290.0]])
    np.testing.assert_allclose(fitted.back(xy), xy + [0, 120], atol=4)
    narrow = dataclasses.replace(matcher.scorer, config=matcher.scorer.config.replace(wide_window=1.0))
    assert len(found.matches) and registered.windows > narrow.registration(Canvases([a, b]), Pair(0, 1, True)).windows
