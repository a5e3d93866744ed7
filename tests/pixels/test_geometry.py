"""Similarities, robust fits, sampling and blurring against hand calculation and plain numpy."""

import jax
import numpy as np
import pytest

from ifvit.pixels import geometry
from ifvit.pixels.geometry import cell_centres, grid_points

apply_similarity, invert_similarity, fit_similarity, sample = (
    jax.jit(f)
    for f in (geometry.apply_similarity, geometry.invert_similarity, geometry.fit_similarity, geometry.sample)
)
robust_similarity = jax.jit(geometry.robust_similarity, static_argnums=(3, 4))
blur = jax.jit(geometry.blur, static_argnums=1)
local_normalise = jax.jit(geometry.local_normalise, static_argnums=2)
ridge_overlap = jax.jit(geometry.ridge_overlap, static_argnums=3)

SAMPLES, RADIUS = 256, 10.0


def similarity(scale, degrees, u, v):
    return np.array([scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees)), u, v])


def moved(t, p):
    """Complex numbers turn, scale and shift the plane: z → (a + ib) z + (u + iv)."""
    z = (t[0] + 1j * t[1]) * (p[..., 0] + 1j * p[..., 1]) + (t[2] + 1j * t[3])
    return np.stack([z.real, z.imag], axis=-1)


T = similarity(1.1, 30, 20, -7)


@pytest.fixture(scope="module")
def points():
    return np.random.default_rng(0).uniform(0, 160, (60, 2))


# --- similarities ---------------------------------------------------------------------------------


def test_a_similarity_turns_scales_and_shifts(points):
    np.testing.assert_allclose(apply_similarity(T, points), moved(T, points), atol=1e-4)
    quarter_turn = similarity(2, 90, 1, 0)
    np.testing.assert_allclose(apply_similarity(quarter_turn, np.array([[3.0, 1.0]])), [[-1, 6]], atol=1e-5)


def test_the_inverse_takes_points_back(points):
    there = moved(T, points)
    np.testing.assert_allclose(apply_similarity(invert_similarity(T), there), points, atol=1e-3)
    batch = np.stack([T, similarity(0.9, -120, 3, 4)])
    np.testing.assert_allclose(invert_similarity(batch)[1], invert_similarity(batch[1]), atol=1e-6)


def test_the_fit_finds_a_known_similarity(points):
    np.testing.assert_allclose(fit_similarity(points, moved(T, points), np.ones(60)), T, atol=1e-3)


def test_the_fit_is_the_least_squares_solution_with_weights(points):
    """Against numpy's solution of the linear system in (a, b, u, v)."""
    rng = np.random.default_rng(1)
    q, w = moved(T, points) + rng.normal(0, 5, (60, 2)), rng.uniform(0, 1, 60)
    x, y = points.T
    zero, one = np.zeros(60), np.ones(60)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    root = np.sqrt(np.concatenate([w, w]))
    expected = np.linalg.lstsq(rows * root[:, None], np.concatenate(q.T) * root, rcond=None)[0]
    np.testing.assert_allclose(fit_similarity(points, q, w), expected, rtol=1e-3, atol=1e-3)


def test_points_in_one_place_give_a_translation():
    p, q = np.full((60, 2), 5.0), np.full((60, 2), [7.0, 1.0])
    np.testing.assert_allclose(fit_similarity(p, q, np.ones(60)), [1, 0, 2, -4], atol=1e-4)


# --- RANSAC ---------------------------------------------------------------------------------------


def fit_one(p, q, valid=None):
    valid = np.ones(len(p), bool) if valid is None else valid
    fit = robust_similarity(p[None], q[None], valid[None], SAMPLES, RADIUS)
    return jax.tree.map(lambda x: np.asarray(x)[0], fit)


def test_ransac_finds_the_similarity_that_40_percent_of_the_matches_agree_on(points):
    rng = np.random.default_rng(2)
    true = np.arange(60) % 5 < 2  # 24 of 60
    q = np.where(true[:, None], moved(T, points) + rng.normal(0, 1, (60, 2)), rng.uniform(-40, 200, (60, 2)))
    fit = fit_one(points, q)
    assert np.abs(moved(fit.similarity, points) - moved(T, points)).max() < 2.5
    assert fit.inliers[true].all() and fit.count == fit.inliers.sum()
    residual = np.linalg.norm(moved(fit.similarity, points) - q, axis=1)
    np.testing.assert_array_equal(fit.inliers, residual < RADIUS)


def test_the_consensus_is_fitted_and_not_the_two_points_that_found_it():
    """Matches of whole cells of 8 px, as many wrong: 60 with errors of 2.3 px a coordinate fit to within 2.5 px."""
    rng = np.random.default_rng(6)
    corners = np.array([[20.0, 20], [108, 20], [20, 108], [108, 108]])
    poses = [similarity(1, d, 20, -30) for d in np.linspace(-60, 60, 12)]

    def cells(p):
        return np.round((p - 3.5) / 8) * 8 + 3.5

    p = cells(rng.uniform(0, 128, (12, 120, 2)))
    q = cells(
        np.stack(
            [
                np.where(np.arange(120)[:, None] < 60, moved(t, x), rng.uniform(0, 128, (120, 2)))
                for t, x in zip(poses, p)
            ]
        )
    )
    fits = np.asarray(robust_similarity(p, q, np.ones((12, 120), bool), SAMPLES, RADIUS).similarity)
    errors = [np.linalg.norm(moved(f, corners) - moved(t, corners), axis=1).max() for f, t in zip(fits, poses)]
    assert np.median(errors) < 1.2 and max(errors) < 2.5


def test_mistake_11_the_largest_consensus_wins_and_not_the_first_valid_one(points):
    """The first 20 matches agree on one similarity, the other 40 on another."""
    other = similarity(1, -80, 90, 60)
    q = np.concatenate([moved(other, points[:20]), moved(T, points[20:])])
    fit = fit_one(points, q)
    np.testing.assert_allclose(fit.similarity, T, atol=0.02)
    assert fit.inliers[20:].all() and fit.count >= 40


def test_matches_that_are_not_valid_have_no_say(points):
    q = np.concatenate([moved(T, points[:20]), moved(similarity(1, -80, 90, 60), points[20:])])
    fit = fit_one(points, q, np.arange(60) < 20)
    np.testing.assert_allclose(fit.similarity, T, atol=0.02)
    assert fit.count == 20 and not fit.inliers[20:].any()


def test_a_change_of_scale_that_no_skin_makes_is_no_fit(points):
    fit = fit_one(points, moved(similarity(1.5, 10, 0, 0), points))
    assert np.hypot(*fit.similarity[:2]) < 1.25 and fit.count < 30


@pytest.mark.parametrize("valid", [0, 1])
def test_too_few_matches_give_the_identity(points, valid):
    fit = fit_one(points, moved(T, points), np.arange(60) < valid)
    np.testing.assert_array_equal(fit.similarity, [1, 0, 0, 0])
    assert fit.count == 0


def test_the_pairs_of_a_batch_are_fitted_apart(points):
    q = np.stack([moved(T, points), moved(similarity(0.9, 170, 100, 100), points)])
    fit = robust_similarity(np.stack([points, points]), q, np.ones((2, 60), bool), SAMPLES, RADIUS)
    np.testing.assert_allclose(fit.similarity, [T, similarity(0.9, 170, 100, 100)], atol=0.02)


# --- grids and sampling ---------------------------------------------------------------------------


def test_grid_points_and_cell_centres_are_x_y_row_by_row():
    np.testing.assert_array_equal(grid_points(2), [[0, 0], [1, 0], [0, 1], [1, 1]])
    np.testing.assert_array_equal(cell_centres(16, 8), [[3.5, 3.5], [11.5, 3.5], [3.5, 11.5], [11.5, 11.5]])


def test_sampling_is_bilinear_between_pixel_centres_and_fills_outside():
    image = np.array([[0.0, 2.0, 4.0], [10.0, 12.0, 14.0]])
    at = np.array([[1, 1], [0.5, 0], [0, 0.5], [0.5, 0.5], [2, 0], [-3, 0], [0, 9]])
    expected = [12, 1, 5, 6, 4, 7, 7]
    np.testing.assert_allclose(sample(image, at, 7.0), expected, atol=1e-5)


# --- blurring and normalising ---------------------------------------------------------------------


def test_the_blur_is_a_gaussian_convolution_with_zero_outside():
    rng = np.random.default_rng(3)
    image = rng.normal(size=(24, 30))
    k = np.exp(-0.5 * (np.arange(-15, 16) / 1.5) ** 2)
    k /= k.sum()
    expected = np.apply_along_axis(lambda r: np.convolve(r, k)[15:-15], 0, image)
    expected = np.apply_along_axis(lambda r: np.convolve(r, k)[15:-15], 1, expected)
    np.testing.assert_allclose(blur(image, 1.5), expected, atol=1e-5)


def test_the_blur_of_a_constant_is_that_constant_in_the_interior():
    out = blur(np.full((2, 40, 40), 3.0), 2.0)
    np.testing.assert_allclose(out[:, 10:-10, 10:-10], 3.0, rtol=1e-4)
    np.testing.assert_allclose(out[:, 20, 0], 1.5, atol=0.4)  # half of the window lies outside


def test_local_normalisation_by_its_definition():
    rng = np.random.default_rng(4)
    image, mask = rng.normal(0.5, 0.2, (32, 32)), np.zeros((32, 32), bool)
    mask[4:28, 6:30] = True
    y, x = np.mgrid[:32, :32]
    dev, centred = np.zeros((32, 32)), np.zeros((32, 32))

    def window(r, c):
        return np.exp(-((y - r) ** 2 + (x - c) ** 2) / (2 * 3.0**2)) * mask

    for r, c in np.argwhere(mask):
        centred[r, c] = image[r, c] - (window(r, c) * image).sum() / window(r, c).sum()
    for r, c in np.argwhere(mask):
        dev[r, c] = np.sqrt((window(r, c) * centred**2).sum() / window(r, c).sum())
    expected = np.clip(np.where(mask, centred / np.maximum(dev, 1e-9), 0), -3, 3)
    np.testing.assert_allclose(local_normalise(image, mask, 3.0), expected, atol=0.02)


def test_mistake_8_a_normalised_print_is_exactly_zero_outside_its_mask():
    rng = np.random.default_rng(5)
    image, mask = rng.random((32, 32)), np.hypot(*(np.mgrid[:32, :32] - 15.5)) < 12
    for background in (0.0, 1.0):
        out = np.asarray(local_normalise(np.where(mask, image, background), mask, 3.0))
        assert (out[~mask] == 0).all()
        np.testing.assert_array_equal(out, local_normalise(np.where(mask, image, 0.5), mask, 3.0))


def test_brightness_and_contrast_of_a_print_do_not_matter_and_blank_skin_stays_blank():
    y, x = np.mgrid[:48, :48]
    image, mask = np.sin(x * 2 * np.pi / 6), np.ones((48, 48), bool)
    image[:, 30:] = 0.001 * image[:, 30:]
    out = np.asarray(local_normalise(image, mask, 4.0))
    np.testing.assert_allclose(local_normalise(0.3 * image + 0.6, mask, 4.0), out, atol=0.1)
    assert np.abs(out[:, 44:]).max() < 0.1 < 1 < np.abs(out[:, 5:25]).max()


# --- overlap --------------------------------------------------------------------------------------


def test_the_overlap_is_where_both_prints_have_ridges():
    y, x = np.mgrid[:64, :64]
    ridges = np.sin(x * 2 * np.pi / 6)
    image0, image1 = np.where(x < 44, ridges, 0.0), np.where(x > 20, ridges, 0.0)
    overlap = np.asarray(ridge_overlap(image0, image1, np.ones((64, 64), bool), 2.0))
    assert overlap[8:56, 25:40].all() and not overlap[:, :14].any() and not overlap[:, 50:].any()
    hidden = x + y < 60
    assert not np.asarray(ridge_overlap(image0, image1, ~hidden, 2.0))[hidden].any()


def test_the_frame_of_a_bright_picture_is_no_ridge():
    y, x = np.mgrid[:64, :64]
    middle = np.hypot(y - 31.5, x - 31.5) < 18
    image = np.where(middle, 0.5 + 0.5 * np.sin(x * 2 * np.pi / 6), 1.0)
    overlap = np.asarray(ridge_overlap(image, image, np.ones((64, 64), bool), 2.0))
    assert overlap[26:38, 26:38].all() and not overlap[:3].any() and not overlap[:, -3:].any()
