"""Nothing in a legacy checkpoint is ever run, and none takes more time, memory or stack than its size allows."""

import os
import pickle
import subprocess
import sys

import numpy as np
import optax
import pytest
from bench import fuzz_pickles
from flax.core import freeze
from hostile import FOUR, SYSTEM, TRAP, Trap, array, call, inert, name, number, refused, text, under, watch  # noqa: F401, fixtures too

from ifvit import legacy
from ifvit.errors import UserError
from ifvit.foreign import pickles, plain

PROTOCOLS = range(6)
PARAMS = {"dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}


def read(tmp_path, raw: bytes) -> legacy.Legacy:
    (tmp_path / "a.pkl").write_bytes(raw)
    return legacy.read(tmp_path / "a.pkl")


def test_the_trap_works_where_pickle_itself_reads_it(tmp_path):
    for raw in (
        SYSTEM + b".",
        pickle.dumps(Trap()),
        b"(" + text(TRAP) + b"ios\nsystem\n.",
        b"(cos\nsystem\n" + text(TRAP) + b"o.",
    ):
        (tmp_path / "hostile.pkl").write_bytes(raw)
        subprocess.run(
            [sys.executable, "-c", "import pickle; pickle.load(open('hostile.pkl', 'rb'))"], cwd=tmp_path, check=True
        )
        (tmp_path / "executed").unlink()


def test_the_watch_sees_an_execution(tmp_path, watch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with watch(tmp_path / "x") as events:
        pickle.loads(SYSTEM + b".")
    assert "os.system" in [event for event, _ in events]


BESIDE = text("params") + under("w", array(b")", FOUR))  # an array that is to be read


def beside(value: bytes, key: str = "metadata") -> bytes:
    return b"}(" + BESIDE + text(key) + value + b"u."


@pytest.mark.parametrize(
    "dotted",
    """
    os.system posix.system nt.system os.popen os.remove os.environ subprocess.Popen subprocess.call
    subprocess.check_output builtins.eval builtins.exec builtins.setattr builtins.__import__ builtins.compile
    builtins.open builtins.vars builtins.globals __builtin__.eval __builtin__.apply importlib.import_module
    runpy.run_path importlib._bootstrap._call_with_frames_removed marshal.loads pickle.loads _pickle.loads
    pickle.Unpickler cloudpickle.loads numpy.load numpy.fromfile numpy.memmap pandas.read_pickle pandas.eval
    torch.load joblib.load shutil.rmtree socket.socket pty.spawn code.interact timeit.timeit pdb.run webbrowser.open
    ctypes.CDLL site.os sys.modules sys.exit
""".split(),
)
def test_a_file_that_asks_for_what_could_do_harm_is_refused_by_name(refused, dotted):
    named = dotted.replace("__builtin__", "builtins")
    assert f"needs {named}, which is not an array or a plain container; it was refused" in refused(
        beside(call(dotted, text(TRAP)))
    )
    assert f"needs {named}, " in refused(beside(name(dotted)))  # a name alone, too


@pytest.mark.parametrize(
    "dotted",
    """
    builtins.getattr builtins.type builtins.map builtins.print functools.partial functools.reduce
    operator.attrgetter operator.methodcaller operator.itemgetter operator.call types.FunctionType types.CodeType
    cloudpickle.cloudpickle._make_function copyreg.__newobj__ copyreg.add_extension copy.copy codecs.encode
    codecs.decode _codecs.decode _codecs.lookup numpy.vectorize numpy.core.numeric.fromfile
    numpy.core.multiarray.fromfile numpy.core.multiarray._reconstruct.__class__
    numpy.testing._private.utils.runstring numpy.f2py.compile numpy.f2py.crackfortran.myeval numpy.lib.npyio.NpzFile
    numpy.ndarray.tofile numpy.dtype.__class__ jax.jit jax.numpy.load jax.pure_callback jax._src.array.ArrayImpl
    jax._src.random.prng.os ml_dtypes.os flax.serialization.from_bytes flax.core.frozen_dict.os pathlib.os
    argparse.FileType argparse.os types.os collections.abc.os collections._sys ifvit.legacy.write ifvit.legacy.os
    __main__.Anything torch.storage._load_from_bytes optax.os.system optax._src.base.Evil flax.nnx.os.system
    flax.nnx.variablelib.Param builtins.list builtins.object numpy.ndarray numpy.dtype numpy.float32
    jax._src.random.threefry2x32.threefry_seed my.TrainState argparse.Namespace
""".split(),
)
def test_a_call_of_anything_else_is_a_description(inert, dotted):
    told = inert(beside(call(dotted, text(TRAP)))).metadata
    assert told == {"metadata": TRAP} or told == {"class": dotted, "arguments": [TRAP]}, told
    assert inert(beside(b"}" + text("a") + name(dotted) + b"s")).metadata in (
        {"a": dotted},
        {"a": dotted.rpartition(".")[2]},
    )


@pytest.mark.parametrize(
    "value, told",
    [
        (call("builtins.getattr", name("my.Module"), text("apply")), {"metadata": "my.Module.apply"}),
        # the result of a call is called
        (
            b"cbuiltins\ngetattr\n(cmy\nModule\n" + text("apply") + b"tR(" + text(TRAP) + b"tR",
            {"class": "my.Module.apply", "arguments": [TRAP]},
        ),
        (
            call("my.A") + b"}" + text("__setstate__") + name("my.f") + b"sb",
            {"class": "my.A", "state": {"__setstate__": "my.f"}},
        ),
        (
            call("copyreg._reconstructor", name("my.A"), name("builtins.object"), b"N") + b"}" + text("x") + b"K\x01sb",
            {"class": "my.A", "state": {"x": 1}},
        ),
        (call("copyreg._reconstructor", name("my.D"), name("builtins.dict"), under("x", b"K\x01")), {"x": 1}),
        # keywords
        (
            name("my.A") + b")" + under("x", b"K\x01") + b"\x92",
            {"class": "my.A", "arguments": [[], {"x": 1}]},
        ),
        (call("my.L") + b"K\x01a", {"metadata": [1]}),
        (call("my.D") + text("x") + b"K\x01s", {"x": 1}),
    ],
)
def test_what_an_object_would_be_made_from_is_told(inert, value, told):
    assert inert(beside(value)).metadata == told


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
    "through functools.partial": call("functools.partial", name("os.system"), text(TRAP)) + b")R",
    "through getattr": call("builtins.getattr", name("os.path"), text("os")),
    "by copyreg": call("copyreg._reconstructor", name("os.system"), name("builtins.object"), b"N"),
    "by copyreg's base": call("copyreg._reconstructor", name("argparse.Namespace"), name("os.system"), b"N"),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_call_is_refused_wherever_it_stands(refused, way):
    for raw in (
        WAYS[way] + b".",
        under("params", WAYS[way]) + b".",
        under("state", under("opt_state", b"(" + name("optax._src.base.EmptyState") + b")\x81" + WAYS[way] + b"t"))
        + b".",
    ):
        assert "needs os." in refused(raw)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_that_pickle_hides_in_a_checkpoint_is_refused(refused, protocol):
    adam = optax.adam(1e-3).init(PARAMS)
    objects = np.array([None, Trap()], object)
    for state in (
        {"params": PARAMS | {"x": Trap()}},
        {"params": PARAMS, "opt_state": (adam[0]._replace(mu=Trap()),)},
        {"params": freeze({"a": [Trap()]})},
        {"params": {"a": objects}},
        {"params": PARAMS, "rng": objects.reshape(1, 2)},
    ):
        said = refused(pickle.dumps({"state": state, "metadata": {}, "timestamp": "t"}, protocol))
        assert f"needs {os.system.__module__}.system, " in said


@pytest.mark.parametrize(
    "op, raw",
    {
        "EXT1": b"\x82\x01",
        "EXT2": b"\x83\x01\x00",
        "EXT4": b"\x84\x01\x00\x00\x00",
        "PERSID": b"Pos.system\n",
        "BINPERSID": text("os.system") + b"Q",
        "NEXT_BUFFER": b"\x97",
        "READONLY_BUFFER": b"C\x01a\x98",
    }.items(),
)
def test_what_lies_outside_the_file_is_refused(refused, op, raw):
    assert f"has the instruction {op}, which refers to something outside the file" in refused(raw + b".")


def test_an_array_of_an_opaque_type_is_refused_by_type(refused):
    for value in (np.zeros(2, "V8"), np.zeros(2, "V8")[0]):
        assert "holds an array of type V8" in refused(pickle.dumps({"params": {"a": value}}, 4))


def test_the_hand_made_array_is_read_when_it_is_right(tmp_path):
    (tmp_path / "a.pkl").write_bytes(under("params", under("a", array(number(1) + b"\x85", FOUR))) + b".")
    found = legacy.read(tmp_path / "a.pkl").state["params"]["a"]
    assert found.dtype == np.float32 and found.tolist() == [1.0]


@pytest.mark.parametrize(
    "made",
    {
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
        "a scalar of two": call(
            "numpy.core.multiarray.scalar", call("numpy.dtype", text("f4"), b"\x89\x88"), b"C\x08abcdefgh"
        ),
        "a void of no size": array(number(10**9) + b"\x85", b"C\x00", code=b"V0"),
        "text of no size": array(number(10**9) + b"\x85", b"C\x00", code=b"U0"),
        "fields in its type": array(b"K\x01\x85", FOUR, fields=b"N(" + text("a") + b"t}"),
        "a type within its type": array(b"K\x01\x85", FOUR, fields=b"(NNt" + b"NN"),
        "no state": call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), b"K\x00\x85", b"C\x01b"),
        "two states": array(b"K\x01\x85", FOUR) + b"Nb}b",
        "jax's of another function": call("jax._src.array._reconstruct_array", name("numpy.ndarray"), b")", b")", b"}"),
        "jax's of no state": call(
            "jax._src.array._reconstruct_array", name("numpy.core.multiarray._reconstruct"), b")", b"N", b"}"
        ),
        "an order of axes that is none": call(
            "numpy.core.numeric._frombuffer",
            FOUR,
            call("numpy.dtype", text("f4"), b"\x89\x88"),
            b"K\x01\x85",
            text("K"),
            b"K\x05\x85",
        ),
        "an order that is none": call(
            "numpy.core.numeric._frombuffer",
            FOUR,
            call("numpy.dtype", text("f4"), b"\x89\x88"),
            b"K\x01\x85",
            text("Z"),
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_an_array_that_contradicts_itself_is_refused(refused, made):
    refused(under("params", under("a", made[1])) + b".")


def u64(n):
    return n.to_bytes(8, "little")


@pytest.mark.parametrize(
    "op, raw",
    {
        "BYTEARRAY8": b"\x96" + u64(2**40),
        "BYTEARRAY8 beyond all": b"\x96" + u64(2**64 - 1),
        "BINBYTES8": b"\x8e" + u64(2**40),
        "BINBYTES8 beyond all": b"\x8e" + u64(2**63),
        "BINBYTES": b"B" + b"\xff" * 4,
        "SHORT_BINBYTES": b"C\xff",
        "BINUNICODE8": b"\x8d" + u64(2**40),
        "BINUNICODE": b"X" + b"\xff" * 4,
        "BINSTRING": b"T\xff\xff\xff\x7f",
        "BINSTRING below 0": b"T\xff\xff\xff\xff",
        "SHORT_BINSTRING": b"U\xff",
        "LONG4": b"\x8b\xff\xff\xff\x7f",
        "LONG4 below 0": b"\x8b\xff\xff\xff\xff",
        "LONG1": b"\x8a\xff",
        "FRAME": b"\x80\x04\x95" + u64(2**62),
        "LONG_BINPUT": b"Nr\xff\xff\xff\xff.",
        "PUT": b"Np" + b"9" * 4000 + b"\n.",
        "PUT below 0": b"Np-1\n.",
        "LONG_BINGET": b"j\xff\xff\xff\xff.",
        "GET": b"g99999999999\n.",
        "MEMOIZE of nothing": b"\x94.",
        "PROTO": b"\x80\xff.",
        "INT": b"I" + b"9" * 1_000_000 + b"\n.",
        "INT of 4000 digits": b"I" + b"9" * 4000 + b"\n.",
        "LONG": b"L" + b"9" * 1_000_000 + b"L\n.",
        "LONG4 of a megabyte": b"\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b".",
        "FLOAT": b"F" + b"9" * 1_000_000 + b"\n.",
        "FLOAT of nothing": b"F\n.",
        "UNICODE without end": b"V" + b"a" * 100,
        "UNICODE of half a pair": b"}V\\ud800\nNs.",
        "STRING without quotes": b"Sabc\n.",
        "TUPLE without MARK": b"NNt.",
        "TUPLE3 of two": b"NN\x87.",
        "POP of nothing": b"0.",
        "POP_MARK": b"1.",
        "DUP": b"2.",
        "STOP": b".",
        "nothing": b"",
        "SETITEMS odd": b"}(Nu.",
        "DICT odd": b"(K\x01d.",
        "APPENDS to a tuple": b")(Ne.",
        "APPEND to text": text("a") + b"Na.",
        "SETITEM in a list": b"]NNs.",
        "SETITEM in a name": b"cargparse\nNamespace\n" + text("a") + b"Ns.",
        "REDUCE of a number": b"K\x01)R.",
        "REDUCE of arguments that are none": b"cargparse\nNamespace\nNR.",
        "OBJ of nothing": b"(o.",
        "OBJ of text": b"(" + text("os") + b"o.",
        "BUILD of a name": b"cargparse\nNamespace\n}b.",
        "BUILD of a dictionary": b"}}b.",
        "BUILD of a list": b"]}b.",
        "BUILD twice": call("argparse.Namespace") + b"}b}b.",
        "BUILD with slots that are none": under("params", call("argparse.Namespace") + b"NK\x01\x86b") + b".",
        "STACK_GLOBAL of numbers": b"K\x01K\x01\x93.",
        "STACK_GLOBAL of names": name("argparse.Namespace") * 2 + b"\x93.",
        "NEWOBJ_EX with keywords": name("argparse.Namespace") + b")" + under("a", b"N") + b"\x92.",
    }.items(),
)
def test_instructions_that_lie_are_refused_and_take_no_memory(refused, op, raw):
    refused(raw + b"abc")


@pytest.mark.parametrize("key", [b"]", b"}", b"\x8f", b"\x96\x01" + bytes(7) + b"a"])
def test_a_key_that_no_dictionary_can_have_is_refused(refused, key):
    assert "a key that can be none" in refused(b"}" + key + b"Ns.")


@pytest.mark.parametrize(
    "key, told",
    [
        (b")", "()"),
        (b"N", "None"),
        (b"\x88", "True"),
        (b"G?\xe0" + bytes(6), "0.5"),
        (b"C\x01a", "61"),
        (name("my.A"), "my.A"),
        (call("my.Color", b"K\x01"), "my.Color(1)"),
        (b"K\x01K\x02\x86", "(1, 2)"),
        (b"K\x01", "1"),
    ],
)
def test_a_key_of_any_kind_becomes_text(inert, key, told):
    assert inert(beside(b"}" + key + b"K\x05s")).metadata == {told: 5}


def test_a_key_that_comes_as_text_and_as_number_is_refused(refused):
    assert "twice" in refused(b"}(K\x01N" + text("1") + b"Nu.")


@pytest.mark.parametrize("key", ["", ".", "..", "../../x", "a/b", "a\nb", "\x1b[2J", "\u202e"])
def test_keys_of_the_state_can_name_a_leaf(refused, key):
    assert "which cannot be one of a leaf" in refused(pickle.dumps({"params": {"m": {key: np.ones(1)}}}))


def test_names_from_a_file_cannot_steer_the_terminal(refused):
    said = refused(text("os\x1b[31m") + text("sys\ntem" + "x" * 10_000) + b"\x93.")
    assert "needs os?[31m.sys?tem" in said


N = 20_000


@pytest.mark.parametrize(
    "raw",
    {
        "lists": b"]" * N + b"a" * (N - 1),
        "tuples": b")" + b"\x85" * N,
        "dictionaries": b"}" + (text("a") + b"}") * N + b"s" * N,
        "objects": (name("flax.core.frozen_dict.FrozenDict") * N + b"}" + b"\x85R" * N),
        "optax": name("optax._src.base.EmptyState") * N + b")" + b"\x85\x81" * N,
        "a tuple as key": b"}" + b")" + b"\x85" * N + b"Ns",
        "a set of tuples": b"\x8f(" + b")" + b"\x85" * N + b"\x90",
        "a state": call("argparse.Namespace") + b")" + b"\x85" * N + b"b",
        "marks": b"(" * N + b"t" * N,
        "a type": call("numpy.dtype", b")" + b"\x85" * N, b"\x89\x88"),
        "a shape": array(b")" + b"\x85" * N, FOUR),
    }.items(),
    ids=lambda item: item[0],
)
def test_deep_nesting_is_refused_without_recursion(refused, raw):
    refused(under("params", raw[1]) + b".", megabytes=20)


@pytest.mark.run
def test_a_key_that_would_overflow_the_stack_when_hashed_is_refused(refused):
    assert "200 levels deep" in refused(b"}" + b")" + b"\x85" * 1_000_000 + b"Ns.", traced=False)


def test_200_levels_are_read_and_201_refused(tmp_path):
    def deep(levels):
        tree = {"a": np.ones(1, np.float32)}
        for _ in range(levels - 2):
            tree = {"a": tree}
        return pickle.dumps({"params": tree})

    assert read(tmp_path, deep(198)).state
    with pytest.raises(UserError, match="200 levels"):
        read(tmp_path, deep(202))


@pytest.mark.parametrize(
    "raw",
    {
        "a list": b"]q\x00h\x00a",
        "a dictionary": b"}q\x00" + text("a") + b"h\x00s",
        "a tuple by its list": b"]q\x00h\x00\x85a",
        "an object": call("argparse.Namespace") + b"q\x00}" + text("a") + b"h\x00sb",
        "many times": b"]q\x00(" + b"h\x00" * 1000 + b"e",
        "an array's state": call("numpy.core.multiarray._reconstruct", b")") + b"q\x00(h\x00h\x00h\x00h\x00h\x00tb",
        "a variable": name("flax.nnx.variablelib.Param") + b")\x81q\x00}" + text("_raw_value") + b"h\x00sb",
    }.items(),
    ids=lambda item: item[0],
)
def test_what_contains_itself_is_refused(refused, raw):
    refused(under("params", raw[1]) + b".")


def laughs(first, wrap, levels=30):
    raw = first + b"q\x00"
    for level in range(levels):
        raw += b"0" + wrap(b"h" + bytes([level])) + b"q" + bytes([level + 1])
    return raw


@pytest.mark.run
@pytest.mark.parametrize(
    "raw",
    {
        "lists": laughs(b"]", lambda x: b"](" + x * 10 + b"e"),
        "tuples": laughs(b")", lambda x: b"(" + x * 10 + b"t"),
        "dictionaries": laughs(b"}", lambda x: b"}(" + b"".join(text(k) + x for k in "abcdefghij") + b"u"),
        "objects": laughs(
            b"}",
            lambda x: call(
                "flax.core.frozen_dict.FrozenDict", b"}(" + b"".join(text(k) + x for k in "abcdefghij") + b"u"
            ),
        ),
        "big arrays": array(number(10**6) + b"\x85", b"B" + (4 * 10**6).to_bytes(4, "little") + bytes(4 * 10**6))
        + b"q\x000]("
        + b"h\x00" * 1000
        + b"e",
        "arrays out of one text": text("a" * 10**6)
        + b"q\x000"
        + text("latin1")
        + b"q\x010]("
        + 1000 * array(number(250_000) + b"\x85", name("_codecs.encode") + b"h\x00h\x01\x86R", order=b">")
        + b"e",
        "long text": text("a" * 10**6) + b"q\x000](" + b"h\x00" * 1000 + b"e",
        "long keys": text("a" * 10**6) + b"q\x000](" + b"}h\x00Ns" * 1000 + b"e",
        "paths of many parts": text("")
        + b"q\x000("
        + b"h\x00" * 1000
        + b"tq\x010"
        + name("pathlib.PurePosixPath")
        + b"q\x020]("
        + 1000 * b"h\x02h\x01R"
        + b"e",
        "attributes that do not count": call("flax.nnx.State")
        + b"}("
        + b"".join(text(str(i)) + b"N" for i in range(1000))
        + text("_mapping")
        + b"}ubq\x000]("
        + b"h\x00" * 1000
        + b"e",
        "long paths": text("a" * 10**6) + b"q\x000" + name("pathlib.PurePosixPath") + b"(" + b"h\x00" * 1000 + b"tR",
    }.items(),
    ids=lambda item: item[0],
)
def test_shared_references_do_not_multiply(refused, raw, monkeypatch):
    monkeypatch.setattr(plain, "_MAX_NODES", 20_000)
    for where in ("params", "metadata"):
        said = refused(
            b"}(" + text("params") + under("w", array(b")", FOUR)) + text(where) + raw[1] + b"u.", megabytes=50
        )
        assert "refers to the same content so often" in said


@pytest.mark.run
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


@pytest.mark.run
def test_the_limits_as_they_are_keep_a_read_short(refused):
    nested = laughs(
        b"}", lambda x: call("flax.core.frozen_dict.FrozenDict", b"}(" + text("a") + x + text("b") + x + b"u")
    )
    assert "more than 1,000,000 items" in refused(under("params", nested) + b".", traced=False)
    assert "more than 2,000,000 instructions" in refused(b"(" * 3_000_000, traced=False)


def test_empty_arrays_of_any_shape_take_no_memory_in_metadata(tmp_path):
    made = array(number(10**12) + b"K\x00\x86", b"C\x00")
    (tmp_path / "a.pkl").write_bytes(
        b"}(" + text("params") + under("w", array(b")", FOUR)) + text("metadata") + under("a", made) + b"u."
    )
    assert legacy.read(tmp_path / "a.pkl").metadata == {"a": []}


@pytest.mark.parametrize("op", [b"(", b"N", b"]", b"}", b"N0", b"2", b"\x94"])
def test_the_number_of_instructions_has_an_end(refused, op, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 10_000)
    assert "more than 10,000 instructions" in refused(b"\x80\x04N" + op * 20_000 + b".")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in text of protocol 0
def test_mutated_files_are_read_or_refused_and_never_more(watch):
    outcomes, failures = fuzz_pickles.fuzz(400, 20_000, watch)  # cases other than the first of the bench
    assert not failures and outcomes.total() == 400
    assert outcomes["refused"] > 200 and outcomes["read equal"] > 10  # it does both
