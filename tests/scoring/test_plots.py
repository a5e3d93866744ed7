"""The pictures: whole PNG files of a sensible size that show what they were given."""

import numpy as np
import pytest
from PIL import Image

from ifvit.errors import UserError
from ifvit.scoring import plots
from ifvit.scoring.rates import det_curve


def picture(path):
    """uint8 [H, W, 3] of a PNG file, which must be of sensible size and the only file in its folder."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert 250 <= pixels.shape[0] <= 1500 and 350 <= pixels.shape[1] <= 1500
    assert (pixels != 255).any()
    return pixels


def hues(pixels):
    """The strongly coloured pixels, [N, 3]: neither white nor black nor grey."""
    spread = pixels.max(axis=-1).astype(int) - pixels.min(axis=-1)
    return pixels[spread > 100].astype(int)


def scores(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(2, 1, 280), rng.normal(0, 1, 450)


def print_of(height, width):
    y, x = np.mgrid[:height, :width]
    return (127.5 + 127.5 * np.sin(np.hypot(y - height / 2, x - width / 2))).astype(np.uint8)


def test_det_of_several_databases(tmp_path):
    curves = {f"DB{seed}": det_curve(*scores(seed))[1:] for seed in range(3)}
    plots.det(tmp_path / "det.png", curves)
    assert len(hues(picture(tmp_path / "det.png"))) > 300


def test_det_of_perfect_scores_has_no_rate_but_0(tmp_path):
    plots.det(tmp_path / "det.png", {"perfect": det_curve([2.0, 3.0], [0.0, 1.0])[1:]})
    picture(tmp_path / "det.png")


def test_histogram_with_and_without_threshold(tmp_path):
    plots.histogram(tmp_path / "a.png", *scores())
    without = picture(tmp_path / "a.png")
    plots.histogram(tmp_path / "a.png", *scores(), threshold=1.0)
    assert (picture(tmp_path / "a.png") != without).any()


def test_histogram_of_one_kind_alone(tmp_path):
    plots.histogram(tmp_path / "a.png", [0.5, 0.7], [])
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="no scores"):
        plots.histogram(tmp_path / "b.png", [], [])


def test_curves_have_a_panel_a_metric(tmp_path):
    def rows(metrics):
        train = [{"step": s, "epoch": 0, "split": "train", **dict.fromkeys(metrics, 1 / (s + 1))} for s in range(50)]
        return train + [{"step": 49, "epoch": 0, "split": "val", "loss": 0.3, "note": "text", "lr": float("nan")}]

    plots.curves(tmp_path / "a.png", rows(["loss"]))
    one = picture(tmp_path / "a.png")
    plots.curves(tmp_path / "a.png", rows(["loss", "lr", "grad_norm", "recall"]))
    four = picture(tmp_path / "a.png")
    assert four.shape[1] == 3 * one.shape[1] and four.shape[0] == 2 * one.shape[0]
    with pytest.raises(UserError, match="no metrics"):
        plots.curves(tmp_path / "b.png", [{"step": 0, "epoch": 0, "split": "train"}])


def test_a_step_logged_twice_shows_the_later_value(tmp_path):
    def row(step, loss):
        return {"step": step, "epoch": 0, "split": "train", "loss": loss}

    plots.curves(tmp_path / "a.png", [row(0, 1.0), row(1, 9.0), row(2, 7.0), row(1, 0.5), row(2, 0.2)])
    resumed = picture(tmp_path / "a.png")
    plots.curves(tmp_path / "a.png", [row(0, 1.0), row(1, 0.5), row(2, 0.2)])
    np.testing.assert_array_equal(resumed, picture(tmp_path / "a.png"))


def draw_matches(path, confidence, count=12):
    rng = np.random.default_rng(0)
    a, b = print_of(300, 200), print_of(180, 240) / 255
    xy_a, xy_b = rng.uniform(10, 190, (count, 2)), rng.uniform(10, 170, (count, 2))
    plots.matches(path, a, b, xy_a, xy_b, np.full(count, confidence), "a title")
    return picture(path)


def test_the_lines_of_matches_take_the_colour_of_their_confidence(tmp_path):
    without = draw_matches(tmp_path / "a.png", 0.5, count=0).astype(int)

    def drawn(confidence):
        pixels = draw_matches(tmp_path / "a.png", confidence)
        return pixels[(pixels != without).any(axis=-1)].astype(int)

    weak, strong = drawn(0.05), drawn(0.95)
    assert min(len(weak), len(strong)) > 1000
    # On the colour scale 0 is blue and 1 is red.
    assert (weak[:, 2] > weak[:, 0]).mean() > 0.9
    assert (strong[:, 0] > strong[:, 2]).mean() > 0.9


def test_a_picture_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    plots.histogram(path, *scores())
    before = path.read_bytes()

    def disk_full(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", disk_full)
    with pytest.raises(OSError, match="No space"):
        plots.histogram(path, *scores(1))
    assert path.read_bytes() == before
    picture(path)
