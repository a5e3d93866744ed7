"""In which dtype this machine computes fast, and what XLA is told for it."""

import re
import warnings
from pathlib import Path

import jax
from jax.stages import Compiled, Lowered

CPUINFO = Path("/proc/cpuinfo")


def fastest() -> str:
    """`bfloat16` where a training step in it takes three quarters of the time or less, else `float32`.

    They are on TPUs, on NVIDIA's GPUs from Ampere on, and on CPUs with AMX from JAX 0.12 on.
    """
    device = jax.devices()[0]
    if device.platform == "gpu":
        fast = float(getattr(device, "compute_capability", 0) or 0) >= 8
    else:
        fast = device.platform == "tpu" or _amx()
    return "bfloat16" if fast else "float32"


def compiled(step: Lowered, dtype: str) -> Compiled:
    """A training step in this dtype, compiled as this machine runs it fast.

    XLA's own convolutions do not use AMX; oneDNN's do, and a step of preset `cpu` takes 0.7 of the time. JAX
    0.12 cannot write such a program to its cache, so it is compiled at every start.
    """
    if dtype != "bfloat16" or not _amx():
        return step.compile()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
        return step.compile(compiler_options={"xla_cpu_experimental_onednn_custom_call": True})


def _amx() -> bool:
    """Whether this is a CPU with AMX, and a JAX that can use it."""
    try:
        flags = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    has = re.search(r"^flags\b.*\bamx_bf16\b", flags, re.M)
    return jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 12) and has is not None
