"""Programs that another process has traced: their StableHLO, kept beside the compiled programs.

The compiler's own cache spares a process the compiling, and not the seconds of Python that make and trace a network.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax import export

from ifvit.files import write_whole

PACKAGE = Path(__file__).parents[1]


def traced(make: Callable[[], Callable], about: str) -> Callable:
    """The jitted function that `make` would give; it is made where no process has traced it for such arguments yet.

    `about` tells all that it depends on but the package's code and its arguments' shapes. Arguments and results are
    arrays in tuples and dictionaries, on one device. Without a compilation cache nothing is kept.
    """
    programs: dict[str, Callable] = {}

    def call(*arguments: Any) -> Any:
        shapes = jax.tree.map(lambda x: (jax.numpy.shape(x), str(jax.numpy.result_type(x))), arguments)
        key = hashlib.sha256(f"{about}\n{shapes}\n{_circumstances()}".encode()).hexdigest()[:32]
        if key not in programs:
            programs[key] = jax.jit(_program(key, make, arguments).call if _folder() else make())
        return programs[key](*arguments)

    return call


def _folder() -> Path | None:
    there = jax.config.jax_compilation_cache_dir
    return Path(there) if there else None


def _program(key: str, make: Callable[[], Callable], arguments: tuple) -> export.Exported:
    file = _folder() / f"traced_{key}"
    with contextlib.suppress(Exception):  # it is not there, cannot be read, or JAX refuses it
        data = file.read_bytes()
        if data[:32] == hashlib.sha256(data[32:]).digest():
            return export.deserialize(bytearray(data[32:]))
    program = export.export(jax.jit(make()))(*arguments)
    data = bytes(program.serialize())
    with contextlib.suppress(OSError):  # as with compiled programs: the next process traces it again
        write_whole(file, hashlib.sha256(data).digest() + data)
    return program


@cache
def _circumstances() -> str:
    """What the same arguments may give another program by: code, versions, device, the compiler's options."""
    code = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        code.update(file.read_bytes())
    options = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("JAX_", "XLA_"))]
    options += [f"{k}={getattr(jax.config, k)}" for k in ("jax_enable_x64", "jax_default_matmul_precision")]
    versions = [metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    device = jax.devices()[0]
    return "\n".join([code.hexdigest(), *versions, device.platform, device.device_kind, *options])
