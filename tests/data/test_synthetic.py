"""The synthetic generator: same bits for the same numbers, and skin-like where it matters."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from ifvit.data import synthetic

SEED = 11
FINGERS = range(1, 6)


@pytest.fixture(scope="module")
def masters():
    return {finger: synthetic.master_finger(SEED, finger) for finger in FINGERS}


def minutiae(master) -> int:
    """Singularities of the ridge phase: a ridge ends or forks exactly where the phase winds."""
    wave = ndimage.gaussian_filter(master.ridges, 1.2)
    dy, dx = np.gradient(wave)
    along = np.exp(1j * master.orientation)
    across = (-along.imag * dx + along.real * dy) * master.period / (2 * np.pi)
    corners = (slice(-1), slice(-1)), (slice(-1), slice(1, None))
    corners += (slice(1, None), slice(1, None)), (slice(1, None), slice(-1))
    phase, side = wave + 1j * across, along[corners[0]].conj()
    # Orientation has no sign, so neither has the phase: take the first corner's.
    ring = [np.where((side * along[c]).real < 0, phase[c].conj(), phase[c]) for c in corners]
    turns = sum(np.angle(b * a.conj()) for a, b in zip(ring, ring[1:] + ring[:1])) / (2 * np.pi)
    inner = ndimage.binary_erosion(master.mask, iterations=12)[1:, 1:]
    return int((np.abs(np.round(turns)) * inner).sum())


@pytest.mark.run
def test_same_numbers_give_the_same_bits_in_any_order(masters):
    for finger in (2, 1):
        again = synthetic.master_finger(SEED, finger)
        for name in ("ridges", "mask", "orientation", "period", "relief", "pores"):
            assert np.array_equal(getattr(again, name), getattr(masters[finger], name)), name
        forward = [synthetic.impression(again, SEED, finger, i) for i in (1, 2, 3)]
        backward = [synthetic.impression(again, SEED, finger, i) for i in (3, 2, 1)][::-1]
        assert all(np.array_equal(a, b) for a, b in zip(forward, backward))


def test_seed_finger_and_impression_all_change_the_picture(masters):
    def bits(seed, finger, impression):
        return synthetic.impression(masters[1], seed, finger, impression).tobytes()

    keys = [(SEED, 1, 1), (SEED, 1, 2), (SEED, 2, 1), (SEED + 1, 1, 1)]
    assert len({bits(*key) for key in keys}) == len(keys)
    ridges = [masters[finger].ridges for finger in FINGERS]
    for i, a in enumerate(ridges):
        for b in ridges[:i]:
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1


def test_shapes_and_ranges(masters):
    for finger, master in masters.items():
        assert master.pattern in synthetic.PATTERNS
        assert master.mask.dtype == bool
        for field in (master.ridges, master.orientation, master.period):
            assert field.shape == master.mask.shape and field.dtype == np.float32
        assert master.ridges.min() >= -1 and master.ridges.max() <= 1
        for i in range(1, 4):
            picture = synthetic.impression(master, SEED, finger, i)
            assert picture.dtype == np.uint8 and max(picture.shape) <= 512
            at = synthetic.true_map(SEED, finger, i)
            assert at.shape == (*picture.shape, 2) and at.dtype == np.float32


def test_true_map_finds_the_ridges_of_the_impression(masters):
    kept = []
    for finger, master in masters.items():
        for i in range(1, 9):
            dark = -synthetic.impression(master, SEED, finger, i).astype(np.float64)
            at = synthetic.true_map(SEED, finger, i)
            order = [at[..., 1], at[..., 0]]
            ridges = ndimage.map_coordinates(master.ridges, order, order=1)
            detail = ndimage.gaussian_filter(dark, 1) - ndimage.gaussian_filter(dark, 8)
            strength = np.sqrt(ndimage.gaussian_filter(detail**2, 12))
            touched = strength > 0.5 * strength.max()  # the contact shows itself
            here = np.corrcoef(ridges[touched], detail[touched])[0, 1]
            moved = np.corrcoef(np.roll(ridges, 5, (0, 1))[touched], detail[touched])[0, 1]
            assert here > 0.3 and here > moved + 0.3, (finger, i)
            kept.append(here)
    assert np.median(kept) > 0.6


def test_ridge_period_is_that_of_skin(masters):
    for finger, master in masters.items():
        picture = synthetic.impression(master, SEED, finger, 1).astype(np.float64)
        size = 128
        top, left = ((n - size) // 2 for n in picture.shape)
        window = np.hanning(size)
        tile = picture[top : top + size, left : left + size]
        power = np.abs(np.fft.fft2((tile - tile.mean()) * np.outer(window, window))) ** 2
        radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(size)] * 2))
        band = (radius > 1 / 20) & (radius < 1 / 4)
        period = power[band].sum() / (power * radius)[band].sum()
        assert 6.5 < period < 12, (finger, period)
        assert 6.5 < np.median(master.period) < 12


def test_patterns_come_in_their_natural_frequencies():
    drawn = [synthetic.pattern(SEED, finger) for finger in range(2000)]
    for name, share in synthetic.PATTERNS.items():
        spread = np.sqrt(share * (1 - share) / len(drawn))
        assert abs(drawn.count(name) / len(drawn) - share) < 4 * spread, name


def test_minutiae_arise(masters):
    counts = [minutiae(master) for master in masters.values()]
    assert all(30 < count < 160 for count in counts), counts


@pytest.mark.run
@pytest.mark.parametrize("workers", [1, 2])
def test_prints_writes_what_impression_gives_and_reuses_it(tmp_path, masters, workers):
    paths = synthetic.prints(SEED, 2, 2, tmp_path, workers)
    folder = tmp_path / f"synthetic_v{synthetic.VERSION}_{SEED}"
    assert paths == [folder / f"{f}_{i}.png" for f in (1, 2) for i in (1, 2)]
    assert sorted(folder.iterdir()) == sorted(paths)
    for path in paths:
        finger, i = map(int, path.stem.split("_"))
        assert synthetic.numbers(path) == (SEED, finger, i)
        with Image.open(path) as picture:
            expected = synthetic.impression(masters[finger], SEED, finger, i)
            assert np.array_equal(np.asarray(picture), expected)
    stamp = paths[0].stat().st_mtime_ns
    paths[-1].unlink()
    assert synthetic.prints(SEED, 2, 2, tmp_path, 1) == paths
    assert paths[0].stat().st_mtime_ns == stamp and paths[-1].exists()
