"""Confidences become matches, matches a similarity, and print 0 comes to lie on print 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.config import PRESETS, MatchConfig
from ifvit.models.networks import Network
from ifvit.pixels.agreement import CELL, CHECK_PPI, bend, checked_config
from ifvit.pixels.alignment import align, aligned_pair, enhance
from ifvit.pixels.geometry import cell_centres, grid_points
from ifvit.pixels.registration import drawn_views, register
from ifvit.pixels.views import Views

CONFIG = MatchConfig(**PRESETS["smoke"][1]).replace(
    image_size=128, match_threshold=0.2, alignment_samples=128, alignment_matches=128, min_matches=6
)
SIDE = 16
CENTRES = np.asarray(cell_centres(128, 8), np.float64)


def quickly(f):
    """`f` compiled with little optimisation: these pictures are small."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def turned(degrees, x=0.0, y=0.0, scale=1.0):
    """A similarity (a, b, u, v) about the middle of a window of 128 px, then moved by (x, y)."""
    a, b = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    m = 63.5
    return np.array([a, b, m - a * m + b * m + x, m - b * m - a * m + y])


def moved(t, p):
    a, b, u, v = t
    return np.stack([a * p[:, 0] - b * p[:, 1] + u, b * p[:, 0] + a * p[:, 1] + v], axis=-1)


def confidences(t, wrong=0.0, confident=0.6, seed=0):
    """Log confidences of a network that knows `t`, but for a share of cells it matches at random."""
    rng = np.random.default_rng(seed)
    cell = np.round((moved(t, CENTRES) - 3.5) / 8).astype(int)
    inside = ((cell >= 0) & (cell < SIDE)).all(1)
    conf = np.full((256, 256), 1e-5)
    target = np.where(rng.random(256) < wrong, rng.integers(0, 256, 256), cell[:, 1] * SIDE + cell[:, 0])
    for i in np.flatnonzero(inside):
        conf[i, target[i]] = confident + 0.1 * rng.random()
    return np.log(conf)


@pytest.fixture(scope="module")
def registered():
    run = quickly(lambda c: register(c, 128, CONFIG))
    return lambda *pairs: jax.tree.map(np.asarray, run(np.stack(pairs).astype(np.float32)))


# --- registration ---------------------------------------------------------------------------------

POSES = [turned(0, 16, -8), turned(50, 5, 9), turned(-170, -4, 3), turned(20, 0, 0, 1.12)]


def test_a_known_pose_is_found_to_within_two_pixels_from_matches_of_whole_cells(registered):
    """Cells are 8 px: a match is off by up to 4 px, the fit over all of them is not."""
    found = registered(*(confidences(t) for t in POSES))
    corners = np.array([[0.0, 0], [127, 0], [0, 127], [127, 127]])
    for similarity, t in zip(found.similarity, POSES):
        assert np.abs(moved(similarity, corners) - moved(t, corners)).max() < 2
    assert found.aligned.all()
    np.testing.assert_array_equal(found.count, found.inliers.sum(1))


def test_mistake_11_the_radius_is_counted_in_cells_so_that_every_true_match_is_an_inlier(registered):
    """Under rotation a cell's true match is up to 4√2 px away from its place: 3 px would lose most of them."""
    found = registered(*(confidences(t) for t in POSES))
    for b, t in enumerate(POSES):
        valid = found.matches.valid[b]
        off = np.linalg.norm(moved(t, found.points0[b]) - found.points1[b], axis=1)
        assert valid.sum() > 40 and found.inliers[b][valid].all() and not found.inliers[b][~valid].any()
        if b:
            assert (off[valid] > 3).mean() > 0.3


def test_the_points_of_a_match_are_the_centres_of_its_cells(registered):
    found = registered(confidences(POSES[1]), *[confidences(POSES[0])] * 3)
    np.testing.assert_allclose(found.points0[0], CENTRES[found.matches.cell0[0]])
    np.testing.assert_allclose(found.points1[0], CENTRES[found.matches.cell1[0]])


def test_wrong_matches_do_not_move_the_fit_and_noise_alone_is_not_aligned(registered):
    sure, half_wrong = confidences(POSES[1]), confidences(POSES[1], wrong=0.6)
    unsure, blank = confidences(POSES[1], confident=0.05), np.full((256, 256), -1e9)
    found = registered(sure, half_wrong, unsure, blank)
    corners = np.array([[0.0, 0], [127, 127]])
    assert np.abs(moved(found.similarity[1], corners) - moved(POSES[1], corners)).max() < 4
    assert 20 < found.count[1] < found.count[0]
    np.testing.assert_array_equal(found.aligned, [True, True, False, False])
    np.testing.assert_array_equal(found.similarity[2:], [[1, 0, 0, 0]] * 2)  # below the threshold 0.2: no match counts
    np.testing.assert_array_equal(found.count[2:], 0)


# --- alignment ------------------------------------------------------------------------------------


def finger(points):
    """A smooth ridge pattern, dark and light around 0, at any point: what a print of it shows there."""
    x, y = points[:, 0], points[:, 1]
    return np.sin(2 * np.pi * (np.hypot(x - 150, y + 30) + 4 * np.sin(y / 25)) / 9)


@pytest.fixture(scope="module")
def aligned():
    """Print 1 shows the finger as it is; print 0 shows it such that `t` takes its pixels to print 1's."""
    t = np.stack([turned(35, 12, -6, 1.05), turned(0)])
    grid = np.asarray(grid_points(128), np.float64)
    image0 = np.stack([finger(moved(s, grid)).reshape(128, 128) for s in t])
    image1 = np.stack([finger(grid).reshape(128, 128)] * 2)
    mask0, mask1 = np.ones((2, 128, 128), bool), np.zeros((2, 128, 128), bool)
    mask1[0], mask1[1, 44:68, 40:] = True, True  # pair 1 has rows 44 … 67 and columns 60 … 83 in common
    mask0[1, :, :60], mask0[1, :, 84:] = False, False
    out = quickly(lambda *a: align(*a, CONFIG))(image0, image1, mask0, mask1, t)
    return jax.tree.map(np.asarray, out), t, mask0, mask1


def test_mistake_11_print_0_is_warped_by_the_whole_similarity_onto_print_1(aligned):
    """Turned and shifted in one: in the overlap both prints show the same ridges."""
    pair = aligned[0]
    inner = pair.overlap[0] & (np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 40)
    assert inner.sum() > 2000
    assert np.corrcoef(pair.global0[0, ..., 0][inner], pair.global1[0, ..., 0][inner])[0, 1] > 0.98
    np.testing.assert_allclose(pair.local0[1][pair.roi[1]], pair.local1[1][pair.roi[1]], atol=0.05)


def test_the_overlap_is_what_both_prints_have_in_the_frame_of_print_1(aligned):
    pair, t, mask0, mask1 = aligned
    there = moved_mask(t[0], mask0[0]) & mask1[0]
    assert (pair.overlap[0] & ~there).sum() < 30 and pair.overlap[0].sum() > 0.85 * there.sum()
    assert not pair.overlap[1][~(mask0[1] & mask1[1])].any() and pair.overlap[1][46:66, 62:82].all()


def moved_mask(t, mask):
    """Pixels of print 1 whose origin in print 0 is foreground, by complex division."""
    y, x = np.mgrid[:128, :128]
    z = ((x + 1j * y) - (t[2] + 1j * t[3])) / (t[0] + 1j * t[1])
    col, row = np.round(z.real).astype(int), np.round(z.imag).astype(int)
    inside = (col >= 0) & (col < 128) & (row >= 0) & (row < 128)
    return inside & mask[np.clip(row, 0, 127), np.clip(col, 0, 127)]


def test_both_branches_see_nothing_outside_the_overlap(aligned):
    pair = aligned[0]
    for image in (pair.global0, pair.global1):
        assert (image[..., 0][~pair.overlap] == 0).all()
    for image in (pair.local0, pair.local1):
        assert (image[..., 0][~pair.roi] == 0).all()


def test_the_region_of_interest_lies_around_the_middle_of_the_overlap(aligned):
    """Its window of 32 px starts 16 px before the overlap's centroid, to the pixel."""
    pair = aligned[0]
    assert pair.roi.shape == (2, 32, 32) and pair.local0.shape == (2, 32, 32, 1)
    row, col = np.argwhere(pair.overlap[1]).mean(0) - 16
    cuts = [pair.overlap[1][r : r + 32, c : c + 32] for r in (int(row), int(row) + 1) for c in (int(col), int(col) + 1)]
    assert any((cut == pair.roi[1]).all() for cut in cuts)
    assert 0.4 < pair.roi[1].mean() < 0.6  # 24² of 32² px


def test_the_local_branch_is_not_enhanced_and_the_global_one_is(aligned):
    """The ROI of pair 1 is cut from the prints as they are: it is not the same cut of the global image."""
    pair = aligned[0]
    y, x = (int(round(v - 16)) for v in np.argwhere(pair.overlap[1]).mean(0))
    cut = pair.global1[1, y : y + 32, x : x + 32]
    assert np.abs(cut - pair.local1[1]).max() > 0.05


def test_enhancing_passes_ridges_and_drops_pores_and_shading():
    """Gain of the difference of Gaussians at a period P: exp(−2π²s²/P²) of s = 0.15 less s = 0.5 ridges."""
    x = np.arange(96)
    gains = {}
    for name, period in (("ridge", 6), ("pores", 2), ("shading", 48)):
        wave = np.broadcast_to(np.cos(2 * np.pi * x / period), (1, 96, 96))
        gains[name] = float(np.abs(np.asarray(quickly(lambda i: enhance(i, 6.0))(wave))[0, 48, 30:66]).max())
        low, high = (np.exp(-2 * (np.pi * s * 6 / period) ** 2) for s in (0.5, 0.15))
        assert gains[name] == pytest.approx(high - low, abs=0.02)
    assert gains["ridge"] > 3 * gains["pores"] and gains["ridge"] > 3 * gains["shading"]


# --- deformation ----------------------------------------------------------------------------------

SEEN = checked_config(CONFIG)  # what deformations are told in: all of a canvas of 256 px
WINDOWS = SEEN.image_size // CELL - 1


def skin(q):
    """How far print 0 is bent at points q of the window of print 1, px: up to 5, at most a tenth a px."""
    return np.stack([5 * np.sin(q[:, 1] / 45), 4 * np.cos(q[:, 0] / 50)], axis=-1)


def told(windows=WINDOWS):
    """`skin` as a registration tells it: at the middle of so many windows a side at CHECK_PPI, in px there."""
    times = CHECK_PPI / CONFIG.input_ppi
    middles = grid_points(windows) * CELL + CELL - 0.5
    here = (middles - ((windows + 1) * CELL - 1) / 2) / times + 63.5
    return (skin(here) * times).reshape(1, windows, windows, 2).astype(np.float32)


@pytest.mark.parametrize("more", [0, 8], ids=["its own", "a wider one"])
def test_a_deformation_of_a_window_is_told_at_every_pixel_of_the_networks_window(more):
    grid = np.asarray(grid_points(128), np.float64)
    inner = (np.abs(grid - 63.5) < (SEEN.image_size / 2 - CELL) / (CHECK_PPI / CONFIG.input_ppi)).all(1)
    found = np.asarray(quickly(lambda d: bend(d, CONFIG))(told(WINDOWS + more))).reshape(-1, 2)
    np.testing.assert_allclose(found[inner], skin(grid)[inner], atol=0.06)


def test_bent_skin_comes_to_lie_in_its_place_where_the_deformation_is_heeded():
    """Print 0 shows at t⁻¹(q + skin(q)) what print 1 shows at q."""
    t = turned(20, 5, -3)
    grid = np.asarray(grid_points(128), np.float64)
    there = moved(t, grid)
    source = there
    for _ in range(20):
        source = there - skin(source)
    image0, image1 = finger(source).reshape(1, 128, 128), finger(grid).reshape(1, 128, 128)
    full = np.ones((1, 128, 128), bool)
    alike = []
    for deformed in (False, True):
        config = CONFIG.replace(deformed=deformed)
        pair = jax.tree.map(
            np.asarray,
            quickly(lambda *a, c=config: align(*a[:5], c, a[5]))(image0, image1, full, full, t[None], told()),
        )
        inner = pair.overlap[0] & (np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 40)
        alike.append(np.corrcoef(pair.global0[0, ..., 0][inner], pair.global1[0, ..., 0][inner])[0, 1])
    assert alike[0] < 0.7 and alike[1] > 0.97


def test_training_lays_bent_skin_as_the_ridges_agree_and_takes_a_pair_of_other_ridges_for_unaligned():
    """Both pairs have the same matches; print 1 of the second pair shows other ridges there."""
    log_conf = np.full((2, 256, 256), np.log(1e-5), np.float32)
    cell = np.round((CENTRES - skin(CENTRES) - 3.5) / 8).astype(int)  # about where its content lies in print 1
    for i in np.flatnonzero(((cell >= 0) & (cell < SIDE)).all(1)):
        log_conf[:, i, cell[i, 1] * SIDE + cell[i, 0]] = np.log(0.8)
    aligner = Network(lambda key: None, lambda params, stats, *_, train, method: (jnp.asarray(log_conf), {}))
    grid = np.asarray(grid_points(128), np.float64)
    image0 = np.stack([ridges(grid - skin(grid)).reshape(128, 128)] * 2)
    image1 = np.stack([ridges(grid).reshape(128, 128), ridges(grid[:, ::-1]).reshape(128, 128)])
    full, inner = np.ones((2, 128, 128), bool), np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 45

    def alike(deformed):
        config = CONFIG.replace(deformed=deformed)
        run = quickly(lambda *v: aligned_pair(aligner, ({}, {}), Views(*v), config))
        pair, sure, _ = jax.tree.map(np.asarray, run(image0, full, image1, full))
        np.testing.assert_array_equal(sure, [True, not deformed])
        return np.corrcoef(pair.global0[0, ..., 0][inner], pair.global1[0, ..., 0][inner])[0, 1]

    assert alike(False) < 0.3 and alike(True) > 0.6


def test_what_training_draws_is_enlarged_for_the_check_as_a_print_is_seen_there():
    """A window of 128 px at 200 ppi shows, enlarged, the ridges that one at CHECK_PPI has of the same spots."""
    times = CHECK_PPI / CONFIG.input_ppi
    grid = np.asarray(grid_points(128), np.float64)
    of_fine = (np.asarray(grid_points(SEEN.image_size), np.float64) - (SEEN.image_size - 1) / 2) / times + 63.5
    image, full = ridges(grid).reshape(1, 128, 128), np.ones((1, 128, 128), bool)
    found = quickly(lambda i, m: drawn_views(Views(i, m, i, m), CONFIG))(image, full)
    expected = ridges(of_fine).reshape(SEEN.image_size, -1)
    assert found["ridges_inside0"].all() and found["ridges1"].shape == (1, *expected.shape)
    inner = np.s_[20:-20, 20:-20]
    assert np.corrcoef(np.asarray(found["ridges0"][0])[inner].ravel(), expected[inner].ravel())[0, 1] > 0.95
    np.testing.assert_allclose(found["image0"], image, atol=1e-6)


def ridges(points):
    """As `finger`, as far apart as ridges are at the networks' resolution."""
    return finger(points * 9 / 3.6)


def test_the_global_branch_sees_prints_smoothed_along_their_ridges_where_that_is_asked_for():
    """Two impressions with noise of their own are more alike then than by the band-pass; the local one is as before."""
    grid = np.asarray(grid_points(128), np.float64)
    rng = np.random.default_rng(0)
    image0, image1 = (np.stack([finger(grid).reshape(128, 128)] * 2) + rng.normal(0, 0.8, (2, 128, 128)) for _ in "01")
    upright, full = np.stack([turned(0)] * 2), np.ones((2, 128, 128), bool)
    found = {}
    for oriented in (False, True):
        config = CONFIG.replace(oriented=oriented)
        run = quickly(lambda *a, c=config: align(*a, c))
        found[oriented] = jax.tree.map(np.asarray, run(image0, image1, full, full, upright))
    alike = {k: np.corrcoef(p.global0[p.overlap].ravel(), p.global1[p.overlap].ravel())[0, 1] for k, p in found.items()}
    assert alike[True] > alike[False] + 0.1
    np.testing.assert_array_equal(found[False].local0, found[True].local0)
