"""`compute_dtype=auto`: what a machine is fast in, the same on all processes of a run and in all its attempts."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ifvit.config import DenseConfig, preset
from ifvit.devices import precision
from ifvit.training import startup

AMX = "processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 avx512_fp16 amx_tile\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(PLATFORM, COMPUTE_CAPABILITY, CPUINFO, JAX's version)"""

    def make(platform: str, capability: str | None = None, cpuinfo: str = "", version: tuple = (0, 12, 0)):
        device = SimpleNamespace(platform=platform, compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "__version_info__", version)
        monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
        (tmp_path / "cpuinfo").write_text(cpuinfo)

    return make


@pytest.mark.parametrize(
    "of, dtype",
    [
        (("tpu",), "bfloat16"),
        (("gpu", "9.0"), "bfloat16"),
        (("gpu", "10.0"), "bfloat16"),
        (("gpu", "7.5"), "float32"),  # T4
        (("gpu", None, AMX), "float32"),  # not known
        (("cpu", None, AMX), "bfloat16"),
        (("cpu", None, AMX, (0, 10, 2)), "float32"),
        (("cpu", None, AMX.replace("amx_bf16", "")), "float32"),
        (("cpu", None, AMX.replace("flags", "bugs")), "float32"),
    ],
)
def test_what_a_machine_is_fast_in(machine, of, dtype):
    machine(*of)
    assert precision.fastest() == dtype


def test_no_processor_is_known_where_there_is_no_linux(machine, monkeypatch, tmp_path):
    machine("cpu", None, AMX)
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "none")
    assert precision.fastest() == "float32"


@pytest.mark.skipif(not precision._amx(), reason="no AMX, or a JAX before 0.12")
def test_a_step_in_bfloat16_uses_onednns_convolutions():
    x, w = jnp.ones((4, 32, 32, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 16), jnp.bfloat16)
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    fast, plain = (precision.compiled(jax.jit(conv).lower(x, w), dtype) for dtype in ("bfloat16", "float32"))
    assert "onednn$convolution" in fast.as_text() and "onednn$convolution" not in plain.as_text()
    assert float(fast(x, w)[0, 5, 5, 0]) == float(plain(x, w)[0, 5, 5, 0]) == 144


# ---- in a run


def auto(folder, **more):
    return preset("smoke", DenseConfig).replace(compute_dtype="auto", checkpoint_dir=str(folder), **more)


@pytest.fixture
def fast(monkeypatch):
    """fast(DTYPE, …): what the processes of the run are fast in."""

    def make(*dtypes: str) -> None:
        monkeypatch.setattr(startup, "fastest", lambda: dtypes[0])
        monkeypatch.setattr(startup, "exchange", lambda what, mine: [mine, *dtypes[1:]])

    return make


def test_all_processes_of_a_run_compute_in_the_same(fast, tmp_path):
    fast("bfloat16", "bfloat16")
    assert startup.settled(auto(tmp_path), "auto").compute_dtype == "bfloat16"
    fast("bfloat16", "float32")
    assert startup.settled(auto(tmp_path), "auto").compute_dtype == "float32"


def test_a_dtype_that_is_named_stays(fast, tmp_path):
    fast("bfloat16")
    config = auto(tmp_path).replace(compute_dtype="float32")
    assert startup.settled(config, "auto") is config


@pytest.mark.parametrize("resume, dtype", [("auto", "float32"), ("never", "bfloat16")])
def test_a_run_that_goes_on_stays_with_what_it_has(fast, tmp_path, resume, dtype):
    (tmp_path / "config.json").write_text(json.dumps({"compute_dtype": "float32"}))
    fast("bfloat16")
    assert startup.settled(auto(tmp_path), resume).compute_dtype == dtype
    (tmp_path / "config.json").write_text('{"compute')  # a run of before, cut short
    assert startup.settled(auto(tmp_path), resume).compute_dtype == "bfloat16"


@pytest.mark.run
def test_a_run_trains_in_what_its_machine_is_fast_in_and_is_gone_on_with_on_another(command, prints, fast, tmp_path):
    words = ("--dataset_root", prints, "--preset", "smoke", "--set", "compute_dtype=auto", "--checkpoint_dir", "run")
    fast("bfloat16")
    said = command("train_dense", *words, "--num_epochs", "1", cwd=tmp_path)
    assert said.code == 0 and "compute_dtype=auto: bfloat16" in said.out, said
    assert json.loads((tmp_path / "run/config.json").read_text())["compute_dtype"] == "bfloat16"
    fast("float32")
    said = command("train_dense", *words, "--num_epochs", "1", cwd=tmp_path)
    assert said.code == 0 and "is finished (1 epochs)" in said.out, said
    path = str(tmp_path / "run/dense_reg_ckpt")
    assert startup.settled(auto(tmp_path), path).compute_dtype == "bfloat16"
