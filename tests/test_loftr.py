"""LoFTR's weights from torch and safetensors files, whole or not at all; nothing in a file is executed."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ifvit.config import DenseConfig, preset
from ifvit.errors import UserError
from ifvit.loftr import load_loftr, loftr_from_transformer, transformer_from_loftr
from ifvit.foreign.torch_file import read_state_dict
from ifvit.training.dense import with_loftr

# --- torch files, written by hand: the opcodes of pickle protocol 2, as torch.save emits them ---


def value(plain):
    return pickle.dumps(plain, 2)[2:-1]  # without PROTO and STOP


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, *arguments):
    return function + b"(" + b"".join(arguments) + b"tR"


def mapping(items):
    return b"}(" + b"".join(value(key) + item for key, item in items.items()) + b"u"


def storage(key, length, kind="FloatStorage"):
    pid = value("storage"), name("torch", kind), value(key), value("cpu"), value(length)
    return b"(" + b"".join(pid) + b"tQ"


def tensor(stored, size, stride, offset=0):
    hooks = call(name("collections", "OrderedDict"))
    rest = value(offset), value(size), value(stride), value(False), hooks
    return call(name("torch._utils", "_rebuild_tensor_v2"), stored, *rest)


def row_major(size):
    return tuple(int(np.prod(size[i + 1 :])) for i in range(len(size)))


def write_zip(path, body, storages, byteorder=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        if byteorder:
            archive.writestr("archive/byteorder", byteorder)
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
    return path


def write_torch(path, arrays, unwrap=False):
    body = mapping(
        {k: tensor(storage(str(i), a.size), a.shape, row_major(a.shape)) for i, (k, a) in enumerate(arrays.items())}
    )
    body = mapping({"epoch": value(3), "state_dict": body}) if unwrap else body
    return write_zip(path, body, {str(i): a.astype("<f4").tobytes() for i, a in enumerate(arrays.values())})


def write_legacy(path, body, storages):
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    # In the legacy format a storage's description ends with its view, None as ever.
    parts += [b"\x80\x02" + body.replace(b"tQ", b"NtQ") + b".", pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", len(raw) // 4) + raw for raw in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def write_safetensors(path, arrays, dtype="F32"):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, array in arrays.items():
        raw = array.tobytes()
        header[key] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def loftr_state(layers=8, width=256, prefix="matcher."):
    """A LoFTR state dict of random numbers: names and shapes as in zju3dv/LoFTR's outdoor_ds.ckpt."""
    rng = np.random.default_rng(0)
    shapes = {f"{part}.weight": (width, width) for part in ("q_proj", "k_proj", "v_proj", "merge")}
    shapes |= {"mlp.0.weight": (2 * width, 2 * width), "mlp.2.weight": (width, 2 * width)}
    shapes |= {f"{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return {
        f"{prefix}loftr_coarse.layers.{layer}.{key}": rng.standard_normal(shape, np.float32)
        for layer in range(layers)
        for key, shape in shapes.items()
    }


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


# --- reading files ---


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


def test_a_nested_state_dict_is_unwrapped(tmp_path):
    arrays = {"a": np.ones((2, 3), np.float32)}
    assert list(read_state_dict(write_torch(tmp_path / "a.pt", arrays, unwrap=True))) == ["a"]


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
    assert read.keys() == state.keys()
    for key, saved in state.items():
        np.testing.assert_array_equal(read[key].astype(np.float64), saved.detach().double().numpy())
    torch.save(torch.nn.Linear(2, 2), tmp_path / "b.pt", _use_new_zipfile_serialization=not legacy)
    assert "torch.nn.modules.linear.Linear" in refusal(read_state_dict, tmp_path / "b.pt")


# --- hostile and damaged files ---


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
    assert f".{called}, which" in message and "was not run" in message
    assert not marker.exists()
    pickle.loads(evil + b".")  # and it would have run
    assert marker.exists()


@pytest.mark.parametrize(
    "module, attribute",
    [("builtins", "getattr"), ("torch", "load"), ("torch.storage", "_load_from_bytes"), ("numpy", "fromfile")]
    + [("collections", "OrderedDict.__init__"), ("torch._utils", "_rebuild_tensor_v2.__globals__")],
)
def test_any_other_name_is_refused(tmp_path, module, attribute):
    path = write_zip(tmp_path / "a.pt", mapping({"a": name(module, attribute)}), {})
    assert f"{module}.{attribute}" in refusal(read_state_dict, path)


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
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "neither a PyTorch nor a safetensors" in refusal(read_state_dict, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    assert "is a zip, but not" in refusal(read_state_dict, path)
    write_zip(path, mapping({"epoch": value(3)}), {})
    assert "'epoch' (int), which is not a tensor" in refusal(read_state_dict, path)


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


# --- LoFTR ---


def test_all_80_arrays_arrive_transposed_where_torch_has_out_by_in(tmp_path):
    state = loftr_state()
    path = write_torch(tmp_path / "outdoor_ds.ckpt", state | {"matcher.backbone.conv1.weight": np.ones(3)}, unwrap=True)
    params = transformer_from_loftr(path)
    flat = flatten_dict(params, sep="/")
    assert len(flat) == 80
    assert sum(array.size for array in flat.values()) == 5_251_072
    assert all(array.dtype == np.float32 for array in flat.values())

    coarse = "matcher.loftr_coarse.layers."
    np.testing.assert_array_equal(params["layer_3"]["q_proj"]["kernel"], state[coarse + "3.q_proj.weight"].T)
    np.testing.assert_array_equal(params["layer_7"]["norm2"]["scale"], state[coarse + "7.norm2.weight"])
    np.testing.assert_array_equal(params["layer_0"]["norm1"]["bias"], state[coarse + "0.norm1.bias"])
    assert params["layer_0"]["mlp_2"]["kernel"].shape == (512, 256)

    target = unflatten_dict({key: np.zeros_like(array) for key, array in flat.items()}, sep="/")
    loaded = flatten_dict(load_loftr(path, target), sep="/")
    assert loaded.keys() == flat.keys()
    assert all(np.array_equal(array, flat[key]) for key, array in loaded.items())


@pytest.mark.parametrize("fix, told", [(True, 1), (False, 0)])
def test_the_position_encoding_that_published_weights_want_is_told(tmp_path, capsys, fix, told):
    path = write_torch(tmp_path / "outdoor_ds.ckpt", loftr_state(), unwrap=True)
    target = jax.tree.map(np.zeros_like, transformer_from_loftr(path))
    config = preset("smoke", DenseConfig).replace(loftr_ckpt=str(path), temp_bug_fix=fix)
    with_loftr({"loftr_transformer": target}, config)
    assert capsys.readouterr().out.count("--set temp_bug_fix=false") == told


@pytest.mark.parametrize("prefix", ["matcher.", ""])
def test_there_and_back_again(tmp_path, prefix):
    state = loftr_state(layers=2, width=8, prefix=prefix)
    there = transformer_from_loftr(write_torch(tmp_path / "a.ckpt", state))
    back = loftr_from_transformer(there)
    assert back.keys() == {f"matcher.{key.removeprefix('matcher.')}" for key in state}
    for key, array in state.items():
        np.testing.assert_array_equal(back[f"matcher.{key.removeprefix('matcher.')}"], array)
    again = transformer_from_loftr(write_safetensors(tmp_path / "b.safetensors", back))
    for ours, first in flatten_dict(there, sep="/").items():
        np.testing.assert_array_equal(flatten_dict(again, sep="/")[ours], first)


def test_four_layers_take_no_half_of_eight(tmp_path):
    path = write_torch(tmp_path / "a.ckpt", loftr_state(layers=8, width=8))
    target = transformer_from_loftr(write_torch(tmp_path / "b.ckpt", loftr_state(layers=4, width=8)))
    message = refusal(load_loftr, path, target)
    assert "file has 8 encoder layers, the transformer 4" in message
    assert "--set transformer_layers=4" in message
    assert all(f"layer_{i} is not in the transformer" in message for i in range(4, 8))
    assert "layer_3" not in message

    wide = transformer_from_loftr(path)
    assert "--set transformer_layers=2" in (message := refusal(load_loftr, tmp_path / "b.ckpt", wide))
    assert "layer_7 is not in the file" in message


def test_every_mismatch_stands_in_the_one_message(tmp_path):
    state = loftr_state(layers=2, width=8)
    target = transformer_from_loftr(write_torch(tmp_path / "a.ckpt", state))
    target["layer_0"]["q_proj"]["bias"] = np.zeros(8)
    target["layer_1"]["merge"]["kernel"] = np.zeros((8, 4))
    del state["matcher.loftr_coarse.layers.1.norm1.bias"]
    state["matcher.loftr_coarse.layers.0.attention.weight"] = np.zeros(3)
    state["loftr_coarse.layers.0.norm1.bias"] = np.zeros(8)
    message = refusal(load_loftr, write_torch(tmp_path / "b.ckpt", state), target)
    assert "layer_0/q_proj/bias is not in the file" in message
    assert "layer_1/merge/kernel is (8, 8) in the file and (8, 4) in the transformer" in message
    assert "layer_1/norm1/bias is not in the file" in message
    assert "matcher.loftr_coarse.layers.0.attention.weight is not one of LoFTR's arrays" in message
    assert "; loftr_coarse.layers.0.norm1.bias is not one" in message  # there twice
    message = refusal(transformer_from_loftr, tmp_path / "b.ckpt")
    assert "attention.weight" in message and "layer_1/norm1/bias is missing" in message


def test_a_file_without_loftrs_coarse_transformer_is_refused(tmp_path):
    fine = {"matcher.loftr_fine.layers.0.q_proj.weight": np.ones((2, 2), np.float32)}
    assert "holds no LoFTR" in refusal(transformer_from_loftr, write_torch(tmp_path / "a.ckpt", fine))


def test_an_array_that_loftr_has_not_is_not_exported():
    assert "layer_0/q_proj/bias" in refusal(loftr_from_transformer, {"layer_0": {"q_proj": {"bias": np.zeros(2)}}})


NESTED = b")" + b"\x85" * 1_000_000  # a tuple of a million levels


@pytest.mark.parametrize("body, how", [
    (b"}" + NESTED + b"Ns.", "refused"), (b"}(" + NESTED + b"Nu.", "refused"), (b"(" + NESTED + b"Nd.", "refused"), (b"\x8f.", "refused"),
    (b"}r\xff\xff\xff\xff.", "read"), (b"}r" + (60_000_000).to_bytes(4, "little") + b".", "read")])
def test_a_hostile_pickle_neither_ends_the_process_nor_fills_the_memory(body, how, tmp_path):
    """C's unpickler hashes a key of any depth, and makes room for any index of its memo."""
    with zipfile.ZipFile(tmp_path / "evil.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body)
    code = """if True:
        import resource, sys
        from ifvit.errors import UserError
        from ifvit.foreign.torch_file import read_state_dict
        memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
        before = memory()
        try:
            read_state_dict(sys.argv[1])
            print("read", memory() - before)
        except UserError as e:
            print("refused", memory() - before)"""
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "evil.ckpt")], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, ""), said
    ended, megabytes = said.stdout.split()
    assert ended == how and int(megabytes) < 300
