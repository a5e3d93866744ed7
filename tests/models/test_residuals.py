"""Templates of one print, of features by hand."""

import jax.numpy as jnp
import numpy as np

from ifvit.models.template import Template, directions, residuals, templates

MEAN = np.float32([1, 1])
CENTRES = np.float32([[1, 0], [0, 1]])


def test_a_direction_is_seen_from_the_mean():
    np.testing.assert_allclose(directions(jnp.array([[1.0, 3.0], [0.0, 1.0]]), MEAN), [[0, 1], [-1, 0]], atol=1e-6)


def test_residuals_are_what_cells_are_beyond_their_centres_by_hand():
    """Of two cells near the first centre, at ±θ from it, and one at the second: its own residual is 0."""
    theta = 0.3
    seen = np.array([[np.cos(theta), np.sin(theta)], [np.cos(theta), -np.sin(theta)], [0, 1]], np.float32)
    found = np.asarray(residuals(jnp.asarray(MEAN + 2 * seen)[None], jnp.ones((1, 3), bool), MEAN, CENTRES))[0]
    assert found[0] < 0 and abs(found[0]) > 0.9  # along the first centre: 2 (cos θ − 1)
    np.testing.assert_allclose(np.linalg.norm(found), 1, atol=1e-5)
    share = 1 / (1 + np.exp(20 * (np.sin(theta) - np.cos(theta))))  # how surely the first cell is the first centre's
    other = 1 - share
    beyond = np.array(
        [
            [(share + 1) * (np.cos(theta) - 1), (share - 1) * np.sin(theta)],
            [other * np.cos(theta), other * (np.sin(theta) - 1)],
        ]
    )
    wanted = np.sign(beyond) * np.sqrt(abs(beyond))
    np.testing.assert_allclose(found, wanted.ravel() / np.linalg.norm(wanted), atol=2e-3)


def test_where_a_cell_lies_and_what_is_background_does_not_matter():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 8, 2)).astype(np.float32)
    inside = np.array([[True] * 6 + [False] * 2])
    order = rng.permutation(8)
    found = residuals(jnp.asarray(x), jnp.asarray(inside), MEAN, CENTRES)
    other = x.copy()
    other[:, 6:] = 99
    np.testing.assert_allclose(residuals(jnp.asarray(other), jnp.asarray(inside), MEAN, CENTRES), found, atol=1e-6)
    moved = residuals(jnp.asarray(x[:, order]), jnp.asarray(inside[:, order]), MEAN, CENTRES)
    np.testing.assert_allclose(moved, found, atol=1e-5)
    assert abs(np.asarray(residuals(jnp.asarray(x), jnp.ones((1, 8), bool), MEAN, CENTRES) - found)).max() > 1e-3


def test_a_template_is_a_unit_vector_and_0_of_a_print_without_cells():
    rng = np.random.default_rng(1)
    how = Template(MEAN, CENTRES, rng.normal(size=(4, 3)).astype(np.float32), np.float32([1, 0, 0]))
    x = jnp.asarray(rng.normal(size=(2, 5, 2)), jnp.float32)
    found = templates(x, jnp.array([[True] * 5, [False] * 5]), how)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 0], atol=1e-5)
    raw = np.asarray(residuals(x, jnp.ones((2, 5), bool), MEAN, CENTRES))[0] @ how.projection + how.bias
    np.testing.assert_allclose(found[0], raw / np.linalg.norm(raw), atol=1e-4)
