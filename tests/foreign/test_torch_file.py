"""Arrays of torch and safetensors files, whatever else lies in them; nothing in a file is executed."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_files import (
    call,
    mapping,
    name,
    refusal,
    storage,
    tensor,
    value,
    write_legacy,
    write_safetensors,
    write_torch,
    write_zip,
)

from ifvit.errors import CheckpointNotFound
from ifvit.foreign.torch_file import read_arrays


def read_state_dict(path):
    return read_arrays(path, lambda name: True)


def test_offset_and_stride_cut_the_tensor_from_its_storage(tmp_path):
    numbers = np.arange(24, dtype=np.float32)
    stored = storage("0", 24)
    body = mapping(
        {
            "whole": tensor(stored, (4, 6), (6, 1)),
            "transposed": tensor(stored, (6, 4), (1, 6)),
            "every_second": tensor(stored, (9,), (2,), offset=3),
            "parameter": call(name("torch._utils", "_rebuild_parameter"), tensor(stored, (2,), (1,)), value(True)),
            "scalar": tensor(stored, (), (), offset=5),
            "empty": tensor(stored, (0, 3), (3, 1)),
        }
    )
    for write in (write_zip, write_legacy):
        arrays = read_state_dict(write(tmp_path / "a.pt", body, {"0": numbers.tobytes()}))
        np.testing.assert_array_equal(arrays["whole"], numbers.reshape(4, 6))
        np.testing.assert_array_equal(arrays["transposed"], numbers.reshape(4, 6).T)
        np.testing.assert_array_equal(arrays["every_second"], numbers[3:21:2])
        np.testing.assert_array_equal(arrays["parameter"], [0, 1])
        assert arrays["scalar"].shape == () and arrays["scalar"] == 5
        assert arrays["empty"].shape == (0, 3)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("BoolStorage", np.bool_),
        ("ComplexFloatStorage", np.complex64),
    ],
)
def test_every_dtype_in_either_byte_order(tmp_path, kind, dtype, order):
    array = np.array([0, 1, 2.5, 300]).astype(dtype)
    word = array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1)
    raw = array.view(f"u{word}").astype(f"{'<' if order == 'little' else '>'}u{word}").tobytes()
    path = write_zip(tmp_path / "a.pt", mapping({"x": tensor(storage("0", 4, kind), (4,), (1,))}), {"0": raw}, order)
    read = read_state_dict(path)["x"]
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_a_name_is_the_way_to_the_array(tmp_path):
    a = tensor(storage("0", 1), (1,), (1,))
    module = (
        call(name("my.nets", "Net"))
        + mapping(
            {
                "_parameters": mapping({"w": a}),
                "_modules": mapping({"0": mapping({"b": a})}),
                "training": value(True),
                "other": a,
            }
        )
        + b"b"
    )
    body = mapping(
        {
            "epoch": value(3),
            "state_dict": mapping({"a.b": a}),
            "optimizer_states": b"](" + mapping({0: a}) + b"e",
            "net": module,
            "hyper": call(name("my.code", "Anything"), value("x")),
        }
    )
    path = write_zip(tmp_path / "a.pt", body, {"0": bytes(4)})
    assert list(read_state_dict(path)) == ["state_dict.a.b", "optimizer_states.0.0", "net.w", "net.0.b", "net.other"]
    assert list(read_arrays(path, lambda way: way.startswith("net"))) == ["net.w", "net.0.b", "net.other"]


def test_a_pickle_of_numpy_arrays_is_read_too(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"a": np.arange(3.0)}, "epoch": 3}))
    read = read_state_dict(tmp_path / "a.pkl")
    assert list(read) == ["model.a"] and read["model.a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "function, told",
    [
        ("_rebuild_qtensor", "quantised"),
        ("_rebuild_sparse_tensor", "sparse"),
        ("_rebuild_meta_tensor_no_storage", "without values"),
    ],
)
def test_a_tensor_of_another_form_is_named_where_it_is_wanted(tmp_path, function, told):
    odd = call(name("torch._utils", function), storage("0", 4, "QInt8Storage"), value((4,)))
    path = write_zip(
        tmp_path / "a.pt",
        mapping({"odd": odd, "b": tensor(storage("1", 1), (1,), (1,))}),
        {"0": bytes(4), "1": bytes(4)},
    )
    assert list(read_arrays(path, lambda way: way == "b")) == ["b"]
    assert f"holds odd as a tensor that is {told}" in refusal(read_state_dict, path)


def test_safetensors(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7, np.float32)}
    read = read_state_dict(write_safetensors(tmp_path / "a.safetensors", arrays))
    assert read.keys() == arrays.keys()
    for key in arrays:
        np.testing.assert_array_equal(read[key], arrays[key])
    half = {"a": np.array([1.5, -2], ml_dtypes.bfloat16)}
    np.testing.assert_array_equal(
        read_state_dict(write_safetensors(tmp_path / "b.safetensors", half, "BF16"))["a"], half["a"]
    )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_torch_itself_saves(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "t": base.view(4, 6).T,
        "s": base[3:21:2],
        "b": base.bfloat16(),
        "p": torch.nn.Parameter(base.clone()),
        "n": torch.tensor(3),
        **torch.nn.BatchNorm1d(4).state_dict(),
    }
    torch.save({"state_dict": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    read = read_state_dict(tmp_path / "a.pt")
    assert read.keys() == {f"state_dict.{key}" for key in state}
    for key, saved in state.items():
        np.testing.assert_array_equal(read[f"state_dict.{key}"].astype(np.float64), saved.detach().double().numpy())
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pt", _use_new_zipfile_serialization=not legacy)
    assert list(read_state_dict(tmp_path / "b.pt")) == ["weight", "bias"]


# ---- hostile and damaged files


class Reduced:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("place", ["top", "value", "nested", "storage", "hooks", "build"])
@pytest.mark.parametrize("function, called", [(os.system, "system"), (eval, "eval"), (exec, "exec")])
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, write, place, function, called):
    marker = tmp_path / "ran"
    code = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    evil = value(Reduced(function, code))
    good = tensor(storage("0", 1), (1,), (1,))
    ordered_dict = call(name("collections", "OrderedDict"))
    body = {
        "top": evil,
        "value": mapping({"a": good, "b": evil}),
        "nested": mapping({"state_dict": mapping({"a": good, "b": evil})}),
        "storage": mapping({"a": tensor(evil, (1,), (1,))}),
        "hooks": mapping({"a": call(name("torch._utils", "_rebuild_parameter"), good, value(True), evil)}),
        "build": mapping({"a": ordered_dict + b"}(" + value("_metadata") + evil + b"ub"}),
    }[place]
    path = write(tmp_path / "evil.pt", body, {"0": bytes(4)})
    message = refusal(read_state_dict, path)
    assert f".{called}, which" in message and "nothing in it was run" in message
    assert not marker.exists()
    pickle.loads(evil + b".")  # and it would have run
    assert marker.exists()


@pytest.mark.parametrize(
    "module, attribute",
    [("builtins", "getattr"), ("functools", "partial"), ("torch.storage", "_load_from_bytes"), ("my.code", "Trainer")]
    + [("collections", "OrderedDict.__init__"), ("torch._utils", "_rebuild_tensor_v2.__globals__")],
)
def test_a_call_of_anything_else_is_passed_by(tmp_path, module, attribute):
    body = mapping({"a": tensor(storage("0", 1), (1,), (1,)), "b": call(name(module, attribute), value("touch ran"))})
    assert list(read_state_dict(write_zip(tmp_path / "a.pt", body, {"0": bytes(4)}))) == ["a"]


@pytest.mark.parametrize(
    "size, stride, offset",
    [
        ((5,), (1,), 0),  # longer than the storage
        ((2,), (4,), 0),  # steps over its end
        ((4,), (1,), 1),
        ((1,), (1,), 4),
        ((2,), (-1,), 1),
        ((1,), (1,), -1),
        ((-1,), (1,), 0),
        ((10**12,), (0,), 0),  # one element, repeated for terabytes
        ((2**62, 4), (2**62, 1), 0),  # products that overflow 64 bits
        ((2,), (2**63,), 0),
        ((2, 2), (1,), 0),
        ((2.0,), (1,), 0),
        ("12", (1, 1), 0),
    ],
)
def test_a_tensor_never_reaches_beyond_its_storage(tmp_path, size, stride, offset):
    body = mapping({"x": tensor(storage("0", 4), size, stride, offset)})
    for write in (write_zip, write_legacy):
        refusal(read_state_dict, write(tmp_path / "a.pt", body, {"0": bytes(16)}))


def test_a_storage_shorter_than_it_says_is_refused(tmp_path):
    body = mapping({"x": tensor(storage("0", 8), (8,), (1,))})
    for write in (write_zip, write_legacy):
        assert "truncated or corrupt" in refusal(read_state_dict, write(tmp_path / "a.pt", body, {"0": bytes(16)}))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, kind):
    arrays = {"a": np.ones(4, np.float32), "b": np.ones((2, 3), np.float32)}
    path = tmp_path / "a.ckpt"
    if kind == "zip":
        write_torch(path, arrays)
    elif kind == "legacy":
        body = mapping({"a": tensor(storage("0", 4), (4,), (1,))})
        write_legacy(path, body, {"0": arrays["a"].tobytes()})
    else:
        write_safetensors(path, arrays)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(read_state_dict, path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    path = write_torch(tmp_path / "a.pt", {"a": np.full(64, 1.5, np.float32)})
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(np.full(8, 1.5, np.float32).tobytes()) + 2] ^= 1
    path.write_bytes(damaged)
    assert "truncated or corrupt" in refusal(read_state_dict, path)


def test_compressed_members_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    assert "compressed" in refusal(read_state_dict, tmp_path / "a.pt")


def test_files_of_other_kinds_are_told_apart(tmp_path):
    path = tmp_path / "a.ckpt"
    assert refusal(read_state_dict, path).startswith(f"Checkpoint not found: {path}.")
    assert "cannot be read" in refusal(read_state_dict, tmp_path)
    path.write_bytes(b"hello")
    assert "neither a PyTorch nor a safetensors" in refusal(read_state_dict, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    assert "is a zip, but not" in refusal(read_state_dict, path)
    with pytest.raises(CheckpointNotFound):
        read_state_dict(tmp_path / "none")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]},
        {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4]},
        7,
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, entry):
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refusal(read_state_dict, tmp_path / "a")


NESTED = b")" + b"\x85" * 1_000_000  # a tuple of a million levels


@pytest.mark.run
@pytest.mark.parametrize(
    "body, how",
    [
        (b"}" + NESTED + b"Ns.", "read"),
        (b"}(" + NESTED + b"Nu.", "read"),
        (b"(" + NESTED + b"Nd.", "read"),
        (NESTED + b".", "read"),
        (b"]q\x00h\x00a.", "read"),
        (
            b")q\x000"
            + b"".join(
                b"(" + b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"tq" + bytes([i + 1]) + b"0" for i in range(60)
            )
            + b"h\x3c.",
            "refused",
        ),
        (b"}r\xff\xff\xff\xff.", "read"),
        (b"}r" + (60_000_000).to_bytes(4, "little") + b".", "read"),
    ],
)
def test_a_hostile_pickle_neither_ends_the_process_nor_fills_the_memory(body, how, tmp_path):
    """C's unpickler hashes a key of any depth, and makes room for any index of its memo."""
    with zipfile.ZipFile(tmp_path / "evil.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body)
    code = """if True:
        import resource, sys
        from ifvit.errors import UserError
        from ifvit.foreign.torch_file import read_arrays
        memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        before = memory()
        try:
            read_arrays(sys.argv[1], lambda name: True)
            print("read", memory() - before)
        except UserError as e:
            print("refused", memory() - before)"""
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "evil.ckpt")], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, ""), said
    ended, megabytes = said.stdout.split()
    assert ended == how and int(megabytes) < 300
