"""Two impressions of a finger: the maps between their canvases, against the generator's own, and on their ridges."""

import itertools
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from ifvit.constants import MAP_STEP, RIDGE
from ifvit.data import synthetic
from ifvit.data.images import decode, place
from ifvit.data.impressions import Impressions, Warp, canvas_points
from ifvit.data.placement import mapped
from ifvit.data.prepare import prepare
from ifvit.data.sources import SYNTHETIC, Print
from ifvit.pixels.geometry import through_map

CANVAS = 512


@pytest.fixture(scope="module")
def print_set(generated, cache):
    prints = [Print(str(path), SYNTHETIC, str(f), str(i), 500.0) for (f, i), path in sorted(generated.items())]
    return prepare(prints, CANVAS, 0.0, cache)


@pytest.fixture(scope="module")
def pairs(print_set):
    """Every two impressions of a finger: indices, the maps, and px of canvas 0 whose skin both canvases show."""
    impressions, found = Impressions(print_set.prints, CANVAS), []
    for i, j in itertools.permutations(range(len(print_set)), 2):
        if print_set.prints[i].finger == print_set.prints[j].finger:
            maps = impressions.maps(i, j)
            y, x = np.nonzero(whole(print_set.canvas(i)[1]))
            here = np.stack([x, y], axis=1)[::53].astype(np.float32)
            there = through(maps["map01"], here)
            cell = np.clip(np.rint(there), 0, CANVAS - 1).astype(int)
            seen = whole(print_set.canvas(j)[1])[cell[:, 1], cell[:, 0]]
            found.append((i, j, maps, here[seen], there[seen]))
    assert len(found) == 6 * 3 * 2
    return found


def through(grid, xy):
    return np.asarray(through_map(jnp.asarray(grid), jnp.asarray(xy), MAP_STEP))


def whole(mask):
    """A mask at the canvas's resolution, without its rim: there a cell may lie beyond the picture."""
    return np.kron(ndimage.binary_erosion(mask), np.ones((8, 8), bool))


def skin(p: Print, xy):
    """Which px of the master finger a generated print shows at px of its canvas, by the generator."""
    picture = mapped(np.linalg.inv(place(decode(p.path)[0], 500.0, CANVAS)[2].to_canvas), xy)
    true = synthetic.true_map(*synthetic.numbers(p.path))
    return np.stack([ndimage.map_coordinates(true[..., k], picture[:, ::-1].T, order=1) for k in (0, 1)], axis=1)


@pytest.mark.slow
def test_what_a_map_joins_is_the_same_skin_within_a_px(print_set, pairs):
    off = [
        np.linalg.norm(skin(print_set.prints[i], here) - skin(print_set.prints[j], there), axis=1)
        for i, j, _, here, there in pairs
    ]
    assert all(len(distances) > 30 for distances in off)
    assert max(distances.max() for distances in off) < 1.0
    assert np.median(np.concatenate(off)) < 0.1


@pytest.mark.slow
def test_the_way_there_and_back_leads_to_where_it_began(pairs):
    for _, _, maps, here, there in pairs:
        back = through(maps["map10"], there)
        assert np.linalg.norm(back - here, axis=1).max() < 1.0


@pytest.mark.run
def test_the_ridges_of_two_impressions_agree_by_the_map_and_not_half_a_ridge_beside_it(print_set, pairs):
    """Correlation of the canvases, smoothed and their local means taken away, over the skin that both show."""

    def detail(k, xy):
        canvas = print_set.canvas(k)[0].astype(np.float32)
        ridges = ndimage.gaussian_filter(canvas, 1.5) - ndimage.gaussian_filter(canvas, RIDGE)
        return ndimage.map_coordinates(ridges, xy[:, ::-1].T, order=1)

    by_map, beside = [], []
    for i, j, _, here, there in pairs:
        correlation = lambda xy: np.corrcoef(detail(i, here), detail(j, xy))[0, 1]
        by_map.append(correlation(there))
        beside.append(np.mean([correlation(there + RIDGE / 2 * np.array(d)) for d in ((0, 1), (1, 0), (0, -1))]))
    assert np.median(by_map) > 0.6 and np.median(beside) < 0.1
    assert all(a > b + 0.2 for a, b in zip(by_map, beside))


def test_points_beyond_the_finger_move_smoothly(pairs):
    """Neighbours among the points of a map stay neighbours in their order, out to the canvas's corners."""
    for _, _, maps, _, _ in pairs:
        for grid in maps.values():
            across, down = np.diff(grid, axis=1)[:-1], np.diff(grid, axis=0)[:, :-1]
            area = across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]
            assert area.min() > 0.25 * MAP_STEP**2 and area.max() < 2.5 * MAP_STEP**2


@pytest.mark.parametrize("canvas, side", [(512, 33), (256, 17), (520, 34)])
def test_a_prints_map_to_itself_is_the_points_of_the_canvas_and_beyond_its_edge(canvas, side):
    points = canvas_points(canvas)
    assert points.shape == (side, side, 2) and points.dtype == np.float32
    assert points[0, 1].tolist() == [16, 0] and points[2, 0].tolist() == [0, 32]
    assert points[-1, -1].min() > canvas - 1
    xy = np.random.default_rng(0).uniform(-90, canvas + 90, (50, 2)).astype(np.float32)
    np.testing.assert_allclose(through(points, xy), xy, atol=1e-4)


def test_prints_that_are_not_mapped_have_idle_maps(print_set):
    real = Print("/A/1_1.png", "A", "1", "1", 500.0)
    impressions = Impressions((*print_set.prints, real, real), CANVAS)
    for i, j in ((0, 0), (0, 3), (0, 18), (18, 19)):  # itself, another finger's, a real one's, two real ones
        for grid in impressions.maps(i, j).values():
            np.testing.assert_array_equal(grid, canvas_points(CANVAS))
    assert impressions.mapped(1, [0, 1, 2]) == [0, 2] and impressions.mapped(18, [18, 19]) == []
    assert impressions.known
    assert not Impressions((real, real), CANVAS).known and not Impressions(print_set.prints[::3], CANVAS).known
    assert pickle.loads(pickle.dumps(impressions)) == impressions  # readers may be other processes


def test_a_warp_goes_through_its_values_and_its_inverse_leads_back():
    y, x = np.mgrid[:40, :50].astype(float) * 4
    values = np.stack(
        [20 + 1.1 * x - 0.2 * y + 5 * np.sin(y / 30), -7 + 0.2 * x + 0.9 * y + 4 * np.cos(x / 40)], axis=-1
    )
    warp = Warp.through(values, 4)
    at = np.stack([x, y], axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(warp(at), values.reshape(-1, 2), atol=1e-4)
    far = np.random.default_rng(1).uniform(-300, 500, (60, 2))
    np.testing.assert_allclose(warp(warp.inverse(far)), far, atol=1e-4)
