"""Module 1 on pairs of two impressions: what its batches hold, and where there is nothing to make them of."""

import jax
import numpy as np
import pytest
from conftest import SMOKE

from ifvit.data.impressions import canvas_points


def test_a_run_on_two_impressions_has_their_maps_and_a_step_that_takes_them(started, tmp_path):
    said, task, _ = started(
        "train_dense", *SMOKE, "--set", "impression_share=1", "--set", "accumulate=2", cwd=tmp_path, create=False
    )
    assert said.code == 0, said
    batch = next(iter(task.batches(0, 1)))
    assert batch["map01"].shape == batch["map10"].shape == (4, 17, 17, 2)
    apart = [not np.array_equal(a, b) for a, b in zip(batch["canvas0"], batch["canvas1"])]
    mapped = [not np.array_equal(grid, canvas_points(256)) for grid in batch["map01"]]
    assert mapped == (apart & batch["genuine"]).tolist() and any(mapped)
    micro = {k: v.reshape(2, 2, *v.shape[1:]) for k, v in batch.items()}
    state = jax.eval_shape(task.init, 0)
    after, metrics = jax.eval_shape(task.step, state, micro, task.rates[0], *task.constants)
    assert jax.tree.structure(after) == jax.tree.structure(state) and "accuracy" in metrics


def test_a_run_that_does_not_ask_for_two_impressions_carries_no_maps(started, tmp_path):
    _, task, _ = started("train_dense", *SMOKE, cwd=tmp_path, create=False)
    batch = next(iter(task.batches(0, 1)))
    assert "map01" not in batch and "map10" not in batch
    for a, b, genuine in zip(batch["canvas0"], batch["canvas1"], batch["genuine"]):
        assert np.array_equal(a, b) == genuine


@pytest.mark.parametrize("words", [[], ["--set", "synthetic_share=0.5", "--set", "synthetic_impressions=1"]])
def test_where_no_two_impressions_are_mapped_the_log_says_so_and_pairs_show_one_print(
    started, prints, tmp_path, words, caplog
):
    said, task, _ = started(
        "train_dense",
        "--dataset_root",
        prints,
        *SMOKE,
        "--set",
        "impression_share=0.5",
        *words,
        cwd=tmp_path,
        create=False,
    )
    assert said.code == 0 and "impression_share is 0.5" in caplog.text and "teacher=pretrained" in caplog.text
    assert "map01" not in next(iter(task.batches(0, 1)))
