"""The legacy checkpoint, a pickle: read without running anything in it, and written.

A pickle is a program that can call whatever it can name. Here its instructions are only read: a
name becomes an inert `_Name`, refused at once unless it belongs to an array or a plain container,
and a call becomes a `_Node`, a description. What the nodes describe is then built by the code below
out of the file's own bytes, within limits that the file's size sets. Nothing is imported by name.

Layout: `{'state': {'params', 'opt_state', 'step', …}, 'metadata': {…}, 'timestamp': str}`,
`{'params': …, …}` alone, or bare parameters.
"""

import contextlib
import functools
import io
import json
import math
import os
import pickle
import pickletools
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from ifvit.errors import UserError

_MAX_INSTRUCTIONS = 2_000_000  # a jax array takes 40
_MAX_NODES = 1_000_000         # visited, so that shared references cannot multiply
_MAX_DEPTH = 200
_MAX_COPIES = 10               # arrays and text may have so many times the file's size (tied weights, names), and
_SLACK = 10_000_000            # so many bytes more
_MAX_NAME = 1000               # characters of a leaf's name, `params/a/b`, and of what a pickle may name
_INT32 = np.iinfo(np.int32)

_NUMBERS = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
_PLAIN = {name: np.dtype(name) for name in _NUMBERS}
_DTYPES = _PLAIN | {dtype.str[1:]: dtype for dtype in _PLAIN.values()} | {"bool_": np.dtype(bool)} | {  # also 'f4', …
    name: np.dtype(kind) for name, kind in vars(ml_dtypes).items()
    if isinstance(kind, type) and issubclass(kind, np.generic)}  # fmt: skip

# What a pickle may name; the group is what `_Builder` makes of it.
_KNOWN = re.compile(
    r"(?P<array>numpy\.core\.multiarray\.(?:_reconstruct|scalar)|numpy\.core\.numeric\._frombuffer"
    r"|jax\._src\.(?:array\._reconstruct_array|device_array\.reconstruct_device_array))"
    r"|(?P<part>numpy\.(?:ndarray|dtype)|_codecs\.encode|builtins\.bytes)"
    rf"|(?P<dtype>(?:numpy|jax\.numpy|ml_dtypes|jaxlib\.xla_extension)\.(?:{'|'.join(_DTYPES)}))"
    r"|(?P<optax>optax(?:\.\w+)+)"
    r"|(?P<wrapper>flax\.core\.frozen_dict\.FrozenDict|builtins\.(?:set|frozenset))"
    r"|(?P<record>(?:\w+\.)*\w*TrainState|argparse\.Namespace|types\.SimpleNamespace)"
    r"|(?P<box>flax\.nnx(?:\.\w+)+|ml_collections(?:\.\w+)*\.(?:Frozen)?ConfigDict"
    r"|jax\._src\.(?:random\.)?prng\.PRNGKeyArray)"
    r"|(?P<path>pathlib\.(?:_local\.)?(?:Pure)?(?:Posix|Windows)Path)"
    r"|(?P<dict>collections\.(?:OrderedDict|defaultdict))"
    r"|(?P<reconstructor>copyreg\._reconstructor)"
    r"|(?P<inert>builtins\.(?:dict|list|tuple|int|float|str|bool|object)"
    r"|jax\._src\.(?:random\.)?prng\.PRNGImpl|jax\._src\.(?:random|prng)\.(?:\w+\.)?(?:threefry|rbg|unsafe_rbg)\w*)"
)
_MODULES = {"numpy._core": "numpy.core", "__builtin__": "builtins", "copy_reg": "copyreg"}
# Under which of its attributes an object holds what counts.
_CONTENTS = ("_mapping", "_raw_value", "raw_value", "value", "_fields", "_base_array")

# Instructions that are values.
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_REMEDY = "Save it again where it was made, with plain arrays: jax.tree.map(numpy.asarray, params)."


@dataclass(frozen=True)
class Legacy:
    state: dict              # nested, with string keys; leaves are read-only numpy arrays
    metadata: dict           # plain JSON
    timestamp: str | None


@dataclass(frozen=True)
class _Name:
    name: str
    kind: str


@dataclass(eq=False, slots=True)
class _Node:
    """What a pickle asks to be made."""

    what: _Name
    args: tuple
    state: Any = None
    array: np.ndarray | None = None  # once built


class _Broken(Exception):
    """The file's content contradicts itself."""


def read(path: str | Path) -> Legacy:
    """A legacy checkpoint's content; nothing in the file is executed or imported.

    In `state`, optax states are dictionaries by field name, lists and tuples dictionaries by
    position, numbers 0-d arrays (int32, float32, bool), arrays of the byte order of this machine;
    what has no leaves is left out, as in `flax.serialization.to_state_dict` of ours.

    Raises UserError: the file is missing, unreadable, truncated, corrupt, no such pickle, or needs
    something that is neither an array nor a plain container (named).
    """
    path = Path(path) if isinstance(path, str) else path  # a gs:// path reads itself
    try:
        if path.exists() and not path.is_file():
            raise UserError("is not a file. Give the path of a .pkl file.")
        return _layout(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except FileNotFoundError:
        raise UserError(f"Checkpoint not found: {path}. Give the path of a .pkl file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give a file that this user may read.") from None
    except Exception as error:  # a hostile or damaged file can make the parsers raise nearly anything
        why = str(error) if isinstance(error, (_Broken, ValueError)) else f"{type(error).__name__} {error}".strip()
        raise UserError(f"{path} is truncated, corrupt or no pickle ({_printable(why[:200])}). "
                        "Copy or save it again.") from None


def _layout(raw: bytes) -> Legacy:
    build = _Builder(len(raw))
    root = build.plain(_parse(raw))
    if not isinstance(root, dict):
        raise UserError(f"holds a {type(root).__name__}, not a dictionary of parameters. Give a checkpoint.")
    if isinstance(root.get("state"), dict):
        state, rest = root["state"], {k: v for k, v in root.items() if k != "state"}
    elif "params" in root:
        certain = dict.fromkeys(("params", "batch_stats", "opt_state", "step"), True) | dict.fromkeys(
            ("metadata", "timestamp", "config"), False)
        state = {k: v for k, v in root.items() if certain.get(k, _has_array(v))}
        rest = {k: v for k, v in root.items() if k not in state}
    else:
        state, rest = {"params": root}, {}
    timestamp, metadata = rest.pop("timestamp", None), rest.pop("metadata", {})
    metadata = rest | (metadata if isinstance(metadata, dict) else {"metadata": metadata})
    leaves = _leaves(state, "") or {}
    if not isinstance(leaves.get("params"), dict):
        raise UserError("holds no params. Give a checkpoint with the model's parameters.")
    return Legacy(leaves, build.json(metadata), timestamp if timestamp is None else str(build.json(timestamp)))


# --- the pickle's instructions -> values, _Names and _Nodes ---


def _parse(raw: bytes) -> Any:
    """What the pickle describes; the instructions are those of pickletools, none of which runs anything."""
    stack: list = []
    below: list[list] = []  # the stacks under each mark
    memo: dict[int, Any] = {}
    for count, (op, arg, _) in enumerate(pickletools.genops(io.BytesIO(raw))):
        if count >= _MAX_INSTRUCTIONS:
            raise UserError(f"has more than {_MAX_INSTRUCTIONS:,} instructions, as no checkpoint needs. {_REMEDY}")
        if op.name in _VALUES:
            if type(arg) is int and arg.bit_length() > 64:
                raise _Broken("an integer of more than 64 bits")
            stack.append(arg)
            continue
        match op.name:
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case "MARK":
                below.append(stack)
                stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(op.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, int(op.name[-1]))))
            case "TUPLE" | "FROZENSET" | "LIST" | "DICT":
                items, stack = stack, below.pop()
                stack.append(items if op.name == "LIST" else _put({}, items) if op.name == "DICT" else tuple(items))
            case "APPEND" | "SETITEM":
                items = _pop(stack, 1 if op.name == "APPEND" else 2)
                _put(stack[-1], items, list if op.name == "APPEND" else dict)
            case "APPENDS" | "ADDITEMS" | "SETITEMS":
                items, stack = stack, below.pop()
                _put(stack[-1], items, dict if op.name == "SETITEMS" else list)
            case "GLOBAL":
                stack.append(_name(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*_pop(stack, 2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*_pop(stack, 2)))
            case "NEWOBJ_EX":
                what, args, keywords = _pop(stack, 3)
                if keywords != {}:
                    raise _Broken("keywords in NEWOBJ_EX")
                stack.append(_call(what, args))
            case "INST" | "OBJ":
                items, stack = stack, below.pop()
                what = _name(*arg.split(" ", 1)) if op.name == "INST" else items.pop(0)
                stack.append(_call(what, tuple(items)))
            case "BUILD":
                (state,) = _pop(stack, 1)
                if type(stack[-1]) is not _Node or stack[-1].state is not None:
                    raise _Broken("a state for something that takes none")
                stack[-1].state = state
            case "DUP":
                stack.append(stack[-1])
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                stack = below.pop()
            case "PROTO":
                if arg > 5:
                    raise UserError(f"is a pickle of protocol {arg}, and 5 is the newest known. {_REMEDY}")
            case "FRAME":
                pass  # tells how much to read ahead; all has been read
            case "STOP":
                return stack.pop()
            case _:  # EXT1, EXT2, EXT4, PERSID, BINPERSID, NEXT_BUFFER, READONLY_BUFFER
                raise UserError(f"has the instruction {op.name}, which refers to something outside the file, as files "
                                f"of other software do; it was refused and nothing in it was run. {_REMEDY}")
    raise _Broken("no end")


def _pop(stack: list, count: int) -> list:
    if len(stack) < count:
        raise _Broken("too few values on the stack")
    items = stack[-count:]
    del stack[-count:]
    return items


def _put(target: Any, items: list, kind: type = dict) -> Any:
    if type(target) is not kind or kind is dict and len(items) % 2:
        raise _Broken(f"items for something that is no {kind.__name__}")
    if kind is list:
        target.extend(items)
        return target
    for key, value in zip(items[::2], items[1::2]):
        if type(key) not in (str, int):  # others are not looked at: hashing deep tuples would end this process
            raise UserError(f"has a dictionary with a key of type {type(key).__name__}. Save it with keys of text.")
        target[key] = value
    return target


def _name(module: Any, attribute: Any = "") -> _Name:
    if type(module) is not str or type(attribute) is not str:
        raise _Broken("a name that is no text")
    if len(module) + len(attribute) > _MAX_NAME:  # a long name, stored once, could be looked up without end
        raise _refused(f"{module[:100]}.{attribute[:100]}")
    for new, old in _MODULES.items():
        if module == new or module.startswith(new + "."):
            module = old + module[len(new):]
    name = f"{module}.{attribute}"
    known = _KNOWN.fullmatch(name)
    if not known:
        raise _refused(name)
    return _Name(name, known.lastgroup)


def _refused(name: str) -> UserError:
    return UserError(f"needs {_printable(name[:200])}, which is not an array or a plain container; it was refused and "
                     f"nothing in it was run. {_REMEDY}")


def _call(what: Any, args: Any) -> Any:
    if type(what) is not _Name or type(args) is not tuple:
        raise _Broken("a call of something that has no name")
    if what.kind == "dict":  # by hand, since its items follow
        if len(args) > 1 or any(type(a) is not _Name and a is not None for a in args):
            raise _refused(what.name)
        return {}
    if what.kind == "reconstructor":  # protocols 0 and 1: class, the built-in one it derives from, that one's content
        what, base, content = args
        if type(what) is not _Name or type(base) is not _Name:
            raise _Broken("a call of something that has no name")
        args = {"builtins.object": (), "builtins.tuple": content}.get(base.name)
        if type(args) is not tuple:
            raise _refused(f"{what.name} on {base.name}")
    return _Node(what, args)


# --- _Names and _Nodes -> dictionaries, lists and arrays ---


class _Builder:
    """Plain values of what was parsed, as a tree; within limits, since references may be shared or circular."""

    def __init__(self, size: int):
        self.nodes = _MAX_NODES
        self.bytes = _MAX_COPIES * size + _SLACK

    def spend(self, nodes: int = 0, size: int = 0) -> None:
        self.nodes -= nodes
        self.bytes -= size
        if self.nodes < 0 or self.bytes < 0:
            raise UserError(f"refers to the same content so often that it would take more than {_MAX_NODES:,} items or "
                            f"{_MAX_COPIES} times the file's size. {_REMEDY}")

    def plain(self, x: Any, depth: int = 0) -> Any:
        self.spend(nodes=1)
        if depth > _MAX_DEPTH:
            raise UserError(f"is nested more than {_MAX_DEPTH} levels deep, or contains itself. {_REMEDY}")
        if x is None or type(x) in (bool, int, float):
            return x
        if type(x) is str:
            return self.text(x)
        if type(x) is dict:
            plain = {self.text(str(key)): self.plain(value, depth + 1) for key, value in x.items()}
            if len(plain) < len(x):
                raise _Broken("a key twice, as text and as a number")
            return plain
        if type(x) in (list, tuple):
            return [self.plain(value, depth + 1) for value in x]
        if type(x) is _Name and x.kind == "dtype":  # a configuration may name one
            return x.name.rpartition(".")[2]
        if type(x) is _Node:
            return self.node(x, depth)
        if type(x) is _Name:
            raise _refused(x.name)
        raise UserError(f"holds raw bytes outside an array. {_REMEDY}")

    def text(self, x: str) -> str:
        self.spend(size=len(x.encode()))  # half a surrogate pair cannot be encoded
        return x

    def node(self, x: _Node, depth: int) -> Any:
        match x.what.kind:
            case "array":
                if x.array is None:
                    x.array = self.array(x)
                self.spend(size=x.array.nbytes)
                return x.array
            case "wrapper":
                (content,) = x.args
                return self.plain(content, depth + 1)
            case "optax":
                fields = _optax_fields().get(x.what.name.rpartition(".")[2])
                if fields is None or len(fields) != len(x.args):
                    raise UserError(f"holds {x.what.name} of {len(x.args)} fields, which the installed optax does not "
                                    "know. Save it again without opt_state.")
                return {name: self.plain(value, depth + 1) for name, value in zip(fields, x.args)}
            case "record":
                kept = {k: v for k, v in self.attributes(x).items() if k not in ("apply_fn", "tx")}
                return self.plain(kept, depth + 1)
            case "box":
                attributes = self.attributes(x)
                for name in _CONTENTS:
                    if name in attributes:
                        return self.plain(attributes[name], depth + 1)
            case "path":
                self.spend(nodes=len(x.args))
                kind = PureWindowsPath if "Windows" in x.what.name else PurePosixPath
                return str(kind(*[self.text(part) for part in x.args]))
        raise _refused(x.what.name)

    def attributes(self, x: _Node) -> dict:
        states = x.state if type(x.state) is tuple else (x.state,)  # (those of __dict__, those of __slots__)
        if x.args or len(states) > 2 or not all(s is None or type(s) is dict for s in states):
            raise _refused(x.what.name)
        self.spend(nodes=sum(len(s) for s in states if s))
        return {key: value for s in states if s for key, value in s.items()}

    def array(self, x: _Node) -> np.ndarray:
        axes, name = None, x.what.name
        if name == "numpy.core.multiarray.scalar":
            shape, order, (dtype, raw) = (), "C", x.args
        elif name == "numpy.core.numeric._frombuffer":
            raw, dtype, shape, order, *axes = x.args
        else:
            function, _, state = x.args[:3] if x.what.name.startswith("jax.") else (x.what, None, x.state)
            if function != _name("numpy.core.multiarray", "_reconstruct"):
                raise _Broken("an array that numpy did not write")
            _, shape, dtype, fortran, raw = state
            order = "F" if fortran else "C"
        dtype, foreign = _dtype(dtype)
        raw = self.raw(raw)
        if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise _Broken("an impossible shape")
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise _Broken(f"an array of {len(raw)} bytes has another size than its shape and type")
        if order not in ("C", "F", "K"):
            raise _Broken("an order of its elements that numpy does not write")
        array = np.ndarray(shape, dtype, raw, order="C" if order == "K" else order)
        array = array.transpose(*axes) if axes else array
        array = array.byteswap() if foreign else array
        array.flags.writeable = False  # it may be at several places of the tree
        return array

    def raw(self, x: Any) -> bytes | bytearray:
        if type(x) in (bytes, bytearray):
            return x
        match x:  # protocols 0 to 2 have no bytes
            case _Node(_Name("_codecs.encode"), (str(letters), "latin1")):
                self.spend(size=len(letters))
                return letters.encode("latin1")
            case _Node(_Name("builtins.bytes"), ()):
                return b""
        raise _Broken("an array without bytes")

    def json(self, x: Any) -> Any:
        """Metadata: arrays become numbers and lists."""
        if isinstance(x, dict):
            return {k: self.json(v) for k, v in x.items()}
        if isinstance(x, list):
            return [self.json(v) for v in x]
        if not isinstance(x, np.ndarray):
            return x
        self.spend(nodes=x.size)
        if "complex" in x.dtype.name:
            raise UserError("has complex numbers in its metadata. Save it without them.")
        if not x.size:  # its other dimensions may be of any size
            return []
        return (x if x.dtype.kind in "biu" else x.astype(np.float64)).tolist()


def _dtype(x: Any) -> tuple[np.dtype, bool]:
    """The type that a node describes, and whether its bytes are of the other order."""
    if type(x) is not _Node or x.what.name != "numpy.dtype":
        raise _Broken("an array without a type")
    code, state = x.args[0], x.state or (3, "=", None, None, None)
    if type(code) is _Name and code.kind == "dtype":
        code = code.name.rpartition(".")[2]
    if type(code) is not str or type(state[1]) is not str:  # nothing else is looked up: hashing may not end
        raise _Broken("an array of a type that is no text")
    dtype = _DTYPES.get(code)
    if dtype is None or state[2:5] != (None, None, None):
        kind = {"O": " (objects)", "V": " (structured or opaque)", "M": " (dates)", "m": " (durations)",
                "U": " (text)", "S": " (text)"}.get(code[:1], "")
        raise UserError(f"holds an array of type {_printable(code[:50])}{kind}, which is not one of numbers; it "
                        f"was refused and nothing in it was run. {_REMEDY}")
    return dtype, {"<": "little", ">": "big"}.get(state[1], sys.byteorder) != sys.byteorder


@functools.cache
def _optax_fields() -> dict[str, tuple[str, ...]]:
    """Field names of optax's states by class; of the installed optax, never what a file names."""
    import optax.contrib  # noqa: F401, it loads the others

    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "optax"]
    return {c.__name__: c._fields for m in modules for c in vars(m).values()
            if isinstance(c, type) and issubclass(c, tuple) and hasattr(c, "_fields")}


def _leaves(x: Any, where: str) -> dict | np.ndarray | None:
    """The state: nested dictionaries of arrays, None where there are no leaves."""
    if isinstance(x, list):
        x = {str(i): value for i, value in enumerate(x)}
    if isinstance(x, dict):
        for key in x:  # keys become the names of leaves, `params/a/b`, and may become those of files
            if not key.isprintable() or "/" in key or not key.strip(".") or len(where) + len(key) > _MAX_NAME:
                raise UserError(f"has {_printable(key[:100])!r} for a name in {_printable(where[:100]) or 'its state'}, "
                                "which cannot be one of a leaf. Rename it where the checkpoint was made.")
        found = {key: _leaves(value, f"{where}/{key}".lstrip("/")) for key, value in x.items()}
        return {key: value for key, value in found.items() if value is not None} or None
    if isinstance(x, str):
        raise UserError(f"holds text at {_printable(where)}, where an array belongs. Save it in the metadata.")
    if x is None or isinstance(x, np.ndarray):
        return x
    if isinstance(x, float):
        with np.errstate(over="ignore"):
            return np.array(x, np.float32)
    kind = np.bool_ if isinstance(x, bool) else np.int32 if _INT32.min <= x <= _INT32.max else np.int64
    return np.array(x, kind)


def _has_array(x: Any) -> bool:
    if isinstance(x, (dict, list)):
        return any(map(_has_array, x.values() if isinstance(x, dict) else x))
    return isinstance(x, np.ndarray) and x.ndim > 0


def _printable(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)  # what a file names must not steer a terminal


# --- writing ---

_RECONSTRUCT = np.empty(0).__reduce__()[0]


class _Pickler(pickle._Pickler):
    def save_global(self, obj, name=None):
        if obj is not _RECONSTRUCT:
            return super().save_global(obj, name)
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n")  # the name that numpy 1 and 2 both know
        self.memoize(obj)


def write(path: str | Path, state: dict, metadata: dict, timestamp: str | None) -> None:
    """Writes the legacy layout (protocol 4; numpy arrays, of numpy 1's names, and plain values), whole or not at all.

    `state`: nested dictionaries of arrays of numbers; its `step` becomes an int, as legacy code has
    it. `metadata`: plain JSON.

    Raises UserError: the file cannot be written, or holds something else.
    """
    path = Path(os.path.abspath(path))
    state = _arrays(state)
    if "step" in state:
        if np.ndim(state["step"]):
            raise UserError("The checkpoint's step is no number; it cannot be written as a pickle.")
        state["step"] = int(state["step"])
    content = {"state": state, "metadata": json.loads(json.dumps(metadata)), "timestamp": timestamp}
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "wb") as file:
            _Pickler(file, 4).dump(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}). Give another place, or make room.") from None
    finally:
        with contextlib.suppress(OSError):  # it is not there: all went well, or nothing was begun
            fresh.unlink()


def _arrays(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _arrays(value) for key, value in tree.items()}
    array = np.asarray(tree)
    if array.dtype.name not in _DTYPES:
        raise UserError(f"The checkpoint holds a leaf of type {array.dtype}, which is not one of numbers; it cannot be written as a pickle.")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
