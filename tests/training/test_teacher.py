"""A teacher registers impressions of real fingers: which it looks at, what becomes of its answers, what a run keeps."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMOKE
from scipy import ndimage

from ifvit.config import preset
from ifvit.constants import MAP_STEP
from ifvit.data.impressions import Impressions, canvas_points
from ifvit.data.placement import window_to_canvas
from ifvit.data.prepare import prepare
from ifvit.data.sources import SYNTHETIC, Print
from ifvit.pixels.agreement import CELL, check, checked_config
from ifvit.pixels.geometry import fit_similarity, through_map
from ifvit.pixels.views import normalise, plain_views
from ifvit.training import teacher
from ifvit.training.teacher import FILE, candidates, maps_of

CONFIG = preset("cpu", teacher.DenseConfig)


def impressions(database, finger, count):
    return [Print(f"/{database}/{finger}_{i}.png", database, finger, str(i), 500) for i in range(count)]


# --- which pairs it looks at ----------------------------------------------------------------------


def test_databases_take_turns_and_the_fingers_of_each():
    large = [p for f in range(30) for p in impressions("A", str(f), 8)]
    prints = [*large, *(p for f in "123" for p in impressions("B", f, 3)), *impressions(SYNTHETIC, "1", 4)]
    pairs = candidates(prints, 60, 0)
    assert len(pairs) == len(set(pairs)) == 60
    assert all(prints[i].identity == prints[j].identity and i < j and g for i, j, g in pairs)
    fingers = Counter(prints[i].identity for i, _, _ in pairs)
    assert [n for (database, _), n in fingers.items() if database == "B"] == [3, 3, 3]  # all that there are
    assert sorted(n for (database, _), n in fingers.items() if database == "A") == [1] * 9 + [2] * 21
    assert candidates(prints, 60, 0) == pairs != candidates(prints, 60, 1)
    assert len(candidates(prints, 10**6, 0)) == 30 * 28 + 3 * 3


def test_fingers_of_one_impression_have_no_pairs():
    assert candidates([*impressions("A", "1", 1), *impressions(SYNTHETIC, "1", 3)], 5, 0) == []


# --- what becomes of its answers ------------------------------------------------------------------


def test_a_similarity_becomes_the_map_between_the_canvases():
    """A quarter turn about the window's middle, 10 px of it to the right: 10 · 500 / 350 px of the canvas."""
    middle = (CONFIG.image_size - 1) / 2
    similarity = np.float32([0, 1, 2 * middle + 10, 0])  # x' = −y + u, y' = x
    map01, map10 = maps_of(similarity, np.zeros((27, 27, 2), np.float32), CONFIG)
    off = canvas_points(512) - 255.5
    turned = np.stack([-off[..., 1], off[..., 0]], axis=-1) + 255.5 + [10 * 500 / 350, 0]
    np.testing.assert_allclose(map01, turned, atol=1e-2)
    through = np.asarray(through_map(jnp.asarray(map10), jnp.asarray(map01.reshape(-1, 2)), MAP_STEP))
    np.testing.assert_allclose(through, canvas_points(512).reshape(-1, 2), atol=1e-2)


def test_what_is_registered_by_the_ridges_lies_where_the_generator_says(generated, cache):
    """A similarity as matches would give it, bent by block matching: its maps against the generator's."""
    prints = [Print(str(generated[f, i]), SYNTHETIC, str(f), str(i), 500.0) for f in (3, 4, 6) for i in (1, 2, 3)]
    print_set, fine = prepare(prints, CONFIG.canvas_size, 0.0, cache), checked_config(CONFIG)
    known, window = Impressions(print_set.prints, CONFIG.canvas_size), np.linalg.inv(window_to_canvas(fine))
    run = jax.jit(check, compiler_options={"xla_backend_optimization_level": 0})
    by_similarity, by_maps = [], []
    for i, j in itertools.permutations(range(9), 2):
        if prints[i].finger != prints[j].finger:
            continue
        canvases = [print_set.canvas(k) for k in (i, j)]
        foregrounds = [np.kron(ndimage.binary_erosion(m), np.ones((8, 8), bool)) for _, m in canvases]
        true = known.maps(i, j)["map01"]
        here = canvas_points(CONFIG.canvas_size).reshape(-1, 2)
        there = true.reshape(-1, 2)
        seen = [
            (f[tuple(np.clip(np.rint(p[:, ::-1]), 0, 511).astype(int).T)]) for f, p in zip(foregrounds, (here, there))
        ]
        both = seen[0] & seen[1]
        if both.sum() < 60:
            continue
        to_window = lambda p: (p @ window[:2, :2].T + window[:2, 2]).astype(np.float32)
        similarity = fit_similarity(*(jnp.asarray(to_window(p[both])) for p in (here, there)), jnp.ones(both.sum()))
        batch = {f"{name}{k}": canvases[k][n][None] for k in (0, 1) for n, name in enumerate(("canvas", "mask"))}
        image0, mask0, image1, mask1 = plain_views(batch, fine)
        ridges = [normalise(x, m, fine)[0, ..., 0] for x, m in ((image0, mask0), (image1, mask1))]
        side = fine.image_size // CELL - 1
        none = jnp.zeros((1, side, side, 2))
        agreed = run(ridges[0], mask0[0], ridges[1], mask1[0], similarity[None], jnp.ones(1, bool), none)
        flat, _ = maps_of(np.asarray(similarity), np.zeros((side, side, 2), np.float32), fine)
        bent, _ = maps_of(np.asarray(similarity), np.asarray(agreed.field), fine)
        off = lambda grid: np.linalg.norm(grid.reshape(-1, 2) - there, axis=1)[both]
        by_similarity.append(np.median(off(flat)))
        by_maps.append(np.median(off(bent)))
    assert len(by_maps) > 6
    assert np.median(by_maps) < 1.5 < np.median(by_similarity)


# --- what a run keeps -----------------------------------------------------------------------------


@pytest.fixture
def taught_run(started, prints, module1, tmp_path, monkeypatch):
    """A run up to its first step with a teacher of whose answers two in three are believed; what it is asked."""
    asked = []

    def score_pairs(*args, real=teacher.score_pairs):
        asked.append(len(args[3]))
        rows = real(*args)
        return rows | {"registered": np.arange(asked[-1]) % 3 > 0, "confidence": np.ones(asked[-1])}

    monkeypatch.setattr(teacher, "score_pairs", score_pairs)

    def call(*more, share=1, path=module1.path):
        sets = [w for s in (f"impression_share={share}", f"teacher={path}", *more) for w in ("--set", s)]
        said, task, _ = started("train_dense", "--dataset_root", prints, *SMOKE, *sets, cwd=tmp_path, create=False)
        return said, task

    return call, asked


@pytest.mark.slow
def test_a_run_keeps_its_teachers_pairs_and_reads_them_again(taught_run, tmp_path, module1):
    call, asked = taught_run
    said, task = call()
    assert said.code == 0 and asked == [9], said  # three fingers to train on, three impressions each
    assert "registers 6 of 9 pairs of impressions" in said.out
    file = tmp_path / "checkpoints/dense_reg" / FILE
    with np.load(file) as kept:
        assert kept["pairs"].shape == (6, 2) and kept["map01"].shape == kept["map10"].shape == (6, 17, 17, 2)
    batch = next(iter(task.batches(0, 1)))
    apart = [not np.array_equal(a, b) for a, b in zip(batch["canvas0"], batch["canvas1"])]
    assert any(apart & batch["genuine"])

    _, again = call()
    assert asked == [9] and again.data_digest == task.data_digest
    for name, x in next(iter(again.batches(0, 1))).items():
        np.testing.assert_array_equal(x, batch[name])

    file.write_bytes(file.read_bytes()[:-100])
    said, mended = call()
    assert asked == [9, 9] and "is damaged" in said.out and mended.data_digest == task.data_digest
    _, fewer = call("teacher_pairs=4")
    assert asked == [9, 9, 4] and fewer.data_digest != task.data_digest


def test_a_teacher_that_is_of_no_use_is_told(taught_run, module1):
    call, asked = taught_run
    said, _ = call(share=0)
    assert said.code == 2 and "impression_share is 0" in said.err
    said, _ = call(path="nowhere")
    assert said.code == 2 and "nowhere" in said.err
    assert not asked
