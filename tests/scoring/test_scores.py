"""Scores of many pairs: each print is prepared once, and every pair has its own score in its own place."""

import jax
import numpy as np
import pytest
from numbered_prints import NUMBERED, Numbers

from ifvit.config import DenseConfig
from ifvit.data.pairs import Pair
from ifvit.models.networks import dense_network
from ifvit.presets import PRESETS
from ifvit.scoring import scores
from ifvit.scoring.scores import blocks, dense_scores, for_pair, in_graph, score_pairs

PAIRS = [Pair(i, j, False) for i in range(9) for j in range(11, 18)][::-1]


@pytest.mark.parametrize("room", [1, 6, 1000])
def test_every_pair_has_its_score_however_few_prints_are_kept_ready(monkeypatch, room):
    monkeypatch.setattr(scores, "PREPARED_BYTES", room * 4)
    found = score_pairs(NUMBERED, (), Numbers(), PAIRS, 4)
    np.testing.assert_array_equal(found["score"], [100 * a + b for a, b, _ in PAIRS])
    assert found["matches"].dtype.kind == "i"


def test_a_print_is_prepared_once():
    prints = Numbers()
    score_pairs(NUMBERED, (), prints, PAIRS, 4)
    assert len(PAIRS) == 63
    counts = np.bincount(prints.asked[1:], minlength=18)  # the first tells the shapes; a last batch is filled up
    assert counts[:9].tolist() == [1] * 9 and counts[11:17].tolist() == [1] * 6


class Sizes(Numbers):
    """Prints of which those from 14 on are large."""

    def canvas(self, i):
        return super().canvas(i)[0], np.full((1, 1), i >= 14)


SIZED = NUMBERED._replace(
    wide=NUMBERED._replace(score=lambda batch: {k: -v for k, v in NUMBERED.score(batch).items()}),
    cut=lambda mask: mask[..., 0, 0],
)


@pytest.mark.parametrize("room", [2, 1000])
def test_pairs_with_a_large_print_are_scored_by_the_wider_window_in_their_places(monkeypatch, room):
    monkeypatch.setattr(scores, "PREPARED_BYTES", room * 4)
    expected = [(100 * a + b) * (-1 if max(a, b) >= 14 else 1) for a, b, _ in PAIRS]
    assert min(expected) < 0 < max(expected)
    np.testing.assert_array_equal(score_pairs(SIZED, (), Sizes(), PAIRS, 4)["score"], expected)
    assert [for_pair(SIZED, Sizes(), pair) is SIZED.wide for pair in PAIRS] == [e < 0 for e in expected]
    numbers = np.array([pair[:2] for pair in PAIRS], np.float32)
    batch = {
        f"{k}{n}": v for n in (0, 1) for k, v in (("number", numbers[:, n]), ("mask", numbers[:, n, None, None] >= 14))
    }
    np.testing.assert_array_equal(jax.jit(lambda b: in_graph(SIZED, (), b))(batch)["score"], expected)


def test_no_pairs_have_no_scores():
    assert score_pairs(NUMBERED, (), Numbers(), [], 4) == {}


@pytest.mark.parametrize("room", [2, 5, 40, 400])
def test_blocks_have_all_pairs_and_few_prints(room):
    numbers = np.random.default_rng(0).integers(0, 200, (3000, 2)).astype(np.int32)
    found = list(blocks(numbers, room))
    assert np.sort(np.concatenate(found)).tolist() == list(range(3000))
    assert max(len(np.unique(numbers[block])) for block in found) <= room
    assert len(found) == 1 or room < 400


def test_few_pairs_of_many_prints_need_few_blocks():
    """Two thousand prints that are in a pair each, and room for two hundred."""
    numbers = np.random.default_rng(0).permutation(2000).astype(np.int32).reshape(-1, 2)
    assert len(list(blocks(numbers, 200))) <= 2 * 2000 // 200


@pytest.mark.run
def test_prints_that_were_prepared_alone_have_the_scores_of_their_canvases():
    config = DenseConfig(**PRESETS["smoke"][0])
    rng = np.random.default_rng(0)
    canvases = rng.integers(0, 255, (3, 256, 256), np.uint8)
    prints = {"canvas": canvases, "mask": np.ones((3, 32, 32), bool)}
    how = dense_scores(dense_network(config), config)
    state = jax.jit(dense_network(config).init)(jax.random.key(0))
    rows = jax.jit(how.prepare)(*state, prints)
    one, other = [0, 1, 2], [1, 1, 0]
    batch = scores.paired(*({k: v[np.array(n)] for k, v in rows.items()} for n in (one, other)))
    raw = {f"{k}{n}": v[np.array(of)] for k, v in prints.items() for n, of in ((0, one), (1, other))}
    found, expected = (jax.jit(how.score)(*state, b) for b in (batch, raw))
    np.testing.assert_allclose(found["ridges"], expected["ridges"], atol=1e-5)
    assert found["ridges"][1] > found["ridges"][0]  # a print with itself
    np.testing.assert_array_equal(found["matches"], expected["matches"])
