"""A training step is the same on any devices, however it is cut up: micro-batches, recomputation, low precision."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from xla import flags

from ifvit.config import DenseConfig, preset
from ifvit.data.loader import PairSource
from ifvit.data.prepare import PrintSet
from ifvit.devices.batch_axes import batch_axes, over_batch
from ifvit.devices.sharding import arranged, make_mesh, put_batch
from ifvit.errors import UserError

WORKER = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh
from ifvit.config import DenseConfig, MatchConfig, preset
from ifvit.devices.sharding import put_batch, replicated, shardings
from ifvit.training.state import init_state, learning_rate, optimizer
from ifvit.models.networks import dense_network, match_network
from ifvit.training.step import dense_step, match_step

PAIRS = 8
SMALL = dict(batch_size=PAIRS, warmup=0.0, image_size=32, roi_size=16, canvas_size=128, input_ppi=300.0)


def prints(canvas):
    y, x = np.mgrid[:canvas, :canvas]
    images = np.stack([128 + 100 * np.sin(np.hypot(y + 30 * n, x - 20 * n) * 2 * np.pi / 9) for n in range(PAIRS)])
    mask = np.ones((PAIRS, canvas // 8, canvas // 8), bool)
    images = images.astype(np.uint8)
    return {"canvas0": images, "canvas1": np.roll(images, 1, 0), "mask0": mask, "mask1": mask,
            "genuine": np.arange(PAIRS) % 3 > 0, "label0": np.arange(PAIRS, dtype=np.int32) % 3 - 1,
            "label1": np.arange(PAIRS, dtype=np.int32) % 2, "asked": np.arange(PAIRS, dtype=np.int32)}


def run(module, layout, **changes):
    cls = DenseConfig if module == "dense" else MatchConfig
    small = {k: v for k, v in SMALL.items() if module == "match" or k != "roi_size"}
    config = preset("smoke", cls).replace(**small, **changes)
    rate = learning_rate(config, 10)(0)
    if module == "dense":
        net, constants = dense_network(config), ()
        step = dense_step(net, config)
    else:
        net, aligner = match_network(config, 4), dense_network(config)
        constants = (aligner.init(jax.random.key(3)),)
        step = match_step(net, aligner, config)
    init = lambda: init_state(net, optimizer(config, 0.0), 0)
    mesh = Mesh(np.array(jax.devices()[: layout[0] * layout[1]]).reshape(layout), ("data", "model"))
    place = shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=place)()
    step = jax.jit(step, donate_argnums=0, out_shardings=(place, replicated(mesh)))
    constants = jax.device_put(constants, replicated(mesh))
    with jax.set_mesh(mesh):
        state, metrics = step(state, put_batch(prints(config.canvas_size), mesh, config.accumulate), rate, *constants)
    return jax.device_get(state), {k: float(v) for k, v in metrics.items()}


def apart(a, b):
    trees = (a[0].params, b[0].params), (a[0].batch_stats, b[0].batch_stats)
    return [float(max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(s), jax.tree.leaves(t))))
            for s, t in trees] + [abs(a[1]["loss"] - b[1]["loss"])]


out = {}
module = sys.argv[1]
one = run(module, (1, 1))
out["asked"] = one[1]["asked"]
out["loss"] = one[1]["loss"]
out["2x2 with remat"] = apart(one, run(module, (2, 2), remat=True))
out["bfloat16 2x1"] = apart(one, run(module, (2, 1), compute_dtype="bfloat16"))
micro = run(module, (1, 1), accumulate=2)
out["in two"] = apart(one, micro)
out["in two, 4x1"] = apart(micro, run(module, (4, 1), accumulate=2))
out["finite"] = all(np.isfinite(x).all() for x in jax.tree.leaves(micro[0]))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def said():
    """What a process with four devices finds, of each module; both at once."""
    env = os.environ | {
        "XLA_FLAGS": flags(devices=4),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    started = {
        m: subprocess.Popen([sys.executable, "-c", WORKER, m], stdout=subprocess.PIPE, text=True, env=env)
        for m in ("dense", "match")
    }
    return {m: json.loads(p.communicate(timeout=600)[0].splitlines()[-1]) for m, p in started.items()}


@pytest.mark.process
@pytest.mark.parametrize("module", ["dense", "match"])
def test_a_step_is_the_same_on_any_devices_and_recomputed_but_for_rounding(said, module):
    params, stats, loss = said[module]["2x2 with remat"]
    assert params < 2e-5 and stats < 1e-5 and loss < 1e-4 * said[module]["loss"], said[module]


@pytest.mark.process
@pytest.mark.parametrize("module", ["dense", "match"])
def test_micro_batches_hold_the_same_pairs_on_any_devices(said, module):
    params, stats, loss = said[module]["in two, 4x1"]
    assert params < 2e-5 and stats < 1e-5 and loss < 1e-4 * said[module]["loss"], said[module]
    assert said[module]["in two"][2] > 0 and said[module]["finite"]  # it does cut the batch up


@pytest.mark.process
@pytest.mark.parametrize("module", ["dense", "match"])
def test_bfloat16_computes_nearly_the_same_and_not_the_same(said, module):
    _, _, loss = said[module]["bfloat16 2x1"]
    assert 0 < loss < 0.05 * said[module]["loss"]


@pytest.mark.process
@pytest.mark.parametrize("module", ["dense", "match"])
def test_what_one_process_is_asked_all_hear(said, module):
    assert said[module]["asked"] == 7  # the greatest of the pairs' 0 … 7


def test_sums_over_the_batch_are_sums_over_the_devices_the_code_is_mapped_over():
    mesh = make_mesh(jax.device_count())
    assert batch_axes() == () and over_batch(3) == 3
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(lambda x: over_batch(x.sum()), in_specs=jax.P(("data", "model")), out_specs=jax.P())
        assert jax.jit(mapped)(np.arange(4.0)) == 6


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_processes_parts_of_a_batch_make_the_same_micro_batches(processes):
    """Micro-batch k of step s holds the pairs s·B + k·B/A … whoever reads them."""

    class Numbers:
        def __getitem__(self, n):
            return n

    seen = {}
    for p in range(processes):
        source = PairSource(PrintSet((), (), ()), Numbers(), {}, 16, 3, 5, p, processes, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ifvit.data.loader.example", lambda prints, n, classes: n)
            mine = [source[i] for i in range(len(source))]
        steps = np.array(mine).reshape(2, 2, -1)  # step, micro-batch, this process's pairs of it
        for s in range(2):
            for k in range(2):
                seen.setdefault((s, k), []).extend(steps[s, k])
    assert {key: sorted(v) for key, v in seen.items()} == {
        (s, k): list(range((3 + s) * 16 + k * 8, (3 + s) * 16 + k * 8 + 8)) for s in range(2) for k in range(2)
    }


def test_a_batch_comes_to_the_devices_in_micro_batches():
    mesh = make_mesh(4)
    batch = put_batch({"x": np.arange(8)}, mesh, 2)
    np.testing.assert_array_equal(batch["x"], [[0, 1, 2, 3], [4, 5, 6, 7]])


def test_devices_of_a_host_are_neighbours_and_slices_lie_on_the_outer_axis():
    """Two slices of two hosts with two chips, numbered in any order."""
    chips = [
        SimpleNamespace(slice_index=s, process_index=2 * s + h, id=i)
        for i, (h, s, _) in enumerate(itertools.product(range(2), range(2), range(2)))
    ]
    rows = np.array(arranged(chips[::-1])).reshape(-1, 2)  # data × model
    assert all(a.process_index == b.process_index for a, b in rows)
    assert [a.slice_index for a, _ in rows] == [0, 0, 1, 1]


def test_a_batch_that_does_not_divide_into_micro_batches_is_a_mistake():
    with pytest.raises(UserError, match="does not divide into 3 micro-batches; use --set accumulate=1"):
        preset("smoke", DenseConfig).replace(accumulate=3)
