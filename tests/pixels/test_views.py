"""Views of a print, their truth, and what corrupts them: known poses, known ridges, plain numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.config import PRESETS, DenseConfig
from ifvit.data.impressions import canvas_points
from ifvit.models.losses import IGNORE, NO_MATCH
from ifvit.pixels import corruption
from ifvit.pixels.corruption import corrupt, draws
from ifvit.pixels.geometry import grid_points
from ifvit.pixels.views import (
    View,
    dense_pair,
    match_views,
    normalise,
    plain_view,
    plain_views,
    random_view,
    take_view,
    to_canvas,
    to_view,
    truth,
    zoomed,
)
from ifvit.training.step import pair_keys

SMOKE = DenseConfig(**PRESETS["smoke"][0])  # 200 ppi, window of 64 px, canvas of 256
WIDE = SMOKE.replace(image_size=128, input_ppi=500.0)  # 16 × 16 cells, as many pixels as the canvas has there
SIDE = 16
CELLS = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
EVERYWHERE = np.ones(SIDE * SIDE, bool)


def posed(degrees=0.0, x=0.0, y=0.0, scale=1.0, config=WIDE) -> View:
    """The plain view turned and scaled about its middle, moved by (x, y) px of the canvas."""
    plain = plain_view(config)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return plain._replace(
        matrix=plain.matrix @ jnp.array([[c, -s], [s, c]]) * scale, centre=plain.centre + jnp.array([x, y])
    )


def quickly(f):
    """`f` compiled with little optimisation: these pictures are small."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def labels_between():
    run = quickly(lambda v0, v1, m0, m1: truth(v0, v1, m0, m1, WIDE))
    return lambda v0, v1, m0=EVERYWHERE, m1=EVERYWHERE: np.asarray(run(v0, v1, m0, m1)).reshape(SIDE, SIDE)


# --- views ----------------------------------------------------------------------------------------


def test_the_plain_view_is_the_middle_of_the_canvas_at_the_networks_ppi():
    """At 200 ppi a pixel is 2.5 px of the canvas; 31.5 is the window's middle, 127.5 the canvas's."""
    q = jnp.array([[31.5, 31.5], [32.5, 31.5], [0, 63]])
    expected = [[127.5, 127.5], [130, 127.5], [127.5 - 31.5 * 2.5, 127.5 + 31.5 * 2.5]]
    np.testing.assert_allclose(to_canvas(plain_view(SMOKE), q, 64), expected, atol=1e-4)


@pytest.mark.run
def test_a_pixel_of_a_view_shows_its_place_on_the_canvas():
    """Canvases whose grey level is x, and y: at 500 ppi the view reads its own coordinates off them."""
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    view = posed(25, 10, -6, 0.9)
    xy = np.asarray(to_canvas(view, jnp.asarray(grid_points(128)), 128))
    for canvas, expected in ((x, xy[:, 0]), (y, xy[:, 1])):
        pixels, inside = take_view(jnp.asarray(canvas), jnp.ones((32, 32), bool), view, WIDE)
        assert inside.all()
        np.testing.assert_allclose(np.ravel(pixels) * 255, expected, atol=1e-2)


def test_the_foreground_of_a_view_lies_where_the_canvas_has_it():
    mask8 = np.zeros((32, 32), bool)
    mask8[8:24, 12:20] = True  # canvas y 64 … 192, x 96 … 160: view y 0 … 128, x 32 … 96
    _, inside = take_view(jnp.zeros((256, 256), np.uint8), jnp.asarray(mask8), posed(), WIDE)
    assert inside[4:-4, 34:94].all() and not inside[:, :31].any() and not inside[:, 97:].any()


@pytest.mark.parametrize("distortion", [1.0, 2.0])
def test_to_view_is_the_inverse_of_to_canvas_within_a_twentieth_of_a_pixel(distortion):
    config = SMOKE.replace(distortion=distortion)

    def there_and_back(key):
        view = random_view(key, config, jnp.float32(2.5), 0.08, 45.0)
        canvas = to_canvas(view, q, 64)
        undistorted = view.centre + (q - 31.5) @ view.matrix.T
        return to_view(view, canvas, 64), jnp.linalg.norm(canvas - undistorted, axis=-1)

    q = jnp.asarray(np.random.default_rng(0).uniform(0, 63, (50, 2)), jnp.float32)
    back, bend = quickly(jax.vmap(there_and_back))(jax.random.split(jax.random.key(0), 100))
    assert np.abs(back - q).max() < 0.05
    assert np.median(bend) > 1 and np.max(bend) < 20 * distortion  # px of the canvas: it does distort


def test_both_views_of_a_pair_are_zoomed_alike_and_by_no_more_than_is_asked():
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), posed(), posed(30, scale=1.05))
    keys = jax.random.split(jax.random.key(0), 200)
    views = jax.vmap(lambda key: zoomed(key, pair, WIDE.replace(zoom=0.3)))(keys)
    by = np.sqrt(np.linalg.det(views.matrix) / np.linalg.det(pair.matrix))
    np.testing.assert_allclose(by[:, 0], by[:, 1], rtol=1e-5)
    assert 0.74 < by.min() < 0.78 and 1.3 < by.max() < 1.36  # exp(-0.3), exp(0.3)
    jax.tree.map(np.testing.assert_array_equal, zoomed(keys[0], pair, WIDE), pair)


# --- truth ----------------------------------------------------------------------------------------


def test_a_view_matches_itself_cell_by_cell(labels_between):
    np.testing.assert_array_equal(labels_between(posed(), posed()), CELLS)


@pytest.mark.parametrize("cells", [1, -3])
def test_mistake_3_every_cell_of_a_shifted_pair_has_its_true_label_also_right_of_64_px(labels_between, cells):
    """View 1 lies `cells` cells to the right: what is at column c of view 0 is at column c − cells of view 1."""
    labels = labels_between(posed(), posed(x=8 * cells))
    expected = np.full((SIDE, SIDE), NO_MATCH)
    for row, col in np.ndindex(SIDE, SIDE):
        if 0 <= col - cells < SIDE:
            expected[row, col] = row * SIDE + col - cells
    np.testing.assert_array_equal(labels, expected)
    assert len(np.unique(labels[:, 9:12])) == 3 * SIDE  # nothing is clipped to a last cell


def test_a_shift_down_moves_rows(labels_between):
    expected = np.full((SIDE, SIDE), NO_MATCH)
    expected[2:] = CELLS[:-2]
    np.testing.assert_array_equal(labels_between(posed(), posed(y=16)), expected)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_quarter_turn_turns_the_cells(labels_between, quarters):
    """View 1's axes are turned clockwise on the picture (y points down), so its picture is turned the other way."""
    labels = labels_between(posed(), posed(90 * quarters))
    seen_in_view_1 = np.rot90(CELLS, quarters)  # counter-clockwise: which cell of view 0 each cell of view 1 shows
    expected = np.empty(SIDE * SIDE, int)
    expected[seen_in_view_1.ravel()] = CELLS.ravel()
    np.testing.assert_array_equal(labels.ravel(), expected)


def test_labels_are_mutual_nearest_cells_for_any_pose(labels_between):
    """Against brute force with complex numbers, in canvas px."""
    degrees0, x0, y0, degrees1, x1, y1, scale = -12, 5, -3, 35, 21, -9, 1.15
    labels = labels_between(posed(degrees0, x0, y0), posed(degrees1, x1, y1, scale))
    centres = (CELLS.ravel() % SIDE + 1j * (CELLS.ravel() // SIDE)) * 8 + 3.5 * (1 + 1j) - 63.5 * (1 + 1j)
    turn0, turn1 = np.exp(1j * np.radians(degrees0)), scale * np.exp(1j * np.radians(degrees1))
    canvas0, canvas1 = centres * turn0 + (x0 + 1j * y0), centres * turn1 + (x1 + 1j * y1)

    def nearest(points, turn, origin):
        at = (points - origin) / turn  # in the other view's px from its middle
        inside = (np.abs(at.real) < 64) & (np.abs(at.imag) < 64)
        return np.abs(at[:, None] - centres).argmin(1), inside

    j, seen = nearest(canvas0, turn1, x1 + 1j * y1)
    i, back = nearest(canvas1, turn0, x0 + 1j * y0)
    mutual = seen & back[j] & (i[j] == CELLS.ravel())
    expected = np.where(mutual, j, np.where(seen, IGNORE, NO_MATCH))
    assert mutual.sum() > 80 and (expected == IGNORE).any() and (expected == NO_MATCH).any()
    np.testing.assert_array_equal(labels.ravel(), expected)


@pytest.mark.run
def test_matched_cells_show_the_same_skin_in_distorted_views(labels_between):
    """Canvases whose grey level is x, and y, tell where on the finger a pixel lies."""
    view0, view1 = (random_view(jax.random.key(k), WIDE, jnp.float32(a), 0.08, 20.0) for k, a in ((1, 0.2), (2, -0.9)))
    labels = labels_between(view0, view1).ravel()
    middle = np.ravel([[(8 * r + 3) * 128 + 8 * c + 3 for c in range(SIDE)] for r in range(SIDE)])
    take = quickly(lambda canvas, v: take_view(canvas, jnp.ones((32, 32), bool), v, WIDE)[0].ravel()[middle] * 255)
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    place0, place1 = (np.stack([take(x, v), take(y, v)], axis=1) for v in (view0, view1))
    matched = labels >= 0
    assert matched.sum() > 60
    # half a cell either way, and the corner pixel that stands for each cell
    assert np.abs(place0[matched] - place1[labels[matched]]).max() < 1.1 * (4 + 1) * math.sqrt(2)
    assert len(set(labels[matched])) == matched.sum()


def test_mistake_8_labels_are_one_to_one_and_background_has_none(labels_between):
    m0, m1 = np.arange(256) % 16 > 2, np.arange(256) % 16 < 13
    labels = labels_between(posed(), posed(20, 3, 4, 0.85), m0, m1).ravel()
    matched = labels[labels >= 0]
    assert len(matched) == len(set(matched)) > 30
    assert (labels[~m0] == IGNORE).all() and m1[matched].all()
    shifted = labels_between(posed(), posed(), m0, m1)
    np.testing.assert_array_equal(shifted[:, 13:], NO_MATCH)  # its place in view 1 is background: no match


@pytest.fixture(scope="module")
def labels_between_canvases():
    run = quickly(lambda v0, v1, m0, m1, map01, map10: truth(v0, v1, m0, m1, WIDE, (map01, map10)))
    return lambda v0, v1, map01, map10, m0=EVERYWHERE, m1=EVERYWHERE: np.asarray(run(v0, v1, m0, m1, map01, map10))


SAME = canvas_points(256)


def test_canvases_with_idle_maps_have_the_truth_of_one_canvas(labels_between, labels_between_canvases):
    for k in range(4):
        view0, view1 = (random_view(jax.random.key(2 * k + i), WIDE, jnp.float32(i), 0.08, 45.0) for i in (0, 1))
        expected = labels_between(view0, view1).ravel()
        labels = labels_between_canvases(view0, view1, SAME, SAME)
        assert (labels != expected).mean() < 0.01 and (labels >= 0).sum() > 50  # points half way between two cells


def test_skin_that_lies_elsewhere_on_the_other_canvas_matches_there(labels_between, labels_between_canvases):
    """On canvas 1 all lies a quarter turn further about the middle, and 16 px lower: a view posed so sees the same."""
    middle = SAME - 127.5
    map01 = np.stack([-middle[..., 1], middle[..., 0]], axis=-1) + 127.5 + np.float32([0, 16])
    lower = middle - np.float32([0, 16])
    map10 = np.stack([lower[..., 1], -lower[..., 0]], axis=-1) + 127.5
    view0, view1 = posed(12, 5, -3), posed(90 + 20, -7, 16 + 6)
    # the same place on canvas 0: a quarter turn back
    expected = labels_between(view0, posed(20, 6, 7)).ravel()
    labels = labels_between_canvases(view0, view1, map01, map10)
    assert (labels != expected).mean() < 0.01 and (labels >= 0).sum() > 100


def test_skin_that_the_other_print_does_not_show_has_no_match(labels_between_canvases):
    far = SAME + np.float32([64, 0])  # eight cells of view 1 further to the right
    labels = labels_between_canvases(posed(), posed(), far, SAME - np.float32([64, 0])).reshape(SIDE, SIDE)
    np.testing.assert_array_equal(labels[:, :8], CELLS[:, 8:])
    np.testing.assert_array_equal(labels[:, 8:], NO_MATCH)
    covered = CELLS.ravel() % SIDE >= 12  # view 1 shows its right quarter alone
    labels = labels_between_canvases(posed(), posed(), far, SAME - np.float32([64, 0]), m1=covered)
    np.testing.assert_array_equal(labels.reshape(SIDE, SIDE)[:, :4], NO_MATCH)
    np.testing.assert_array_equal(labels.reshape(SIDE, SIDE)[:, 4:8], CELLS[:, 12:])


# --- corruption -----------------------------------------------------------------------------------


def test_mistake_9_over_pressure_thickens_dark_ridges_and_dryness_thins_them():
    """Without noise a corrupted print is darker or lighter than it was by its pressure alone.

    The share of ridge is counted at half way from ridge to valley, so that darkness alone does not change it.
    """
    y, x = np.mgrid[:64, :64]
    ridges = (0.5 + 0.4 * np.cos(2 * np.pi * (x + 0.371 * y) / 16)).astype(np.float32)
    config, mask, inner = SMOKE.replace(noise=0.0, partial=0.0), jnp.ones((64, 64), bool), np.s_[:, 12:52, 12:52]
    run = quickly(jax.vmap(lambda key: corrupt(draws(key, config), jnp.asarray(ridges), mask, config, 1.0)[0]))
    prints = np.asarray(run(jax.random.split(jax.random.key(5), 60)))[inner].reshape(60, -1)
    low, high = np.percentile(prints, [5, 95], axis=1, keepdims=True)
    share, darkness = (prints < (low + high) / 2).mean(1), -prints.mean(1)
    plain = np.abs(darkness).argmin()
    assert share[plain] == pytest.approx(0.5, abs=0.03)  # a cosine is half ridge
    assert share[darkness.argmax()] > 0.57 and share[darkness.argmin()] < 0.43
    assert np.corrcoef(share, darkness)[0, 1] > 0.95


def test_the_filters_take_the_least_and_the_greatest_of_five_pixels():
    image = np.random.default_rng(6).random((5, 6))
    p = np.pad(image, 1, mode="edge")
    cross = np.stack([p[1:-1, 1:-1], p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]])
    np.testing.assert_allclose(corruption._neighbours(jnp.asarray(image), jnp.minimum), cross.min(0), rtol=1e-6)
    np.testing.assert_allclose(corruption._neighbours(jnp.asarray(image), jnp.maximum), cross.max(0), rtol=1e-6)


@pytest.fixture(scope="module")
def ridges_and_background():
    """Canvases of two prints on light ground, foreground masks; one genuine pair, one impostor pair."""
    y, x = np.mgrid[:256, :256]
    inside = np.hypot((y - 128) / 110, (x - 128) / 80) < 1
    prints = [
        np.where(inside, 128 + 90 * np.sin(2 * np.pi * np.hypot(y + s, x - s) / 9), 235).astype(np.uint8)
        for s in (40, 300)
    ]
    mask = inside.reshape(32, 8, 32, 8).mean((1, 3)) > 0.5
    return {
        "canvas0": np.stack([prints[0], prints[0]]),
        "canvas1": np.stack([prints[0], prints[1]]),
        "mask0": np.stack([mask, mask]),
        "mask1": np.stack([mask, mask]),
        "genuine": np.array([True, False]),
    }


@pytest.fixture(scope="module")
def make_pair(ridges_and_background):
    run = quickly(lambda keys: dense_pair(keys, ridges_and_background, SMOKE))
    return lambda step: jax.tree.map(np.asarray, run(pair_keys(0, step, (2,))))


@pytest.fixture(scope="module")
def steps(make_pair):
    return [make_pair(step) for step in range(6)]


@pytest.mark.run
def test_mistake_8_the_background_is_zero_however_the_print_is_turned(steps):
    for pair in steps:
        for image, mask in ((pair.image0, pair.mask0), (pair.image1, pair.mask1)):
            assert (image[~mask] == 0).all()
            assert (image[mask] != 0).mean() > 0.9 and np.abs(image).max() <= 3
    assert any(pair.mask1[0].sum() != steps[0].mask1[0].sum() for pair in steps)


def test_mistake_8_no_black_corners_where_the_view_leaves_the_canvas():
    """A canvas that is foreground to its edges, seen by a window of its size at 45°."""
    config = SMOKE.replace(canvas_size=64, input_ppi=500.0)
    canvas = np.random.default_rng(7).integers(100, 160, (64, 64)).astype(np.uint8)
    canvas[0, 0] = 200
    image, mask = quickly(lambda v: take_view(jnp.asarray(canvas), jnp.ones((8, 8), bool), v, config))(
        posed(45, config=config)
    )
    corners = np.ix_([0, 1, -2, -1], [0, 1, -2, -1])
    np.testing.assert_allclose(image[corners], 200 / 255, atol=1e-5)  # the background, not 0
    assert not mask[corners].any() and mask[20:44, 20:44].all()
    assert (np.asarray(normalise(image[None], mask[None], config))[0, ..., 0][corners] == 0).all()


def test_mistake_8_corruption_and_pose_differ_from_step_to_step_and_are_the_same_in_the_same_step(make_pair, steps):
    for first, second in zip(steps, steps[1:]):
        for a, b in zip(first[:2], second[:2]):
            assert np.abs(a - b).mean() > 0.1
    again = make_pair(3)
    for a, b in zip(again, steps[3]):
        np.testing.assert_array_equal(a, b)


def test_the_two_views_of_a_print_are_not_the_same_picture(steps):
    assert all(np.abs(pair.image0[0] - pair.image1[0]).mean() > 0.1 for pair in steps)


def test_an_impostor_pair_is_labelled_no_match_on_its_foreground_and_unknown_elsewhere(steps):
    for pair in steps:
        cells = pair.mask0[1].reshape(8, 8, 8, 8).mean((1, 3)).ravel() >= 0.5
        np.testing.assert_array_equal(pair.labels[1], np.where(cells, NO_MATCH, IGNORE))
        assert (pair.labels[0] >= 0).any()


def test_a_label_joins_foreground_cells_of_both_views(steps):
    for pair in steps:
        cells0, cells1 = (m[0].reshape(8, 8, 8, 8).mean((1, 3)).ravel() >= 0.5 for m in (pair.mask0, pair.mask1))
        matched = pair.labels[0] >= 0
        assert cells0[matched].all() and cells1[pair.labels[0][matched]].all()


@pytest.mark.run
def test_the_maps_of_a_batch_reach_the_truth_of_its_pairs(ridges_and_background, make_pair):
    """Idle maps change no label. Maps that lead away leave nothing that matches, and no image changes."""
    run = quickly(lambda keys, batch: dense_pair(keys, batch, SMOKE))
    plain = make_pair(0)
    same, away = (
        run(pair_keys(0, 0, (2,)), ridges_and_background | {"map01": maps, "map10": maps})
        for maps in (np.stack([SAME, SAME]), np.stack([SAME, SAME]) + np.float32(1000))
    )
    assert (same.labels != plain.labels).mean() < 0.02 and (same.labels[0] >= 0).any()
    cells = plain.mask0[0].reshape(8, 8, 8, 8).mean((1, 3)).ravel() >= 0.5
    np.testing.assert_array_equal(away.labels[0], np.where(cells, NO_MATCH, IGNORE))
    np.testing.assert_array_equal(away.labels[1], plain.labels[1])
    for pair in (same, away):
        np.testing.assert_allclose(pair.image1, plain.image1, atol=1e-4)


def test_keys_differ_between_pairs_steps_and_seeds():
    keys = [jax.random.key_data(pair_keys(seed, step, (8,))) for seed in (0, 1) for step in (0, 1, 2)]
    assert len({tuple(k) for k in np.concatenate(keys).tolist()}) == 2 * 3 * 8


def test_module_2s_views_are_of_the_prints_in_their_order(ridges_and_background):
    """The second pair's prints differ; upright and uncorrupted views equal `take_view` of each."""
    image0, mask0, image1, mask1 = quickly(lambda b: plain_views(b, SMOKE))(ridges_and_background)
    np.testing.assert_array_equal(image0[0], image1[0])
    assert np.abs(image0[1] - image1[1]).mean() > 0.1
    canvas, mask = ridges_and_background["canvas1"][1], ridges_and_background["mask1"][1]
    expected = take_view(jnp.asarray(canvas), jnp.asarray(mask), plain_view(SMOKE), SMOKE)
    np.testing.assert_allclose(image1[1], expected[0], atol=1e-5)
    np.testing.assert_array_equal(mask1[1], expected[1])
    shapes = jax.eval_shape(lambda b: match_views(pair_keys(0, 0, (2,)), b, SMOKE), ridges_and_background)
    assert [s.shape for s in shapes] == [(2, 64, 64)] * 4
