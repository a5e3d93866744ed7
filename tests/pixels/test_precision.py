"""Coordinates, pixels and scores are float32 products on every device. On GPU and TPU XLA has coarser ones by default.

A CPU always computes in float32, so the tests compare what the programs ask for.
"""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from ifvit.config import PRESETS, DenseConfig, MatchConfig
from ifvit.models.networks import dense_network, match_network
from ifvit.pixels.alignment import align
from ifvit.pixels.registration import register
from ifvit.pixels.views import dense_pair, match_views, plain_views
from ifvit.scoring.known_warps import dense_eval
from ifvit.scoring.scores import dense_scores, match_scores
from ifvit.training.state import init_state
from ifvit.training.step import pair_keys

DENSE, MATCH = DenseConfig(**PRESETS["smoke"][0]), MatchConfig(**PRESETS["smoke"][1])
PAIRS, CANVAS, SIZE = 2, DENSE.canvas_size, DENSE.image_size


def batch() -> dict:
    canvas = jax.ShapeDtypeStruct((PAIRS, CANVAS, CANVAS), jnp.uint8)
    mask = jax.ShapeDtypeStruct((PAIRS, CANVAS // 8, CANVAS // 8), bool)
    flags = jax.ShapeDtypeStruct((PAIRS,), bool)
    return {"canvas0": canvas, "canvas1": canvas, "mask0": mask, "mask1": mask, "genuine": flags, "counts": flags}


def one_print():
    return {k: batch()[f"{k}0"] for k in ("canvas", "mask")}


def keys():
    return jax.eval_shape(lambda: pair_keys(0, 0, (PAIRS,)))


def weights(net) -> tuple:
    state = jax.eval_shape(lambda: init_state(net, optax.identity(), 0))
    return state.params, state.batch_stats


def products(f, *args) -> list[tuple[str, bool]]:
    """The matrix products and convolutions of a program: what each is, and whether it asks for float32."""
    lines = jax.jit(f).lower(*args).as_text().splitlines()
    return [
        (line.strip(), bool(re.search(r"HIGHEST.*HIGHEST", line)))
        for line in lines
        if re.search(r"stablehlo\.(dot_general|convolution)", line)
    ]


def aligned(views, log_conf):
    image0, mask0, image1, mask1 = views
    found = register(log_conf, SIZE, MATCH)
    return align(image0, image1, mask0, mask1, found.similarity, MATCH)


@pytest.fixture(scope="module")
def programs() -> dict:
    cells = (SIZE // 8) ** 2
    views = jax.eval_shape(lambda b: plain_views(b, MATCH), batch())
    dense, match = dense_network(DENSE), match_network(MATCH, 3)
    return {
        "Module 1's pairs and their truth": (lambda k, b: dense_pair(k, b, DENSE), keys(), batch()),
        "Module 2's views": (lambda k, b: match_views(k, b, MATCH), keys(), batch()),
        "the alignment": (aligned, views, jax.ShapeDtypeStruct((PAIRS, cells, cells), jnp.float32)),
        "what is done once a print": (dense_scores(dense, DENSE).prepare, *weights(dense), one_print()),
        "Module 1's score": (dense_scores(dense, DENSE).score, *weights(dense), batch()),
        "Module 2's score": (match_scores(match, dense, MATCH).score, *weights(match), weights(dense), batch()),
        "Module 1's validation": (dense_eval(dense, DENSE), *weights(dense), batch(), keys()),
    }


@pytest.mark.run
@pytest.mark.parametrize(
    "name",
    [
        "Module 1's pairs and their truth",
        "Module 2's views",
        "the alignment",
        "what is done once a print",
        "Module 1's score",
        "Module 2's score",
        "Module 1's validation",
    ],
)
def test_every_product_is_one_of_float32(programs, name):
    f, *args = programs[name]
    found = products(f, *args)
    assert found
    assert [what for what, exact in found if not exact] == []


def test_the_search_sees_a_product_that_asks_for_nothing():
    x = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    assert [exact for _, exact in products(lambda a: a @ a, x)] == [False]
