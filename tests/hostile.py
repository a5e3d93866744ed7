"""Pickles put together by hand, instruction by instruction, and what a reader of them must not do."""

import os
import time
import tracemalloc

import pytest
from bench import fuzz_pickles

from ifvit import legacy
from ifvit.errors import UserError


def text(s: str) -> bytes:
    return b"X" + len(s.encode()).to_bytes(4, "little") + s.encode()


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + b"(" + b"".join(args) + b"tR"


def under(key: str, value: bytes) -> bytes:
    return b"}" + text(key) + value + b"s"


def array(shape: bytes, raw: bytes, code=b"f4", version=b"K\x01", order=b"<", fields=b"NNN") -> bytes:
    """_reconstruct(ndarray, (0,), b'b') with its state, by hand; shape: instructions."""
    dtype = (
        call("numpy.dtype", text(code.decode()), b"\x89\x88")
        + b"(K\x03"
        + text(order.decode())
        + fields
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb"
    )
    made = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), b"K\x00\x85", b"C\x01b")
    return made + b"(" + version + shape + dtype + b"\x89" + raw + b"tb"


def number(n: int) -> bytes:
    raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


FOUR = b"C\x04\x00\x00\x80?"


@pytest.fixture(scope="session")
def watch():
    legacy._optax_fields()  # imports optax; nothing later does
    return fuzz_pickles.Watch()


@pytest.fixture
def refused(tmp_path, monkeypatch, watch):
    """The sentence that refuses a file.

    It checks that the file opened no other file, imported and started nothing, and took little memory and time.
    """
    monkeypatch.chdir(tmp_path)

    def call(raw: bytes, megabytes=4.0, traced=True) -> str:  # tracing takes ten times as long
        path = tmp_path / "hostile.pkl"
        path.write_bytes(raw)
        start = time.process_time()
        if traced:
            tracemalloc.start()
        try:
            with watch(path) as events, pytest.raises(UserError) as caught:
                legacy.read(path)
            _, peak = tracemalloc.get_traced_memory()  # 0 where it is not traced
        finally:
            tracemalloc.stop()
        assert not events and os.listdir(tmp_path) == ["hostile.pkl"], (events[:3], os.listdir(tmp_path))
        assert peak < megabytes * 1e6 + 4 * len(raw), f"{peak / 1e6:.1f} MB"
        assert time.process_time() - start < 10
        said = str(caught.value)
        assert said.startswith(str(path)) and said.isprintable() and said.endswith(".") and len(said) < 1000
        assert not any(n in said for n in ("MemoryError", "RecursionError"))
        return said

    return call


TRAP = "touch executed"
SYSTEM = call("os.system", text(TRAP))


class Trap:
    def __reduce__(self):
        return os.system, (TRAP,)


@pytest.fixture
def inert(tmp_path, monkeypatch, watch):
    """What is read of a file; meanwhile no other file was opened, and nothing imported or started."""
    monkeypatch.chdir(tmp_path)

    def call(raw: bytes) -> legacy.Legacy:
        path = tmp_path / "hostile.pkl"
        path.write_bytes(raw)
        with watch(path) as events:
            found = legacy.read(path)
        assert not events and os.listdir(tmp_path) == ["hostile.pkl"], (events[:3], os.listdir(tmp_path))
        return found

    return call
