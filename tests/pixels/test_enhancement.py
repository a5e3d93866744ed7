"""Smoothing along the ridges takes out what noise and gaps put in, and leaves the ridges and what ends there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifvit.pixels.enhancement import along_ridges, directions

SIZE, RIDGE = 160, 6.3
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float64)
DISC = np.hypot(X - 80, Y - 80) < 72
INNER = np.hypot(X - 80, Y - 80) < 60
smoothed = jax.jit(lambda x, m: along_ridges(x, m, RIDGE))


def stripes(degrees):
    a = np.radians(degrees)  # of the ridges
    return np.sqrt(2) * np.cos(2 * np.pi * (np.cos(a) * Y - np.sin(a) * X) / RIDGE)


def arch(minutiae=((70, 90, 1), (100, 60, -1), (50, 60, 1))):
    """Bowed ridges, of which some end."""
    phase = 2 * np.pi * (Y + (X - 80) ** 2 / 300) / RIDGE
    for x, y, sign in minutiae:
        phase += sign * np.arctan2(Y - y, X - x)
    return np.sqrt(2) * np.cos(phase)


def seen(image, mask=DISC):
    return np.asarray(smoothed(jnp.asarray(image * mask, jnp.float32)[None], jnp.asarray(mask)[None]))[0]


def alike(a, b, where=INNER):
    return np.corrcoef(a[where], b[where])[0, 1]


@pytest.mark.parametrize("degrees", [0, 17, 45, 80, 90, 91, 135, 179])
def test_the_direction_is_that_of_the_ridges(degrees):
    x, y = np.asarray(directions(jnp.asarray(stripes(degrees) * DISC, jnp.float32)[None], RIDGE))[0]
    np.testing.assert_allclose(np.hypot(x, y)[INNER], 1, atol=1e-3)
    off = (np.degrees(np.arctan2(y, x)) - degrees + 90) % 180 - 90
    assert np.abs(off[INNER]).max() < 3
    assert alike(seen(stripes(degrees)), stripes(degrees)) > 0.98


@pytest.mark.run
def test_noise_and_gaps_go_and_the_ridges_stay():
    rng, clean = np.random.default_rng(0), arch()
    noisy = clean + rng.normal(0, 1.5, clean.shape)
    dotted = np.where(rng.random((SIZE // 4, SIZE // 4)).repeat(4, 0).repeat(4, 1) < 0.5, clean, -1.0)
    for spoilt in (noisy, dotted):
        assert alike(spoilt, clean) < 0.75 and alike(seen(spoilt), clean) > 0.83
    one, other = (clean + rng.normal(0, 1.5, clean.shape) for _ in range(2))
    assert alike(one, other) < 0.5 and alike(seen(one), seen(other)) > 0.8


def test_minutiae_stay_where_they_are():
    near = np.hypot(X - 70, Y - 90) < 12
    assert alike(seen(arch()), arch(), near) > 0.8
    assert alike(seen(arch()), arch(minutiae=()), near) < 0.6  # it tells a print without them apart


def test_turned_prints_are_smoothed_alike():
    spoilt = arch() + np.random.default_rng(1).normal(0, 1, (SIZE, SIZE))
    assert alike(np.rot90(seen(spoilt)), seen(np.rot90(spoilt), np.rot90(DISC))) > 0.98


def test_outside_of_the_print_nothing_is_seen_and_blank_skin_stays_finite():
    assert not seen(arch())[~DISC].any()
    for blank in (np.zeros((SIZE, SIZE)), np.ones((SIZE, SIZE))):
        assert np.abs(seen(blank)[INNER]).max() < 0.25  # ridges have 1 and more
    assert not seen(arch(), np.zeros((SIZE, SIZE), bool)).any()


def test_a_batch_is_its_prints():
    images = np.stack([stripes(30), arch()]).astype(np.float32)
    both = np.asarray(smoothed(jnp.asarray(images), jnp.asarray(np.stack([DISC, DISC]))))
    for image, found in zip(images, both):
        alone = smoothed(jnp.asarray(image)[None], jnp.asarray(DISC)[None])
        np.testing.assert_allclose(found, np.asarray(alone)[0], atol=1e-5)
