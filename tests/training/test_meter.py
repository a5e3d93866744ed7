"""FLOP/s of a run, and their share of what its devices can do."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from cluster.host import Host
from ifvit.config import DenseConfig
from ifvit.devices import peak as peaks
from ifvit.training import meter as module
from ifvit.training.meter import Meter
from ifvit.training.metrics import TIMES, Metrics, read_rows
from ifvit.training.saver import Saver

PRODUCT = jax.jit(lambda a, b: a @ b).lower(jnp.ones((64, 128)), jnp.ones((128, 32))).compile()  # 2·64·128·32 FLOPs


@pytest.fixture
def row(tmp_path, monkeypatch):
    """The row of three steps that are such a product each and take two seconds."""

    def call(step, config=DenseConfig()) -> dict:  # noqa: B008
        now = [100.0]
        monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
        metrics = Metrics(epath.Path(tmp_path), 0, 10, "dense_reg", ())
        metrics.attempt(0)
        saver = Saver.__new__(Saver)  # which has saved nothing
        saver.blocked = 0.0
        meter = Meter(metrics, saver, Host(), 8, 10, 0)
        meter.count_flops(step, config)
        batches = iter([{}] * 3)
        for n in (1, 2, 3):
            meter.next_batch(batches)
            meter.add(n, {"loss": jnp.ones(())})
        now[0] += 2.0
        meter.write_row(3)
        metrics.close()
        return read_rows(tmp_path / "metrics.jsonl")[-1]

    return call


def test_a_row_has_the_flops_of_its_steps_a_second(row):
    found = row(PRODUCT)
    assert found["flops_per_second"] == pytest.approx(3 * 2 * 64 * 128 * 32 / 2.0, rel=1e-3)
    assert "peak_share" not in found  # nobody knows a CPU's


def test_a_loop_of_micro_batches_counts_with_each_of_them(row):
    found = row(PRODUCT, DenseConfig(accumulate=4))
    assert found["flops_per_second"] == pytest.approx(4 * 3 * 2 * 64 * 128 * 32 / 2.0, rel=1e-3)


def test_the_share_of_the_peak_is_told_where_it_is_known(row, monkeypatch):
    monkeypatch.setattr(module, "peak", lambda kind, dtype: {"float32": 1e9}[dtype])
    found = row(PRODUCT)
    assert found["peak_share"] == pytest.approx(found["flops_per_second"] / 1e9)


@pytest.mark.parametrize("cost", [None, {}, {"flops": -1.0}])
def test_nothing_is_told_where_the_compiler_does_not_count(row, cost, monkeypatch):
    step = jax.jit(lambda x: x).lower(1.0).compile()
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda self: cost)
    assert "flops_per_second" not in row(step)


def test_equal_runs_are_compared_without_them():
    assert {"flops_per_second", "peak_share"} <= set(TIMES)


@pytest.mark.parametrize(
    "kind, dtype, teraflops",
    [  # the makers' data sheets
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("Tesla T4", "float32", 8.1),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
    ],
)
def test_the_peak_of_a_device_is_its_makers(kind, dtype, teraflops):
    assert peaks.peak(kind, dtype) == teraflops * 1e12


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("cpu", "float32"),
        ("Tesla T4", "bfloat16"),
        ("NVIDIA A10G", "float32"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "float32"),
    ],
)
def test_the_peak_of_others_is_not_known(kind, dtype):
    assert peaks.peak(kind, dtype) is None


def test_a_step_is_compiled_once_and_a_run_like_it_compiles_none(command, prints, tmp_path):
    compiled = []
    listen = lambda event, seconds, fun_name="", **_: compiled.append(fun_name) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        words = ("train_dense", "--dataset_root", prints, "--preset", "smoke", "--set", "match_border=1", "--tracker")
        for name in ("a", "b"):
            said = command(*words, "--checkpoint_dir", tmp_path / name, cwd=tmp_path)
            assert said.code == 0, said
            assert sum("(step)" in fun for fun in compiled) == (name == "a"), compiled
            compiled.clear()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
