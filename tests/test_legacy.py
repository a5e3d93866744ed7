"""Legacy checkpoints come back to the bit, or are refused with a sentence; nothing in a file is ever run."""

import argparse
import collections
import json
import os
import pickle
import pickletools
import subprocess
import sys
import time
import tracemalloc
import types
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from bench import fuzz_pickles
from flax import linen, nnx, serialization
from flax.core import freeze
from flax.traverse_util import flatten_dict
from flax.training.train_state import TrainState

from ifvit import legacy
from ifvit.foreign import legacy_transformer
from ifvit.errors import UserError
from ifvit.models.transformer import Transformer
from ifvit.training.loop import _without_empty

PROTOCOLS = range(6)
PARAMS = {"dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}


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
    "params": {"loftr_transformer": {"layer_0": {"q_proj": {"kernel": np.random.default_rng(0).random((3, 4), np.float32)}}},
               "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32), "empty": np.zeros((0, 5), np.int8),
               "scalar": np.array(2.5), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
               "strided": np.arange(12.0)[::3], "flags": np.array([True, False]), "complex": np.array([1j], np.complex64)},
    "batch_stats": {"mean": np.ones((2, 1, 2), np.float16)},
    "opt_state": {"0": {"count": np.int32(7), "mu": {"w": np.arange(5).astype(ml_dtypes.bfloat16)},
                        "nu": {"w": np.arange(5).astype(ml_dtypes.float8_e4m3fn)}}},
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
@pytest.mark.parametrize("array", [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
    np.arange(12)[::-2], np.array(7), np.zeros((0, 3)), np.arange(3, dtype=np.uint64), np.arange(3).astype(ml_dtypes.bfloat16),
    np.array([True, False]), np.array([1 + 2j]), np.float32(3), np.int64(-3), np.bool_(True), ml_dtypes.bfloat16(1.5)])  # fmt: skip
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
        one = two.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray").replace(
            b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric").replace(b"cnumpy._core", b"cnumpy.core")
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
    "partition": optax.partition({"a": optax.adam(1e-3), "b": optax.set_to_zero()}, {"dense": {"kernel": "a", "bias": "b"}}),
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
    assert bits(read({"state": {"params": PARAMS, "opt_state": opt_state}}, protocol).state["opt_state"]) == bits(wanted)


def test_an_optax_state_that_is_not_known_is_named(read, monkeypatch):
    monkeypatch.delitem(legacy._optax_fields(), "ScaleByAdamState")
    with pytest.raises(UserError, match="optax._src.transform.ScaleByAdamState.*without opt_state"):
        read({"params": PARAMS, "opt_state": optax.adam(1e-3).init(PARAMS)})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_train_state_becomes_its_parts(read, protocol):
    state = TrainState(step=5, apply_fn=None, params=PARAMS, tx=None, opt_state=optax.sgd(0.1, 0.9).init(PARAMS))
    for found in (read(state, protocol), read({"state": state, "metadata": {}}, protocol)):
        assert set(found.state) == {"step", "params", "opt_state"}
        assert bits(found.state["params"]) == bits(PARAMS) and bits(found.state["step"]) == bits(np.int32(5))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nnx_states_become_their_arrays(read, protocol):
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
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
    odd = {"list": [1, 2.5], "tuple": (True, None, ()), 3: np.int8(1), "none": None, "empty": {}, "big": 2**40,
           "ordered": collections.OrderedDict(a=1), "default": collections.defaultdict(dict, a=1)}
    found = read({"params": PARAMS | {"odd": odd}}, 2).state["params"]["odd"]
    one = np.int32(1)
    assert bits(found) == bits({"list": {"0": one, "1": np.float32(2.5)}, "tuple": {"0": np.True_}, "3": np.int8(1),
                                "big": np.int64(2**40), "ordered": {"a": one}, "default": {"a": one}})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_metadata_become_plain_json(read, protocol):
    metadata = {"epoch": np.int64(3), "loss": np.float32(0.5), "bf16": ml_dtypes.bfloat16(1.5), "path": Path("a/b"),
                "pure": PurePosixPath("/c"), "config": argparse.Namespace(lr=1e-3, sizes=(1, 2)), "kind": jnp.bfloat16,
                "dtype": np.float32, "more": types.SimpleNamespace(x=None), "rates": np.array([[1, 2]]), "jax": jnp.ones(2),
                "set": {1}, "ordered": collections.OrderedDict(a=[1]), 5: True, "none": np.zeros((3, 0))}
    found = read({"state": {"params": PARAMS}, "metadata": metadata, "timestamp": "t"}, protocol)
    assert found.timestamp == "t"
    assert json.loads(json.dumps(found.metadata)) == found.metadata == {
        "epoch": 3, "loss": 0.5, "bf16": 1.5, "path": "a/b", "pure": "/c", "config": {"lr": 1e-3, "sizes": [1, 2]},
        "kind": "bfloat16", "dtype": "float32", "more": {"x": None}, "rates": [[1, 2]], "jax": [1.0, 1.0], "set": [1],
        "ordered": {"a": [1]}, "5": True, "none": []}


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
        found = read({"state": {"params": PARAMS}, "metadata": {"config": ConfigDict(lr=0.1, model=ConfigDict(width=8))}}, protocol)
        assert found.metadata == {"config": {"lr": 0.1, "model": {"width": 8}}}


def test_the_three_layouts_are_told_apart(read):
    full = read({"state": {"params": PARAMS, "step": 2}, "metadata": {"epoch": 1}, "timestamp": "t", "version": 2})
    assert set(full.state) == {"params", "step"} and full.metadata == {"epoch": 1, "version": 2}
    flat = read({"params": PARAMS, "step": 2, "ema": PARAMS, "epoch": np.int32(1), "config": {"lr": 0.1}, "timestamp": "t"})
    assert set(flat.state) == {"params", "step", "ema"} and flat.metadata == {"epoch": 1, "config": {"lr": 0.1}}
    assert flat.timestamp == "t"
    bare = read(PARAMS)
    assert bits(bare.state) == bits({"params": PARAMS}) and (bare.metadata, bare.timestamp) == ({}, None)


# ---- hostile files: instructions put together by hand, or by pickle


def text(s):
    return b"X" + len(s.encode()).to_bytes(4, "little") + s.encode()


def name(dotted):
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(dotted, *args):
    return name(dotted) + b"(" + b"".join(args) + b"tR"


def under(key, value):
    return b"}" + text(key) + value + b"s"


@pytest.fixture(scope="session")
def watch():
    legacy._optax_fields()  # imports optax; nothing later does
    return fuzz_pickles.Watch()


@pytest.fixture
def refused(tmp_path, monkeypatch, watch):
    """The sentence a file is refused with; it opened no other file, imported and started nothing, took little memory and time."""
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
        assert not events and os.listdir(tmp_path) == ["hostile.pkl"]
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


@pytest.mark.process
def test_the_trap_works_where_pickle_itself_reads_it(tmp_path):
    for raw in (SYSTEM + b".", pickle.dumps(Trap()), b"(" + text(TRAP) + b"ios\nsystem\n.", b"(cos\nsystem\n" + text(TRAP) + b"o."):
        (tmp_path / "hostile.pkl").write_bytes(raw)
        subprocess.run([sys.executable, "-c", "import pickle; pickle.load(open('hostile.pkl', 'rb'))"], cwd=tmp_path, check=True)
        (tmp_path / "executed").unlink()


def test_the_watch_sees_an_execution(tmp_path, watch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with watch(tmp_path / "x") as events:
        pickle.loads(SYSTEM + b".")
    assert "os.system" in [event for event, _ in events]


@pytest.mark.parametrize("dotted", """
    os.system posix.system nt.system os.popen os.remove os.environ subprocess.Popen subprocess.call subprocess.check_output
    builtins.eval builtins.exec builtins.getattr builtins.setattr builtins.__import__ builtins.compile builtins.open
    builtins.type builtins.map builtins.print builtins.vars builtins.globals __builtin__.eval __builtin__.apply
    functools.partial functools.reduce operator.attrgetter operator.methodcaller operator.itemgetter operator.call
    importlib.import_module importlib._bootstrap._call_with_frames_removed runpy.run_path types.FunctionType types.CodeType
    marshal.loads pickle.loads _pickle.loads pickle.Unpickler cloudpickle.cloudpickle._make_function cloudpickle.loads
    copyreg.__newobj__ copyreg.add_extension copy.copy codecs.encode codecs.decode _codecs.decode _codecs.lookup
    numpy.load numpy.fromfile numpy.memmap numpy.vectorize numpy.core.numeric.fromfile numpy.core.multiarray.fromfile
    numpy._core.multiarray._reconstruct.__class__ numpy.testing._private.utils.runstring numpy.f2py.compile
    numpy.f2py.crackfortran.myeval numpy.lib.npyio.NpzFile numpy.ma.core._mareconstruct numpy.ndarray.tofile
    numpy.dtype.__class__ jax.jit jax.numpy.load jax.pure_callback jax._src.array.ArrayImpl jax._src.random.prng.os
    ml_dtypes.os flax.serialization.from_bytes flax.core.frozen_dict.os pandas.read_pickle pandas.eval torch.load
    joblib.load shutil.rmtree socket.socket pty.spawn code.interact timeit.timeit pdb.run webbrowser.open ctypes.CDLL
    pathlib.Path pathlib.os argparse.FileType argparse.os types.os collections.abc.os collections._sys
    ifvit.legacy.write ifvit.legacy.os __main__.Anything site.os sys.modules sys.exit
""".split())
def test_a_call_of_anything_else_is_refused_by_name(refused, dotted):
    named = dotted.replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
    assert f"needs {named}, which is not an array or a plain container; it was refused" in refused(call(dotted, text(TRAP)) + b".")
    assert f"needs {named}, " in refused(name(dotted) + b".")  # a name alone, too


@pytest.mark.parametrize("dotted", ["optax.os.system", "optax._src.base.Evil", "flax.nnx.os.system", "flax.nnx.variablelib.Param",
                                    "builtins.list", "builtins.object", "numpy.ndarray", "numpy.dtype", "numpy.float32",
                                    "jax._src.random.threefry2x32.threefry_seed", "my.TrainState", "argparse.Namespace"])
def test_a_known_name_called_otherwise_than_its_library_does_is_refused(refused, dotted):
    said = refused(under("params", under("a", call(dotted, text(TRAP)))) + b".")
    assert dotted in said and "cannot" not in said


WAYS = {
    "REDUCE": SYSTEM,
    "REDUCE of STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(TRAP) + b"\x85R",
    "NEWOBJ": name("os.system") + text(TRAP) + b"\x85\x81",
    "NEWOBJ_EX": name("os.system") + text(TRAP) + b"\x85}\x92",
    "INST": b"(" + text(TRAP) + b"ios\nsystem\n",
    "OBJ": b"(" + name("os.system") + text(TRAP) + b"o",
    "BUILD": call("argparse.Namespace") + b"}" + text("__setstate__") + name("os.system") + b"sb" + text(TRAP) + b"b",
    "APPEND to a list's like": name("os.system") + text(TRAP) + b"a",
    "SETITEM in a dictionary's like": name("os.system") + text(TRAP) + b"Ns",
    "ADDITEMS": name("os.system") + b"(" + text(TRAP) + b"\x90",
    "from the memo": name("os.system") + b"q\x070h\x07" + text(TRAP) + b"\x85R",
    "thrown away": SYSTEM + b"0N",
    "after STOP's value": b"N" + SYSTEM,
    "as a key": b"}" + SYSTEM + b"Ns",
    "in a class of OrderedDict": call("collections.OrderedDict", b"(" + text("a") + SYSTEM + b"t"),
    "as defaultdict's factory": call("collections.defaultdict", name("os.system")) + text("a") + b"Ns",
    "by copyreg": call("copyreg._reconstructor", name("os.system"), name("builtins.object"), b"N"),
    "by copyreg's base": call("copyreg._reconstructor", name("argparse.Namespace"), name("os.system"), b"N"),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_call_is_refused_wherever_it_stands(refused, way):
    for raw in (WAYS[way] + b".", under("params", WAYS[way]) + b".",
                under("state", under("opt_state", b"(" + name("optax._src.base.EmptyState") + b")\x81" + WAYS[way] + b"t")) + b"."):
        assert "needs os.system, " in refused(raw)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_that_pickle_hides_in_a_checkpoint_is_refused(refused, protocol):
    adam = optax.adam(1e-3).init(PARAMS)
    objects = np.array([None, Trap()], object)
    for state in ({"params": PARAMS | {"x": Trap()}}, {"params": PARAMS, "opt_state": (adam[0]._replace(mu=Trap()),)},
                  {"params": freeze({"a": [Trap()]})}, {"params": {"a": objects}}, {"params": PARAMS, "rng": objects.reshape(1, 2)}):
        said = refused(pickle.dumps({"state": state, "metadata": {}, "timestamp": "t"}, protocol))
        assert f"needs {os.system.__module__}.system, " in said


def test_copyreg_makes_nothing_but_objects_and_tuples(refused):
    for base in ("dict", "list", "int"):
        raw = call("copyreg._reconstructor", name("argparse.Namespace"), name(f"builtins.{base}"), b"]")
        assert f"argparse.Namespace on builtins.{base}" in refused(raw + b".")


@pytest.mark.parametrize("op, raw", {
    "EXT1": b"\x82\x01", "EXT2": b"\x83\x01\x00", "EXT4": b"\x84\x01\x00\x00\x00", "PERSID": b"Pos.system\n",
    "BINPERSID": text("os.system") + b"Q", "NEXT_BUFFER": b"\x97", "READONLY_BUFFER": b"C\x01a\x98"}.items())
def test_what_lies_outside_the_file_is_refused(refused, op, raw):
    assert f"has the instruction {op}, which refers to something outside the file" in refused(raw + b".")


@pytest.mark.parametrize("dtype", ["O", "V8", "M8[s]", "m8[s]", "U5", "S5", [("a", "f4")], [("a", "O")], ("f4", (2,))], ids=str)
def test_arrays_of_anything_but_numbers_are_refused_by_type(refused, dtype):
    for value in (np.zeros(2, dtype), np.zeros(2, dtype)[0]) if dtype not in ("O", ("f4", (2,))) else (np.array([None, 1], object),):
        said = refused(pickle.dumps({"params": {"a": value}}, 4))
        assert "holds an array of type" in said


def array(shape, raw, code=b"f4", version=b"K\x01", order=b"<", fields=b"NNN"):
    """_reconstruct(ndarray, (0,), b'b') with its state, by hand; shape: instructions."""
    dtype = call("numpy.dtype", text(code.decode()), b"\x89\x88") + b"(K\x03" + text(order.decode()) + fields + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    made = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), b"K\x00\x85", b"C\x01b")
    return made + b"(" + version + shape + dtype + b"\x89" + raw + b"tb"


def number(n):
    raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


FOUR = b"C\x04\x00\x00\x80?"


def test_the_hand_made_array_is_read_when_it_is_right(tmp_path):
    (tmp_path / "a.pkl").write_bytes(under("params", under("a", array(number(1) + b"\x85", FOUR))) + b".")
    assert bits(legacy.read(tmp_path / "a.pkl").state["params"]["a"]) == bits(np.ones(1, np.float32))


@pytest.mark.parametrize("made", {
    "more than its bytes": array(number(2) + b"\x85", FOUR),
    "fewer than its bytes": array(b")", b"C\x05abcde"),
    "a huge product": array(number(2**62) + number(2**62) + b"\x86", FOUR),
    "a product of 0 modulo 2**64": array(number(2**33) + number(2**33) + b"\x86", b"C\x00"),
    "a negative length": array(number(-1) + b"\x85", FOUR),
    "two negative lengths": array(number(-1) + number(-1) + b"\x86", FOUR),
    "a length that is no number": array(text("1") + b"\x85", FOUR),
    "a boolean length": array(b"\x88\x85", FOUR),
    "a shape that is a list": array(b"](K\x01e", FOUR),
    "a shape that is a number": array(b"K\x01", FOUR),
    "40 dimensions": array(b"(" + b"K\x01" * 40 + b"t", FOUR),
    "nothing of a size beyond any": array(number(2**62) + number(2**62) + b"K\x00\x87", b"C\x00"),
    "text for bytes": array(b"K\x01\x85", text("abcd")),
    "a list for bytes": array(b"K\x01\x85", b"](NNNNe"),
    "no bytes": array(b"K\x01\x85", b"N"),
    "no type": call("numpy.core.multiarray.scalar", b"N", FOUR),
    "a scalar of two": call("numpy.core.multiarray.scalar", call("numpy.dtype", text("f4"), b"\x89\x88"), b"C\x08abcdefgh"),
    "a void of no size": array(number(10**9) + b"\x85", b"C\x00", code=b"V0"),
    "text of no size": array(number(10**9) + b"\x85", b"C\x00", code=b"U0"),
    "fields in its type": array(b"K\x01\x85", FOUR, fields=b"N(" + text("a") + b"t}"),
    "a type within its type": array(b"K\x01\x85", FOUR, fields=b"(NNt" + b"NN"),
    "no state": call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), b"K\x00\x85", b"C\x01b"),
    "two states": array(b"K\x01\x85", FOUR) + b"Nb}b",
    "jax's of another function": call("jax._src.array._reconstruct_array", name("numpy.ndarray"), b")", b")", b"}"),
    "jax's of no state": call("jax._src.array._reconstruct_array", name("numpy.core.multiarray._reconstruct"), b")", b"N", b"}"),
    "an order of axes that is none": call("numpy.core.numeric._frombuffer", FOUR, call("numpy.dtype", text("f4"), b"\x89\x88"),
                                          b"K\x01\x85", text("K"), b"K\x05\x85"),
    "an order that is none": call("numpy.core.numeric._frombuffer", FOUR, call("numpy.dtype", text("f4"), b"\x89\x88"),
                                  b"K\x01\x85", text("Z")),
}.items(), ids=lambda item: item[0])
def test_an_array_that_contradicts_itself_is_refused(refused, made):
    refused(under("params", under("a", made[1])) + b".")


def u64(n):
    return n.to_bytes(8, "little")


@pytest.mark.parametrize("op, raw", {
    "BYTEARRAY8": b"\x96" + u64(2**40), "BYTEARRAY8 beyond all": b"\x96" + u64(2**64 - 1), "BINBYTES8": b"\x8e" + u64(2**40),
    "BINBYTES8 beyond all": b"\x8e" + u64(2**63), "BINBYTES": b"B" + b"\xff" * 4, "SHORT_BINBYTES": b"C\xff",
    "BINUNICODE8": b"\x8d" + u64(2**40), "BINUNICODE": b"X" + b"\xff" * 4, "BINSTRING": b"T\xff\xff\xff\x7f",
    "BINSTRING below 0": b"T\xff\xff\xff\xff", "SHORT_BINSTRING": b"U\xff", "LONG4": b"\x8b\xff\xff\xff\x7f",
    "LONG4 below 0": b"\x8b\xff\xff\xff\xff", "LONG1": b"\x8a\xff", "FRAME": b"\x80\x04\x95" + u64(2**62),
    "LONG_BINPUT": b"Nr\xff\xff\xff\xff.", "PUT": b"Np" + b"9" * 4000 + b"\n.", "PUT below 0": b"Np-1\n.",
    "LONG_BINGET": b"j\xff\xff\xff\xff.", "GET": b"g99999999999\n.", "MEMOIZE of nothing": b"\x94.", "PROTO": b"\x80\xff.",
    "INT": b"I" + b"9" * 1_000_000 + b"\n.", "INT of 4000 digits": b"I" + b"9" * 4000 + b"\n.", "LONG": b"L" + b"9" * 1_000_000 + b"L\n.",
    "LONG4 of a megabyte": b"\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".",
    "FLOAT": b"F" + b"9" * 1_000_000 + b"\n.", "FLOAT of nothing": b"F\n.", "UNICODE without end": b"V" + b"a" * 100,
    "UNICODE of half a pair": b"}V\\ud800\nNs.", "STRING without quotes": b"Sabc\n.", "TUPLE without MARK": b"NNt.",
    "TUPLE3 of two": b"NN\x87.", "POP of nothing": b"0.", "POP_MARK": b"1.", "DUP": b"2.", "STOP": b".", "nothing": b"",
    "SETITEMS odd": b"}(Nu.", "DICT odd": b"(K\x01d.", "APPENDS to a tuple": b")(Ne.", "APPEND to text": text("a") + b"Na.",
    "SETITEM in a list": b"]NNs.", "SETITEM in a name": b"cargparse\nNamespace\n" + text("a") + b"Ns.",
    "SETITEM in a call": call("argparse.Namespace") + text("a") + b"Ns.", "REDUCE of a number": b"K\x01)R.",
    "REDUCE of arguments that are none": b"cargparse\nNamespace\nNR.", "REDUCE of a call": call("argparse.Namespace") + b")R.",
    "OBJ of nothing": b"(o.", "OBJ of text": b"(" + text("os") + b"o.", "BUILD of a name": b"cargparse\nNamespace\n}b.",
    "BUILD of a dictionary": b"}}b.", "BUILD of a list": b"]}b.", "BUILD twice": call("argparse.Namespace") + b"}b}b.",
    "BUILD with slots that are none": under("params", call("argparse.Namespace") + b"NK\x01\x86b") + b".",
    "STACK_GLOBAL of numbers": b"K\x01K\x01\x93.", "STACK_GLOBAL of names": name("argparse.Namespace") * 2 + b"\x93.",
    "NEWOBJ_EX with keywords": name("argparse.Namespace") + b")" + under("a", b"N") + b"\x92.",
}.items())
def test_instructions_that_lie_are_refused_and_take_no_memory(refused, op, raw):
    refused(raw + b"abc")


@pytest.mark.parametrize("key", [b")", b"]", b"}", b"N", b"\x88", b"G" + b"\0" * 8, b"C\x01a", name("argparse.Namespace"),
                                 call("argparse.Namespace"), b"K\x01\x85"])
def test_keys_are_text_or_numbers(refused, key):
    assert "with a key of type" in refused(b"}" + key + b"Ns.")


def test_a_key_that_comes_as_text_and_as_number_is_refused(refused):
    assert "twice" in refused(b"}(K\x01N" + text("1") + b"Nu.")


@pytest.mark.parametrize("key", ["", ".", "..", "../../x", "a/b", "a\nb", "\x1b[2J", "\u202e"])
def test_keys_of_the_state_can_name_a_leaf(refused, key):
    assert "which cannot be one of a leaf" in refused(pickle.dumps({"params": {"m": {key: np.ones(1)}}}))


def test_names_from_a_file_cannot_steer_the_terminal(refused):
    said = refused(text("os\x1b[31m") + text("sys\ntem" + "x" * 10_000) + b"\x93.")
    assert "needs os?[31m.sys?tem" in said


N = 20_000


@pytest.mark.parametrize("raw", {
    "lists": b"]" * N + b"a" * (N - 1), "tuples": b")" + b"\x85" * N, "dictionaries": b"}" + (text("a") + b"}") * N + b"s" * N,
    "objects": (name("flax.core.frozen_dict.FrozenDict") * N + b"}" + b"\x85R" * N),
    "optax": name("optax._src.base.EmptyState") * N + b")" + b"\x85\x81" * N,
    "a tuple as key": b"}" + b")" + b"\x85" * N + b"Ns", "a set of tuples": b"\x8f(" + b")" + b"\x85" * N + b"\x90",
    "a state": call("argparse.Namespace") + b")" + b"\x85" * N + b"b", "marks": b"(" * N + b"t" * N,
    "a type": call("numpy.dtype", b")" + b"\x85" * N, b"\x89\x88"), "a shape": array(b")" + b"\x85" * N, FOUR),
}.items(), ids=lambda item: item[0])
def test_deep_nesting_is_refused_without_recursion(refused, raw):
    refused(under("params", raw[1]) + b".", megabytes=20)


def test_a_key_that_would_overflow_the_stack_when_hashed_is_refused(refused):
    assert "a key of type tuple" in refused(b"}" + b")" + b"\x85" * 1_000_000 + b"Ns.", traced=False)


def test_200_levels_are_read_and_201_refused(read):
    deep = PARAMS
    for _ in range(196):
        deep = {"a": deep}
    assert read({"params": deep}).state
    with pytest.raises(UserError, match="200 levels"):
        read({"params": {"a": {"a": {"a": deep}}}})


@pytest.mark.parametrize("raw", {
    "a list": b"]q\x00h\x00a", "a dictionary": b"}q\x00" + text("a") + b"h\x00s",
    "a tuple by its list": b"]q\x00h\x00\x85a", "an object": call("argparse.Namespace") + b"q\x00}" + text("a") + b"h\x00sb",
    "many times": b"]q\x00(" + b"h\x00" * 1000 + b"e",
    "an array's state": call("numpy.core.multiarray._reconstruct", b")") + b"q\x00(h\x00h\x00h\x00h\x00h\x00tb",
    "a variable": name("flax.nnx.variablelib.Param") + b")\x81q\x00}" + text("_raw_value") + b"h\x00sb",
}.items(), ids=lambda item: item[0])
def test_what_contains_itself_is_refused(refused, raw):
    refused(under("params", raw[1]) + b".")


def laughs(first, wrap, levels=30):
    raw = first + b"q\x00"
    for level in range(levels):
        raw += b"0" + wrap(b"h" + bytes([level])) + b"q" + bytes([level + 1])
    return raw


@pytest.mark.parametrize("raw", {
    "lists": laughs(b"]", lambda x: b"](" + x * 10 + b"e"), "tuples": laughs(b")", lambda x: b"(" + x * 10 + b"t"),
    "dictionaries": laughs(b"}", lambda x: b"}(" + b"".join(text(k) + x for k in "abcdefghij") + b"u"),
    "objects": laughs(b"}", lambda x: call("flax.core.frozen_dict.FrozenDict", b"}(" + b"".join(text(k) + x for k in "abcdefghij") + b"u")),
    "big arrays": array(number(10**6) + b"\x85", b"B" + (4 * 10**6).to_bytes(4, "little") + bytes(4 * 10**6)) + b"q\x000](" + b"h\x00" * 1000 + b"e",
    "arrays out of one text": text("a" * 10**6) + b"q\x000" + text("latin1") + b"q\x010](" + 1000 * array(
        number(250_000) + b"\x85", name("_codecs.encode") + b"h\x00h\x01\x86R", order=b">") + b"e",
    "long text": text("a" * 10**6) + b"q\x000](" + b"h\x00" * 1000 + b"e",
    "long keys": text("a" * 10**6) + b"q\x000](" + b"}h\x00Ns" * 1000 + b"e",
    "paths of many parts": text("") + b"q\x000(" + b"h\x00" * 1000 + b"tq\x010" + name("pathlib.PurePosixPath") + b"q\x020]("
                           + 1000 * b"h\x02h\x01R" + b"e",
    "attributes that do not count": call("flax.nnx.State") + b"}(" + b"".join(text(str(i)) + b"N" for i in range(1000))
                                    + text("_mapping") + b"}ubq\x000](" + b"h\x00" * 1000 + b"e",
    "long paths": text("a" * 10**6) + b"q\x000" + name("pathlib.PurePosixPath") + b"(" + b"h\x00" * 1000 + b"tR",
}.items(), ids=lambda item: item[0])
def test_shared_references_do_not_multiply(refused, raw, monkeypatch):
    monkeypatch.setattr(legacy, "_MAX_NODES", 20_000)
    for where in ("params", "metadata"):
        said = refused(b"}(" + text("params") + under("w", array(b")", FOUR)) + text(where) + raw[1] + b"u.", megabytes=50)
        assert "refers to the same content so often" in said


@pytest.mark.parametrize("code, order", [(b"h\x1d", text("<")), (text("f4"), b"h\x1d")])
@pytest.mark.parametrize("first", [laughs(b")", lambda x: b"(" + x * 10 + b"t"), b")" + b"\x85" * 1_000_000 + b"q\x1d"])
def test_a_types_name_is_not_hashed_for_ever_nor_beyond_the_stack(refused, code, order, first):
    dtype = call("numpy.dtype", code, b"\x89\x88") + b"(K\x03" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    refused(first + b"0" + under("params", call("numpy.core.multiarray.scalar", dtype, FOUR)) + b".", traced=False)


def test_a_long_name_is_not_looked_up_again_and_again(refused):
    long = text("optax") + b"q\x000" + text("a" * 10**6) + b"q\x010"
    assert "needs optax.aaaaa" in refused(long + b"h\x00h\x01\x930" * 100_000 + b"N.", traced=False)


def test_a_leafs_name_does_not_grow_without_end(refused):
    deep = b"".join(b"}h\x00" for _ in range(150)) + array(b")", FOUR) + b"s" * 150
    said = refused(text("a" * 60_000) + b"q\x000" + under("params", deep) + b".")
    assert "which cannot be one of a leaf" in said


def test_the_limits_as_they_are_keep_a_read_short(refused):
    nested = laughs(b"}", lambda x: call("flax.core.frozen_dict.FrozenDict", b"}(" + text("a") + x + text("b") + x + b"u"))
    assert "more than 1,000,000 items" in refused(under("params", nested) + b".", traced=False)
    assert "more than 2,000,000 instructions" in refused(b"(" * 3_000_000, traced=False)


def test_empty_arrays_of_any_shape_take_no_memory_in_metadata(tmp_path):
    made = array(number(10**12) + b"K\x00\x86", b"C\x00")
    (tmp_path / "a.pkl").write_bytes(b"}(" + text("params") + under("w", array(b")", FOUR)) + text("metadata") + under("a", made) + b"u.")
    assert legacy.read(tmp_path / "a.pkl").metadata == {"a": []}


@pytest.mark.parametrize("op", [b"(", b"N", b"]", b"}", b"N0", b"2", b"\x94"])
def test_the_number_of_instructions_has_an_end(refused, op, monkeypatch):
    monkeypatch.setattr(legacy, "_MAX_INSTRUCTIONS", 10_000)
    assert "more than 10,000 instructions" in refused(b"\x80\x04N" + op * 20_000 + b".")


# ---- other files


@pytest.mark.parametrize("value, why", [
    ([1, 2], "holds a list, not a dictionary"), (np.ones(2), "holds a ndarray, not a dictionary"), ({}, "holds no params"),
    ({"a": {}, "b": None}, "holds no params"), ({"state": {"step": 1}}, "holds no params"), ({"params": np.ones(1)}, "holds no params"),
    ({"params": {"a": "text"}}, "holds text at params/a"), ({"params": {"a": b"raw"}}, "raw bytes outside an array"),
    ({"params": PARAMS, "metadata": {"z": np.ones(2, complex)}}, "complex numbers")])  # fmt: skip
def test_a_pickle_of_something_else_says_what_it_holds(read, value, why):
    with pytest.raises(UserError, match=why):
        read(value)


@pytest.mark.parametrize("raw", [b"", b"\x00" * 100, b"hello, this is no pickle", b"PK\x03\x04" + bytes(50), b"\x1f\x8b\x08" + bytes(20),
                                 b"\x89PNG\r\n\x1a\n", b"{\"params\": 1}", np.random.default_rng(0).bytes(10_000)], ids=lambda r: str(r[:8]))
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
    for path, why in ((tmp_path / "none.pkl", "Checkpoint not found: "), (tmp_path, "is not a file"), (tmp_path / "pipe", "is not a file"),
                      (tmp_path / "loop", "cannot be read|not found"), ("/dev/zero", "is not a file"), ("a\0b", "corrupt|not found")):
        with pytest.raises(UserError, match=why):
            legacy.read(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in text of protocol 0
def test_mutated_files_are_read_or_refused_and_never_more(watch):
    outcomes, failures = fuzz_pickles.fuzz(400, 20_000, watch)  # cases other than the first of the bench
    assert not failures and outcomes.total() == 400
    assert outcomes["refused"] > 200 and outcomes["read equal"] > 10  # it does both


# ---- the transformer


WIDTH, PAIRS = 8, 2
SHAPES = {"q_proj": (8, 8), "k_proj": (8, 8), "v_proj": (8, 8), "merge": (8, 8), "mlp.0": (16, 16), "mlp.2": (16, 8)}


def layer(seed, bias=None):
    rng = np.random.default_rng(seed)
    made = {k: {"kernel": rng.standard_normal(s, np.float32)} for k, s in SHAPES.items()}
    if bias is not None:
        for k, s in SHAPES.items():
            made[k]["bias"] = np.full(s[1], bias, np.float32)
    return made | {n: {"scale": rng.random(8, np.float32), "bias": rng.random(8, np.float32)} for n in ("norm1", "norm2")}


def original(same=True, bias=None):
    """As the original code names its layers, one for each print."""
    return {f"layers.{i}.{p}": layer(i if same else (i, p), bias) for i in range(2 * PAIRS) for p in range(2)}


def ours(tree):
    """`layer`'s arrays by our names."""
    return {k.replace(".", "_"): v for k, v in tree.items()}


OURS = {f"layer_{i}": ours(layer(i)) for i in range(2 * PAIRS)}


def test_the_mapped_names_and_shapes_are_the_models():
    model = nnx.eval_shape(lambda: Transformer(WIDTH, 2, PAIRS, "loftr", rngs=nnx.Rngs(0)))
    wanted = {"/".join(map(str, k)): v.shape for k, v in flatten_dict(nnx.to_pure_dict(nnx.state(model))).items()}
    _, tree, _ = legacy_transformer.transformer({"loftr_transformer": original()})
    assert {"/".join(k): v.shape for k, v in flatten_dict(tree).items()} == wanted


@pytest.mark.parametrize("name", ["loftr_transformer", "siamese_transformer"])
@pytest.mark.parametrize("above", [(), ("params",), ("model",), ("dense_reg",), ("params", "model")])
def test_ours_is_found_and_kept_to_the_bit(name, above):
    params = {name: OURS, "resnet": {"w": np.ones(1)}}
    for key in above:
        params = {key: params}
    found, tree, notes = legacy_transformer.transformer(params)
    assert found == name and bits(tree) == bits(OURS) and notes == []


def test_equal_layers_of_both_prints_become_one():
    _, tree, notes = legacy_transformer.transformer({"params": {"loftr_transformer": original(same=True)}})
    assert bits(tree) == bits(OURS)
    assert len(notes) == 1 and "not the same function" in notes[0]


def test_of_layers_that_differ_print_0s_are_taken_and_the_rest_is_told():
    tree = original(same=True)
    tree["layers.2.1"]["merge"]["kernel"] = tree["layers.2.1"]["merge"]["kernel"] + np.float32(0.5)
    _, mapped, notes = legacy_transformer.transformer({"loftr_transformer": tree})
    assert bits(mapped) == bits(OURS)
    assert "one for both: print 0's were taken, and 40 arrays of print 1's left out, of which 1 differ by up to 0.5." in notes[0]


def test_biases_of_zero_are_dropped_and_others_left_out_with_their_size():
    _, tree, notes = legacy_transformer.transformer({"loftr_transformer": original(bias=0.0)})
    assert bits(tree) == bits(OURS)
    assert notes[0] == "48 biases of loftr_transformer's linear maps, which LoFTR's have not, were all zero and dropped."
    source = original(bias=0.0)
    source["layers.0.0"]["q_proj"]["bias"][3] = -0.25
    _, tree, notes = legacy_transformer.transformer({"loftr_transformer": source})
    assert bits(tree) == bits(OURS)
    assert "1 biases" in notes[0] and "(of 48)" in notes[0] and notes[0].endswith("were left out; their largest value is 0.25.")


@pytest.mark.parametrize("form", ["layers.{i}", "layers_{i}", "layer_{i}", "layers_{i}_0", "layers.{i}.0", "layer_{i}_0"])
@pytest.mark.parametrize("mlp", ["mlp.", "mlp_"])
def test_a_layer_shared_by_the_prints_is_known_by_any_name(form, mlp):
    tree = {form.format(i=i): {k.replace("mlp.", mlp): v for k, v in layer(i).items()} for i in range(4)}
    _, mapped, _ = legacy_transformer.transformer({"loftr_transformer": tree})
    assert bits(mapped) == bits(OURS)


@pytest.mark.parametrize("prints", [1, 2])
def test_nested_layers_and_nested_maps_are_known(prints):
    def nested(tree):
        return {k: v for k, v in tree.items() if "." not in k} | {"mlp": {"layers_0": tree["mlp.0"], "layers_2": tree["mlp.2"]}}

    tree = {"layers": {str(i): {str(p): nested(layer(i)) for p in range(prints)} for i in range(4)}}
    assert bits(legacy_transformer.transformer({"loftr_transformer": tree})[1]) == bits(OURS)


def test_weights_of_torchs_layout_are_transposed():
    def torch(tree):
        return {k: {"weight": v["kernel"].T if "kernel" in v else v["scale"], **({"bias": v["bias"]} if "scale" in v else {})}
                for k, v in tree.items()}

    tree = {"layers": {str(i): torch(layer(i)) for i in range(4)}}
    _, mapped, notes = legacy_transformer.transformer({"loftr_transformer": tree})
    assert bits(mapped) == bits(OURS) and notes == []


def test_other_float_types_become_float32_with_a_note():
    tree = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), OURS)
    _, mapped, notes = legacy_transformer.transformer({"loftr_transformer": tree})
    assert bits(mapped) == bits(jax.tree.map(lambda a: a.astype(np.float32), tree))
    assert notes == ["loftr_transformer was converted to float32 from bfloat16."]


class Encoder(linen.Module):
    """The original's layer in linen: biases as linen has them, names with dots."""

    @linen.compact
    def __call__(self, x, source):
        norm1, norm2 = linen.LayerNorm(name="norm1"), linen.LayerNorm(name="norm2")
        q, k, v, merge = (linen.Dense(WIDTH, name=n) for n in ("q_proj", "k_proj", "v_proj", "merge"))
        message = merge(q(norm1(x)) * k(source) + v(source))
        out = linen.Dense(WIDTH, name="mlp.2")(linen.relu(linen.Dense(2 * WIDTH, name="mlp.0")(jnp.concatenate([x, message], -1))))
        return norm2(x + out)


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        class Original(linen.Module):
            @linen.compact
            def __call__(self, x):
                for i in range(4):
                    x = Encoder(name=f"layers.{i}.0")(x, x) + Encoder(name=f"layers.{i}.1")(x, x)
                return x

        return Original(name="loftr_transformer")(x)


def test_a_transformer_that_linen_made_and_pickle_saved_is_mapped(read):
    variables = Dense().init(jax.random.key(0), jnp.ones((1, 3, WIDTH)))
    found = read({"state": {"params": variables["params"], "step": 1}, "metadata": {}, "timestamp": "t"})
    _, tree, notes = legacy_transformer.transformer(found.state["params"])
    source = jax.device_get(variables["params"]["loftr_transformer"])
    assert bits(tree["layer_3"]["mlp_0"]["kernel"]) == bits(source["layers.3.0"]["mlp.0"]["kernel"])
    assert len(flatten_dict(tree)) == 40 and len(notes) == 3  # biases of zero, another print 1, norms elsewhere


def test_the_originals_other_transformer_is_refused_with_reasons():
    attention = {"MultiHeadDotProductAttention_0": {"query": {"kernel": np.ones((8, 2, 4))}}, "LayerNorm_0": {"scale": np.ones(8)}}
    tree = {"self_attn_1_layer_0": attention, "cross_attn_1_layer_0": attention, "pos_encoding_1": {"w": np.ones(3)}}
    with pytest.raises(UserError, match="siamese_transformer of this checkpoint is another architecture: .*biases.*position"):
        legacy_transformer.transformer({"siamese_transformer": tree})


def test_no_transformer_is_told_with_what_there_is():
    for params in ({"resnet": {"w": np.ones(1)}, "head": {}}, {"resnet": np.ones(1), "head": {"loftr_transformer": np.ones(2)}}):
        with pytest.raises(UserError, match="^No transformer found in Module 1 checkpoint, which has head, resnet and no"):
            legacy_transformer.transformer(params)


def test_every_mismatch_is_named():
    tree = original()
    del tree["layers.1.0"]["norm1"]["scale"], tree["layers.2.0"], tree["layers.0.1"]["mlp.2"]
    tree["layers.0.0"]["q_proj"]["kernel"] = np.ones((8, 4), np.float32)
    tree["layers.1.1"]["k_proj"]["kernel"] = np.ones((8, 8), np.int32)
    tree["layers.3.1"]["norm2"]["bias"] = np.array([np.nan] * 8, np.float32)
    tree["layers.3.1"]["dropout"] = {"rate": np.float32(0.1)}
    with pytest.raises(UserError) as caught:
        legacy_transformer.transformer({"loftr_transformer": tree})
    for part in ("layer 1 of print 0 norm1/scale is missing", "layer 2 of print 0 is missing", "layer 0 of print 1 mlp_2/kernel is missing",
                 "layer 0 of print 0 q_proj/kernel is (8, 4), not (8, 8)", "layers.1.1/k_proj/kernel is of type int32",
                 "layers.3.1/norm2/bias has values that are not finite", "layers.3.1/dropout/rate has no place"):
        assert part in str(caught.value)


@pytest.mark.parametrize("wrong, why", [
    ({f"layer_{i}": ours(layer(i)) for i in (0, 1, 3)}, "layer 2 is missing"),
    ({f"layer_{i}": ours(layer(i)) for i in range(3)}, "3 layers are no pairs"),
    ({"layers.0": layer(0), "layers.1.0": layer(1)}, "not all of print 0"),
    ({"layers.0.1": layer(0), "layers.1.1": layer(1)}, "not all of print 0"),
    (OURS | {"layers.0": layer(0)}, "there twice"),
    (OURS | {"layer_0": ours(layer(0)) | {"merge": {"kernel": np.ones((4, 4), np.float32)}}}, r"merge/kernel is \(4, 4\), not \(8, 8\)"),
    ({"layers": {}}, "it has no layers"), ({"layer_1000": ours(layer(0))}, "has no place")])  # fmt: skip
def test_layers_that_are_no_transformer_are_refused(wrong, why):
    with pytest.raises(UserError, match=why):
        legacy_transformer.transformer({"loftr_transformer": wrong})


def test_mixed_widths_are_named_against_the_commonest():
    wide = jax.tree.map(lambda a: np.ones([2 * n for n in a.shape], np.float32), ours(layer(0)))
    with pytest.raises(UserError, match=r"layer 1 k_proj/kernel is \(16, 16\), not \(8, 8\).*layer 1 q_proj/kernel"):
        legacy_transformer.transformer({"loftr_transformer": OURS | {"layer_1": wide}})
