"""Legacy checkpoints come back to the bit, or are refused with a sentence; nothing in a file is ever run."""

import argparse
import collections
import json
import os
import pickle
import pickletools
import sys
import types
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen, nnx, serialization
from flax.core import freeze
from flax.training.train_state import TrainState
from hostile import refused, watch  # noqa: F401, fixtures

from ifvit import legacy
from ifvit.errors import UserError
from ifvit.training.saved import _without_empty

PROTOCOLS = range(6)
PARAMS = {"dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}

PARAMS_OF_ZEROS = jax.tree.map(np.zeros_like, PARAMS)


@pytest.fixture
def read(tmp_path):
    """Reads what the real pickle writes of a value."""

    def call(value, protocol=4) -> legacy.Legacy:
        path = tmp_path / "legacy.pkl"
        path.write_bytes(pickle.dumps(value, protocol))
        return legacy.read(path)

    return call


def bits(tree):
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    tree = np.asarray(tree)
    return tree.dtype.name, tree.dtype.isnative, tree.shape, tree.tobytes()


def leaf(read, value, protocol=4):
    """What becomes of a leaf of the parameters."""
    return read({"params": {"a": value, "b": np.zeros(1)}}, protocol).state["params"]["a"]


# ---- round trips


STATE = {
    "params": {
        "loftr_transformer": {"layer_0": {"q_proj": {"kernel": np.random.default_rng(0).random((3, 4), np.float32)}}},
        "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        "empty": np.zeros((0, 5), np.int8),
        "scalar": np.array(2.5),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(12.0)[::3],
        "flags": np.array([True, False]),
        "complex": np.array([1j], np.complex64),
    },
    "batch_stats": {"mean": np.ones((2, 1, 2), np.float16)},
    "opt_state": {
        "0": {
            "count": np.int32(7),
            "mu": {"w": np.arange(5).astype(ml_dtypes.bfloat16)},
            "nu": {"w": np.arange(5).astype(ml_dtypes.float8_e4m3fn)},
        }
    },
    "step": np.int32(12),
}
METADATA = {"epoch": 3, "config": {"lr": 0.1 + 0.2, "roots": ["a", "é"], "none": None, "flag": True}}


def test_what_was_written_is_read_to_the_bit(tmp_path):
    legacy.write(tmp_path / "a.pkl", STATE, METADATA, "2024-05-01T10:00:00+00:00")
    found = legacy.read(tmp_path / "a.pkl")
    assert bits(found.state) == bits(STATE)
    assert (found.metadata, found.timestamp) == (METADATA, "2024-05-01T10:00:00+00:00")


def test_the_ordinary_pickle_reads_what_was_written_in_the_guides_layout(tmp_path):
    legacy.write(tmp_path / "a.pkl", STATE, METADATA, "now")
    found = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert list(found) == ["state", "metadata", "timestamp"] and found["timestamp"] == "now"
    assert type(found["state"]["step"]) is int and found["state"]["step"] == 12
    assert bits(found["state"]["opt_state"]) == bits(STATE["opt_state"])


def test_what_was_written_names_nothing_that_numpy_1_lacks(tmp_path):
    legacy.write(tmp_path / "a.pkl", STATE, METADATA, None)
    ops = list(pickletools.genops((tmp_path / "a.pkl").read_bytes()))
    assert max(op.proto for op, *_ in ops) <= 4
    named = {arg for op, arg, _ in ops if isinstance(arg, str) and "numpy" in arg}
    assert named == {"numpy", "numpy.core.multiarray _reconstruct"}


def test_jax_arrays_are_written_as_numpys(tmp_path):
    legacy.write(tmp_path / "a.pkl", {"params": {"w": jnp.ones(3, jnp.bfloat16)}}, {}, None)
    assert b"jax" not in (tmp_path / "a.pkl").read_bytes()
    assert bits(legacy.read(tmp_path / "a.pkl").state) == bits({"params": {"w": np.ones(3, ml_dtypes.bfloat16)}})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.pkl"
    legacy.write(path, STATE, METADATA, None)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        legacy.write(path, STATE, METADATA, None)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pkl"]


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        legacy.write(tmp_path / "file" / "a.pkl", STATE, METADATA, None)


def test_objects_are_not_written(tmp_path):
    with pytest.raises(UserError):
        legacy.write(tmp_path / "a.pkl", {"params": {"w": np.array([object()])}}, {}, None)
    assert not os.listdir(tmp_path)


# ---- what the real libraries pickle


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "int4", "float8_e5m2"])
def test_jax_arrays_become_numpy_arrays(read, name, protocol):
    array = jnp.arange(6).reshape(2, 3).astype(name)
    assert bits(leaf(read, array, protocol)) == bits(np.asarray(array))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
        np.arange(12)[::-2],
        np.array(7),
        np.zeros((0, 3)),
        np.arange(3, dtype=np.uint64),
        np.arange(3).astype(ml_dtypes.bfloat16),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.float32(3),
        np.int64(-3),
        np.bool_(True),
        ml_dtypes.bfloat16(1.5),
    ],
)
def test_numpy_arrays_and_scalars_keep_type_shape_and_bits(read, array, protocol):
    assert bits(leaf(read, array, protocol)) == bits(array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", [">f4", ">i8", ">c8", ">f2"])
def test_arrays_of_the_other_byte_order_come_in_this_machines(read, kind, protocol):
    array = np.array([[1, 2, 300], [4, 5, 6]], kind)
    for a in (array, np.asfortranarray(array), array[0, 2]):
        assert bits(leaf(read, a, protocol)) == bits(a.astype(a.dtype.newbyteorder("=")))


def test_the_names_of_numpy_1_and_2_are_one(tmp_path):
    for protocol in PROTOCOLS:
        two = pickle.dumps({"params": {"w": np.arange(3.0), "s": np.float32(1)}}, protocol)
        one = (
            two.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
            .replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
            .replace(b"cnumpy._core", b"cnumpy.core")
        )
        assert b"numpy.core" in one and b"_core" not in one
        (tmp_path / "a.pkl").write_bytes(one)
        assert bits(legacy.read(tmp_path / "a.pkl").state["params"]) == bits({"w": np.arange(3.0), "s": np.float32(1)})


def test_arrays_cannot_be_written_to_since_one_may_stand_in_two_places(read):
    shared = np.arange(3.0)
    found = read({"params": {"a": shared, "b": shared}}, 5).state["params"]
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1
    assert found["b"].tolist() == [0, 1, 2]


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=True)(linen.Dense(3)(x))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("frozen", [True, False])
def test_linens_variables_come_as_the_guide_has_them(read, protocol, frozen):
    variables = jax.device_get(Net().init(jax.random.key(0), jnp.ones((1, 2))))
    found = read(freeze(variables) if frozen else variables, protocol)
    assert bits(found.state) == bits(dict(variables))
    inside = read({"state": {"params": freeze(variables), "step": 1}}, protocol)
    assert bits(inside.state["params"]) == bits(dict(variables))


OPTIMISERS = {
    "adamw": optax.adamw(optax.warmup_cosine_decay_schedule(0, 1, 2, 5)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-1.0)),
    "masked": optax.masked(optax.adam(1e-3), {"dense": {"kernel": True, "bias": False}}),
    "partition": optax.partition(
        {"a": optax.adam(1e-3), "b": optax.set_to_zero()}, {"dense": {"kernel": "a", "bias": "b"}}
    ),
    "inject": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "steps": optax.MultiSteps(optax.adam(1e-3), 4),
    "factored": optax.adafactor(1e-3),
    "finite": optax.apply_if_finite(optax.lamb(1e-3), 3),
    "ema": optax.chain(optax.ema(0.9), optax.contrib.prodigy(1.0)),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optax_states_become_flaxs_state_dicts_without_the_empty_ones(read, name, protocol):
    opt_state = jax.device_get(OPTIMISERS[name].init(jax.tree.map(jnp.asarray, PARAMS)))
    wanted = _without_empty(serialization.to_state_dict(opt_state))
    assert bits(read({"state": {"params": PARAMS, "opt_state": opt_state}}, protocol).state["opt_state"]) == bits(
        wanted
    )


def test_an_optax_state_of_another_version_comes_by_position(read, monkeypatch):
    monkeypatch.delitem(legacy._optax_fields(), "ScaleByAdamState")
    adam = optax.adam(1e-3).init(PARAMS)
    found = read({"params": PARAMS, "opt_state": adam}).state["opt_state"]
    assert bits(found["0"]) == bits({"0": np.asarray(adam[0].count), "1": PARAMS_OF_ZEROS, "2": PARAMS_OF_ZEROS})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_train_state_becomes_its_parts(read, protocol):
    state = TrainState(step=5, apply_fn=None, params=PARAMS, tx=None, opt_state=optax.sgd(0.1, 0.9).init(PARAMS))
    for found in (read(state, protocol), read({"state": state, "metadata": {}}, protocol)):
        assert set(found.state) == {"step", "params", "opt_state"}
        assert bits(found.state["params"]) == bits(PARAMS) and bits(found.state["step"]) == bits(np.int32(5))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nnx_states_become_their_arrays(read, protocol):
    model = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )
    params, stats, _ = nnx.state(model, nnx.Param, nnx.BatchStat, ...)
    found = read({"params": params, "batch_stats": stats}, protocol).state
    wanted = jax.device_get({"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)})
    assert bits(found) == bits(json_keys(wanted))
    optimiser = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    found = read({"params": params, "opt_state": nnx.state(optimiser)}, protocol).state["opt_state"]
    assert bits(found) == bits(json_keys(jax.device_get(nnx.to_pure_dict(nnx.state(optimiser)))))


def json_keys(tree):
    return {str(k): json_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_keys_become_their_numbers(read, protocol):
    typed = [jax.random.key(3)] if protocol > 1 else []  # JAX 0.12 writes them with protocol 2 and newer only
    for key in (*typed, jax.random.PRNGKey(3)):
        found = read({"params": PARAMS, "rng": key}, protocol)
        assert bits(found.state["rng"]) == bits(np.array([0, 3], np.uint32))


def test_containers_and_numbers_of_the_state_become_dictionaries_and_arrays(read):
    odd = {
        "list": [1, 2.5],
        "tuple": (True, None, ()),
        3: np.int8(1),
        "none": None,
        "empty": {},
        "big": 2**40,
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(dict, a=1),
    }
    found = read({"params": PARAMS | {"odd": odd}}, 2).state["params"]["odd"]
    one = np.int32(1)
    assert bits(found) == bits(
        {
            "list": {"0": one, "1": np.float32(2.5)},
            "tuple": {"0": np.True_},
            "3": np.int8(1),
            "big": np.int64(2**40),
            "ordered": {"a": one},
            "default": {"a": one},
        }
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_metadata_become_plain_json(read, protocol):
    metadata = {
        "epoch": np.int64(3),
        "loss": np.float32(0.5),
        "bf16": ml_dtypes.bfloat16(1.5),
        "path": Path("a/b"),
        "pure": PurePosixPath("/c"),
        "config": argparse.Namespace(lr=1e-3, sizes=(1, 2)),
        "kind": jnp.bfloat16,
        "dtype": np.float32,
        "more": types.SimpleNamespace(x=None),
        "rates": np.array([[1, 2]]),
        "jax": jnp.ones(2),
        "set": {1},
        "ordered": collections.OrderedDict(a=[1]),
        5: True,
        "none": np.zeros((3, 0)),
    }
    found = read({"state": {"params": PARAMS}, "metadata": metadata, "timestamp": "t"}, protocol)
    assert found.timestamp == "t"
    assert (
        json.loads(json.dumps(found.metadata))
        == found.metadata
        == {
            "epoch": 3,
            "loss": 0.5,
            "bf16": 1.5,
            "path": "a/b",
            "pure": "/c",
            "config": {"lr": 1e-3, "sizes": [1, 2]},
            "kind": "bfloat16",
            "dtype": "float32",
            "more": {"x": None},
            "rates": [[1, 2]],
            "jax": [1.0, 1.0],
            "set": [1],
            "ordered": {"a": [1]},
            "5": True,
            "none": [],
        }
    )


class ConfigDict:
    """As ml_collections pickles it (config_dict.py: `__setstate__` reads `_fields`)."""

    __module__, __qualname__ = "ml_collections.config_dict.config_dict", "ConfigDict"

    def __init__(self, **fields):
        self.__dict__.update(_fields=fields, _locked=True, _type_safe=True, _convert_dict=True)


def test_a_config_dict_becomes_a_dictionary(read, monkeypatch):
    for name in ("ml_collections", "ml_collections.config_dict", "ml_collections.config_dict.config_dict"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[ConfigDict.__module__], "ConfigDict", ConfigDict, raising=False)
    for protocol in PROTOCOLS:
        found = read(
            {"state": {"params": PARAMS}, "metadata": {"config": ConfigDict(lr=0.1, model=ConfigDict(width=8))}},
            protocol,
        )
        assert found.metadata == {"config": {"lr": 0.1, "model": {"width": 8}}}


def test_the_three_layouts_are_told_apart(read):
    full = read({"state": {"params": PARAMS, "step": 2}, "metadata": {"epoch": 1}, "timestamp": "t", "version": 2})
    assert set(full.state) == {"params", "step"} and full.metadata == {"epoch": 1, "version": 2}
    flat = read(
        {"params": PARAMS, "step": 2, "ema": PARAMS, "epoch": np.int32(1), "config": {"lr": 0.1}, "timestamp": "t"}
    )
    assert set(flat.state) == {"params", "step", "ema"} and flat.metadata == {"epoch": 1, "config": {"lr": 0.1}}
    assert flat.timestamp == "t"
    bare = read(PARAMS)
    assert bits(bare.state) == bits({"params": PARAMS}) and (bare.metadata, bare.timestamp) == ({}, None)


# ---- other files


@pytest.mark.parametrize(
    "value, why",
    [
        ([1, 2], "holds a list, not a dictionary"),
        (np.ones(2), "holds a ndarray, not a dictionary"),
        ({}, "holds no params"),
        ({"a": {}, "b": None}, "holds no params"),
        ({"state": {"step": 1}}, "holds no params"),
        ({"params": np.ones(1)}, "holds no params"),
        ({"params": {"a": "text"}}, "holds no params"),
        ({"params": {"a": b"raw"}}, "holds no params"),
    ],
)
def test_a_pickle_of_something_else_says_what_it_holds(read, value, why):
    with pytest.raises(UserError, match=why):
        read(value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 100,
        b"hello, this is no pickle",
        b"PK\x03\x04" + bytes(50),
        b"\x1f\x8b\x08" + bytes(20),
        b"\x89PNG\r\n\x1a\n",
        b'{"params": 1}',
        np.random.default_rng(0).bytes(10_000),
    ],
    ids=lambda r: str(r[:8]),
)
def test_a_file_that_is_no_pickle_is_refused(refused, raw):
    refused(raw)


def test_every_truncation_is_refused(tmp_path):
    legacy.write(tmp_path / "a.pkl", {"params": {"w": np.arange(3.0)}, "step": np.int32(1)}, METADATA, "now")
    raw = (tmp_path / "a.pkl").read_bytes()
    for end in range(len(raw)):
        (tmp_path / "a.pkl").write_bytes(raw[:end])
        with pytest.raises(UserError, match="truncated, corrupt or no pickle|instruction PERSID"):
            legacy.read(tmp_path / "a.pkl")


def test_a_path_that_is_no_readable_file_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, why in (
        (tmp_path / "none.pkl", "Checkpoint not found: "),
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),
        (tmp_path / "loop", "cannot be read|not found"),
        ("/dev/zero", "is not a file"),
        ("a\0b", "corrupt|not found"),
    ):
        with pytest.raises(UserError, match=why):
            legacy.read(path)
