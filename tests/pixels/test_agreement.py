"""Ridges say which of the candidate similarities is right, how the skin has stretched, and whether it is one finger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.config import PRESETS, DenseConfig
from ifvit.models.networks import Network
from ifvit.pixels import agreement
from ifvit.pixels.agreement import (
    CELL,
    at_ppi,
    check,
    checked_config,
    confidence,
    correlation,
    dense_field,
    from_residuals,
    refitted,
    registered,
    same_ridges,
    window_sums,
)
from ifvit.pixels.geometry import cell_centres, robust_modes, robust_similarity
from ifvit.pixels.registration import checked_registration

SIZE, PERIOD = 160, 6.3  # px at CHECK_PPI
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float64)
DISC = np.hypot(X - 80, Y - 80) < 72


def phase(finger, x, y, period=PERIOD, size=SIZE):
    """Of a drawn finger's ridges: an arch, and a spiral about each of 14 minutiae (Larkin & Fletcher 2007)."""
    rng = np.random.default_rng(finger)
    s = size / SIZE
    turn, bow = rng.uniform(0, np.pi), rng.uniform(-1, 1) / (160 * s)
    u, v = (
        np.cos(turn) * (x - size / 2) + np.sin(turn) * (y - size / 2),
        np.cos(turn) * (y - size / 2) - np.sin(turn) * (x - size / 2),
    )
    found = 2 * np.pi * (v + bow * u**2) / period
    for px, py, sign in zip(*rng.uniform(0.15 * size, 0.85 * size, (2, 14)), rng.choice([-1, 1], 14)):
        found += sign * np.arctan2(y - py, x - px)
    return found


def ridges(finger, x=X, y=Y):
    """As normalised prints have them: mean 0, variance 1."""
    return (np.sqrt(2) * np.cos(phase(finger, x, y))).astype(np.float32)


def moved(t, x, y):
    a, b, u, v = t
    return a * x - b * y + u, b * x + a * y + v


def inverse(t):
    a, b, u, v = t
    n = a * a + b * b
    return a / n, -b / n, -(a * u + b * v) / n, -(a * v - b * u) / n


POSE = (np.cos(0.4) * 1.05, np.sin(0.4) * 1.05, 22.0, -38.0)
BEND = np.stack([1.6 * np.sin(Y / 25), 1.3 * np.cos(X / 30)], -1)  # px, what skin does; half a period is 3.15


def impression(finger, pose=POSE, bend=BEND):
    """The finger as print 1 shows it: its content at q is what print 0 has at pose⁻¹(q + bend(q))."""
    return ridges(finger, *moved(inverse(pose), X + bend[..., 0], Y + bend[..., 1]))


NONE = np.zeros((SIZE // CELL - 1, SIZE // CELL - 1, 2), np.float32)  # no deformation
run = jax.jit(jax.vmap(check))


def checked(image0, image1, poses=(POSE,), mask0=DISC, mask1=DISC, possible=None):
    """One pair, prints cut out by their masks."""
    possible = np.ones(len(poses), bool) if possible is None else np.asarray(possible)
    pair = (
        image0 * mask0,
        mask0,
        image1 * mask1,
        mask1,
        np.asarray(poses, np.float32),
        possible,
        np.stack([NONE] * len(poses)),
    )
    return jax.tree.map(lambda x: np.asarray(x)[0], run(*(jnp.asarray(v)[None] for v in pair)))


@pytest.fixture(scope="module")
def genuine():
    wrong = (POSE[0], POSE[1], POSE[2] + 25, POSE[3] - 9), (1.0, 0.0, 0.0, 0.0)
    return checked(ridges(1), impression(1), (wrong[0], POSE, wrong[1]))


@pytest.mark.run
def test_the_candidate_whose_ridges_agree_wins(genuine):
    assert genuine.chosen == 1 and genuine.score > 0.7


def test_a_known_deformation_is_found_to_within_a_pixel_across_the_ridges(genuine):
    """Along a ridge nothing tells how far skin was stretched: the phase counts, a period of 6.3 px a turn."""
    field = np.asarray(dense_field(jnp.asarray(genuine.field), np.arange(SIZE)))
    x, y = moved(inverse(POSE), X + field[..., 0], Y + field[..., 1])
    off = phase(1, x, y) - phase(1, *moved(inverse(POSE), X + BEND[..., 0], Y + BEND[..., 1]))
    off = np.abs((off + np.pi) % (2 * np.pi) - np.pi) * PERIOD / (2 * np.pi)
    inside = DISC & (np.hypot(x - 80, y - 80) < 68) & (np.hypot(X - 80, Y - 80) < 68)
    assert np.median(off[inside]) < 0.35 and np.percentile(off[inside], 90) < 1.0
    assert genuine.score > genuine.before + 0.1


def started(p, q, inliers, valid=None):
    valid = np.ones(len(q), bool) if valid is None else valid
    p, q = (jnp.asarray(v, jnp.float32) for v in (p, q))
    found = from_residuals(jnp.array([1.0, 0, 0, 0]), p, q, jnp.asarray(inliers), jnp.asarray(valid), 19, 8.0)
    return [np.asarray(v) for v in found]


def test_matches_off_their_similarity_by_one_vector_start_from_a_deformation_by_that():
    """Far from all of them it fades: as if two matches more had no residual."""
    q = np.random.default_rng(0).uniform(0, 60, (40, 2))
    start, support = started(q + (3.0, -1.0), q, np.ones(40, bool))
    np.testing.assert_allclose(start[3, 3], (3, -1), rtol=0.2)
    assert np.abs(start[18, 18]).max() < 0.05
    assert support.mean() > 0.9


def test_the_similarity_is_fitted_to_where_prints_lie_and_none_moves():
    """A deformation that is a shift of 3 px becomes the similarity's, and the rest is what it was."""
    field = (np.random.default_rng(0).normal(0, 0.1, (19, 19, 2)) + (3.0, -1.0)).astype(np.float32)
    t, found = refitted(jnp.asarray(POSE, jnp.float32), jnp.asarray(field), jnp.ones((19, 19)))
    c = np.arange(1, 20) * CELL - 0.5
    q = np.moveaxis(np.stack(np.meshgrid(c, c), -1), -1, 0)
    before, after = ((q + np.moveaxis(np.asarray(f), -1, 0)) for f in (field, found))
    np.testing.assert_allclose(moved(inverse(np.asarray(t)), *after), moved(inverse(POSE), *before), atol=1e-2)
    np.testing.assert_allclose(t, (*POSE[:2], POSE[2] - 3.0, POSE[3] + 1.0), atol=0.3)
    assert np.abs(np.asarray(found)).max() < 0.6
    unseen = refitted(jnp.asarray(POSE, jnp.float32), jnp.asarray(field), jnp.zeros((19, 19)))
    np.testing.assert_allclose(unseen[0], POSE, rtol=1e-6)


def test_a_deformation_grows_to_where_the_similarity_has_no_inliers():
    """Skin that is stretched more and more: near one side the matches are inliers, at the other 16 px off."""
    rng = np.random.default_rng(0)
    q = rng.uniform(0, SIZE, (250, 2))
    stretched = q + np.stack([q[:, 0] / 10, 0 * q[:, 0]], 1)
    inliers = q[:, 0] < 80
    wild = rng.random(250) < 0.2
    p = np.where(wild[:, None], rng.uniform(0, SIZE, (250, 2)), stretched)
    start, support = started(p, q, inliers & ~wild)
    np.testing.assert_allclose(start[9, 16], (13.6, 0), atol=2.5)  # where q is (135.5, 79.5)
    assert support[~wild].mean() > 0.8 and support[wild].mean() < 0.1
    _, unseen = started(p, q, inliers & ~wild, valid=q[:, 0] < 80)
    assert not unseen[q[:, 0] >= 80].any()


def test_a_deformation_that_betters_nothing_is_left_out():
    same = checked(ridges(1), impression(1, bend=0 * BEND))
    assert same.score == same.before > 0.8
    assert not same.field.any()


@pytest.mark.run
@pytest.mark.parametrize("other", range(2, 8))
def test_ridges_of_another_finger_agree_in_nothing(genuine, other):
    assert checked(ridges(1), impression(other), (POSE, (1.0, 0, 0, 0))).score < 0.25 * genuine.score


def test_a_shift_by_one_ridge_is_not_taken_for_the_truth():
    """Straight ridges one period off agree all the same; minutiae do not, and the right candidate has them."""
    off = [(POSE[0], POSE[1], POSE[2] + dx, POSE[3] + dy) for dx, dy in ((0, PERIOD), (PERIOD, 0))]
    assert checked(ridges(3), impression(3), (*off, POSE)).chosen == 2


def test_twice_the_area_is_no_higher_score():
    whole = checked(ridges(1), impression(1))
    half = checked(ridges(1), impression(1), mask1=DISC & (X + Y < 160))
    assert 0.4 < half.windows / whole.windows < 0.6
    assert whole.score - half.score < 0.1


def test_a_few_windows_that_agree_are_no_high_score():
    """A scrap of skin agrees with much by chance: twenty windows of 2.5 ridges reach less than half of the score."""
    scrap = checked(ridges(1), impression(1), mask1=np.hypot(X - 80, Y - 80) < 20)
    assert 5 < scrap.windows < 25 and scrap.score < 0.5


def test_prints_that_do_not_overlap_have_the_score_zero():
    apart = checked(ridges(1), ridges(1), ((1.0, 0.0, 150.0, 0.0),))
    assert apart.score == 0 and apart.overlap < 0.02 and apart.windows == 0


def test_without_a_candidate_nothing_overlaps():
    none = checked(ridges(1), ridges(1), ((1.0, 0.0, 0.0, 0.0),), possible=[False])
    assert none.score == none.overlap == none.windows == 0


def test_the_overlap_is_the_share_of_the_smaller_print_that_the_other_covers():
    half = checked(ridges(1), ridges(1), ((1.0, 0.0, 0.0, 0.0),), mask0=DISC & (X < 120), mask1=DISC & (X >= 40))
    both = (DISC & (X >= 40) & (X < 120)).sum()
    assert half.overlap == pytest.approx(both / (DISC & (X < 120)).sum(), abs=0.03)


@pytest.mark.run
def test_a_pair_does_not_depend_on_its_neighbours_in_the_batch():
    pairs = [(ridges(1), impression(1)), (ridges(2), impression(5)), (np.zeros_like(DISC, np.float32), impression(4))]
    batch = [jnp.stack(x) for x in zip(*pairs)]
    poses, possible = jnp.tile(jnp.asarray(POSE), (3, 1, 1)), jnp.ones((3, 1), bool)
    starts = jnp.zeros((3, 1, *NONE.shape))
    masks = jnp.stack([DISC] * 3)
    together = run(batch[0], masks, batch[1], masks, poses, possible, starts)
    for n, (a, b) in enumerate(pairs):
        alone = run(*(jnp.asarray(v)[:1] for v in (a[None], masks, b[None], masks, poses, possible, starts)))
        for x, y in zip(together, alone):
            np.testing.assert_allclose(x[n], y[0], atol=1e-5)


# --- the score, and what follows from it ----------------------------------------------------------


def test_the_score_is_a_correlation_times_the_root_of_the_matches_an_area():
    """(0.8, 45 matches on 160 + 20 windows) at 350 ppi: 0.8 √(45 / 180) = 0.4. A cell at 175 ppi has 4 such areas."""
    score = same_ridges(jnp.full(3, 0.8), jnp.array([45, 0, 400]), jnp.full(3, 160), 350.0)
    np.testing.assert_allclose(score, [0.4, 0, 0.8], rtol=1e-6)
    np.testing.assert_allclose(
        same_ridges(jnp.array([0.8]), jnp.array([10]), jnp.array([140]), 175.0), [0.4], rtol=1e-6
    )


def test_twice_the_area_with_twice_the_matches_is_hardly_another_score():
    small, large = same_ridges(jnp.full(2, 0.8), jnp.array([100, 200]), jnp.array([200, 400]), 350.0)
    assert small < large < 1.05 * small


def test_the_confidence_rises_with_the_score_and_is_low_where_nothing_agrees():
    score = jnp.array([0.0, 0.02, 0.04, 0.2, 0.4])
    sure = np.asarray(confidence(score, jnp.full(5, 0.8)))
    assert (np.diff(sure) > 0).all() and sure[0] < 0.05 and sure[1] < 0.5 and sure[3] > 0.9
    assert registered(score).tolist() == [False, False, False, True, True]


# --- its parts ------------------------------------------------------------------------------------


def test_the_correlation_of_a_window_is_pearsons_of_its_pixels():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 24, 24)).astype(np.float32)
    a, b, ones = jnp.asarray(a), jnp.asarray(b), jnp.ones((24, 24))
    found = correlation(a, b, ones)
    window = np.s_[8:24, 0:16]  # the second row of windows, the first column
    assert found.shape == (2, 2)
    assert found[1, 0] == pytest.approx(np.corrcoef(np.ravel(a[window]), np.ravel(b[window]))[0, 1], abs=0.02)
    assert np.abs(correlation(a, 0 * b, ones)).max() == 0


def test_a_window_is_four_cells():
    np.testing.assert_array_equal(window_sums(jnp.ones((3 * CELL, 3 * CELL))), np.full((2, 2), 4 * CELL**2))


def test_a_similarity_is_told_in_the_window_of_another_resolution():
    """128 px at 200 ppi are 224 px at 350: pixel 0 begins at −½ in both, so 10 lies at 1.75 · 10.5 − 0.5 = 17.875."""
    a = DenseConfig(**PRESETS["smoke"][0]).replace(image_size=128, canvas_size=512)
    b = checked_config(a)
    assert (b.input_ppi, b.image_size) == (350.0, 224)
    turned = jnp.array([0.9, 0.3, 5.0, -7.0])
    there = moved(np.asarray(at_ppi(turned, a, b), np.float64), 17.875, 1.75 * 20.5 - 0.5)
    x, y = moved(np.asarray(turned, np.float64), 10.0, 20.0)
    np.testing.assert_allclose(there, (1.75 * (x + 0.5) - 0.5, 1.75 * (y + 0.5) - 0.5), atol=1e-3)


@pytest.mark.run
def test_the_best_mode_is_the_robust_fit_and_the_next_one_is_what_others_agree_on():
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 200, (60, 2)).astype(np.float32)
    q = p + [30, 0]
    q[40:55] = p[40:55] + [-20, 15]
    q[55:] = rng.uniform(0, 200, (5, 2))
    args = (jnp.asarray(p[None]), jnp.asarray(q[None], jnp.float32), jnp.ones((1, 60), bool), 128, 5.0)
    best, modes = robust_similarity(*args), robust_modes(*args, 3, 6.0)
    np.testing.assert_allclose(modes.similarity[:, 0], best.similarity, atol=1e-4)
    np.testing.assert_allclose(modes.similarity[0, :2], [[1, 0, 30, 0], [1, 0, -20, 15]], atol=0.3)
    assert modes.count[0, 0] == best.count[0] >= 40 and modes.count[0, 1] >= 15 and modes.count[0, 2] < 6


# --- with Module 1 --------------------------------------------------------------------------------


def drawn_canvas(finger, pose=None):
    """A canvas of 256 px at 500 ppi: the finger in a disc, dark ridges 9 px apart, turned by `pose` (in its px)."""
    y, x = np.mgrid[:256, :256].astype(np.float64)
    inside = np.hypot(x - 128, y - 128) < 110
    at = (x, y) if pose is None else moved(inverse(pose), x, y)
    grey = np.where(inside, 128 + 90 * np.cos(phase(finger, *at, period=9.0, size=256)), 230)
    return grey.astype(np.uint8), inside[4::8, 4::8]


def knows(similarity, config, wrong=0.0):
    """Log confidences of a network that matches cells as the similarity (window px) does, but for a share at random."""
    side = config.image_size // 8
    centres = np.asarray(cell_centres(config.image_size, 8), np.float64)
    cell = np.round((np.stack(moved(similarity, *centres.T), -1) - 3.5) / 8).astype(int)
    inside = ((cell >= 0) & (cell < side)).all(1)
    log_conf = np.full((1, side**2, side**2), -12.0, np.float32)
    rng = np.random.default_rng(0)
    for i in np.flatnonzero(inside):
        right = rng.random() >= wrong
        log_conf[0, i, cell[i, 1] * side + cell[i, 0] if right else rng.integers(side**2)] = np.log(0.8)
    return jnp.asarray(log_conf)


SMOKE = DenseConfig(**PRESETS["smoke"][0])
CONFIGS = {200: SMOKE.replace(image_size=104), 350: SMOKE.replace(input_ppi=350.0, image_size=176)}
KNOWING = Network(lambda _: ({}, {}), lambda params, *_, **__: (params["log_conf"], None))


@pytest.mark.run
@pytest.mark.parametrize("ppi", CONFIGS)
def test_a_registration_is_told_from_a_false_one_at_either_resolution(ppi):
    """Turned by 15°: the matches are the same for both pairs, and the ridges are those of one finger in the first."""
    config, m = CONFIGS[ppi], 127.5
    a, b = np.cos(0.26), np.sin(0.26)
    pose = (a, b, m - a * m + b * m + 9.0, m - b * m - a * m - 6.0)
    ratio = ppi / 500
    w = (config.image_size - 1) / 2
    window = (a, b, w - a * w + b * w + 9.0 * ratio, w - b * w - a * w - 6.0 * ratio)
    pairs = [(*drawn_canvas(1), *drawn_canvas(other, pose)) for other in (1, 2)]
    batch = dict(zip(("canvas0", "mask0", "canvas1", "mask1"), map(jnp.stack, zip(*pairs))))
    state = ({"log_conf": jnp.repeat(knows(window, config, 0.2), 2, 0)}, {})
    found, _ = jax.jit(lambda s, b: checked_registration(KNOWING, s, b, config))(state, batch)
    assert found.registered.tolist() == [True, False]
    assert found.confidence[0] > 0.9 and found.confidence[1] < 0.5
    corners = np.array([[20.0, 20], [80, 20], [20, 80], [80, 80]]) * ratio * 2.5
    off = np.stack(moved(found.similarity[0], *corners.T), -1) - np.stack(moved(window, *corners.T), -1)
    assert np.abs(off).max() < 2.5


def test_the_threshold_is_the_higher_the_fewer_false_matches_are_asked_for():
    for rate, score in agreement.REACHED:
        assert agreement.threshold(rate) == pytest.approx(score)
    found = [agreement.threshold(rate) for rate in (0.9, 0.1, 0.01, 0.005, 0.001, 1e-4, 1e-6)]
    assert found == sorted(found) and found[0] >= 0 and found[-1] <= 1
    (a, low), (b, high), *_ = agreement.REACHED
    assert agreement.threshold((a * b) ** 0.5) == pytest.approx((low + high) / 2)
