"""The legacy checkpoint, a pickle: read without running anything in it, and written.

What the pickle asks for is described by `foreign.pickles`; here are the objects of JAX's libraries that
hold arrays, and the layouts. Everything else that lies in a file becomes text, lists and dictionaries.

Layouts: `{'state': {'params', 'opt_state', 'step', …}, 'metadata': {…}, 'timestamp': str}`,
`{'params': …, …}` alone, or bare parameters.
"""

import contextlib
import functools
import json
import os
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ifvit.errors import CheckpointNotFound, UserError
from ifvit.foreign import numpy_arrays
from ifvit.foreign.pickles import MAX_NAME, Broken, Call, Name, parse, printable
from ifvit.foreign.plain import Builder, StandIn, has_array

_INT32 = np.iinfo(np.int32)
_INT64 = np.iinfo(np.int64)

_ARRAY = re.compile(r"jax\._src\.(?:array\._reconstruct_array|device_array\.reconstruct_device_array)")
_OPTAX = re.compile(r"optax(?:\.\w+)*\.(\w+)")
# Objects around what counts, and under which of their attributes they hold it.
_BOX = re.compile(
    r"flax\.(?:nnx|core\.meta|linen\.spmd|experimental\.nnx)(?:\.\w+)+|ml_collections(?:\.\w+)*\.(?:Frozen)?ConfigDict"
    r"|jax\._src\.(?:random\.)?prng\.PRNGKeyArray"
)
_CONTENTS = ("_mapping", "_raw_value", "raw_value", "value", "_fields", "_base_array")


@dataclass(frozen=True)
class Legacy:
    state: dict  # nested, with string keys; leaves are read-only numpy arrays
    metadata: dict  # plain JSON
    timestamp: str | None


def read(path: str | os.PathLike) -> Legacy:
    """A legacy checkpoint's content; nothing in the file is executed or imported.

    In `state`, optax states are dictionaries by field name, lists and tuples dictionaries by
    position, numbers 0-d arrays (int32, float32, bool), arrays of the byte order of this machine;
    what has no leaves is left out, as in `flax.serialization.to_state_dict` of ours. What lies there and
    is no array stands in `metadata` under `not_arrays`, by its name.

    Raises UserError: the file is missing, unreadable, truncated, corrupt, no such pickle, or asks
    for something that could do harm (named).
    """
    path = Path(path) if isinstance(path, str) else path  # a gs:// path reads itself
    try:
        if path.exists() and not path.is_file():
            raise UserError("is not a file. Give the path of a .pkl file.")
        return _layout(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except FileNotFoundError:
        raise CheckpointNotFound(f"Checkpoint not found: {path}. Give the path of a .pkl file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give a file that this user may read.") from None
    except Exception as error:  # a hostile or damaged file can make the parsers raise nearly anything
        why = str(error) if isinstance(error, (Broken, ValueError)) else f"{type(error).__name__} {error}".strip()
        raise UserError(
            f"{path} is truncated, corrupt or no pickle ({printable(why[:200])}). Copy or save it again."
        ) from None


def _layout(raw: bytes) -> Legacy:
    build = _JaxBuilder(len(raw))
    root = _content(build.plain(parse(raw)))
    if not isinstance(root, dict):
        raise UserError(f"holds a {type(root).__name__}, not a dictionary of parameters. Give a checkpoint.")
    if isinstance(_content(root.get("state")), dict):
        state, rest = _content(root["state"]), {k: v for k, v in root.items() if k != "state"}
    elif "params" in root:
        certain = dict.fromkeys(("params", "batch_stats", "opt_state", "step"), True) | dict.fromkeys(
            ("metadata", "timestamp", "config"), False
        )
        state = {k: v for k, v in root.items() if certain.get(k, has_array(v) and not isinstance(v, StandIn))}
        rest = {k: v for k, v in root.items() if k not in state}
    else:
        state, rest = {"params": root}, {}
    timestamp, metadata = rest.pop("timestamp", None), build.json(rest.pop("metadata", {}))
    metadata = build.json(rest) | (metadata if isinstance(metadata, dict) else {"metadata": metadata})
    aside: dict = {}
    leaves = _leaves(state, "", build, aside) or {}
    if not isinstance(leaves.get("params"), dict):
        raise UserError("holds no params. Give a checkpoint with the model's parameters.")
    if aside:
        metadata |= {"not_arrays": aside}
    return Legacy(leaves, metadata, timestamp if timestamp is None else str(build.json(timestamp)))


def _content(x: Any) -> Any:
    """Of an object of an unknown class, such as one's own TrainState, its attributes."""
    return x.state if isinstance(x, StandIn) and isinstance(x.state, dict) else x


class _JaxBuilder(Builder):
    """Knows arrays of jax, states of optax, and the objects of flax and ml_collections that hold others."""

    def known(self, x: Call) -> Any:
        if _ARRAY.fullmatch(x.name):
            match x.args:
                case (Name("numpy.core.multiarray._reconstruct") as made, tuple(args), tuple(state), *_):
                    return numpy_arrays.build(Call(made, args, state), self.spend, self.plain)
            raise Broken("an array that jax did not write")
        if x.name == "flax.core.frozen_dict.FrozenDict" and len(x.args) == 1:
            return self.plain(x.args[0])
        if (optax := _OPTAX.fullmatch(x.name)) and x.state is None:
            fields = _optax_fields().get(optax[1])
            if fields is not None and len(fields) == len(x.args):
                return {name: self.plain(value) for name, value in zip(fields, x.args)}
        if _BOX.fullmatch(x.name) and not x.args and (attributes := x.attributes()):
            self.spend(nodes=len(attributes))
            for name in _CONTENTS:
                if name in attributes:
                    return self.plain(attributes[name])
        return super().known(x)


@functools.cache
def _optax_fields() -> dict[str, tuple[str, ...]]:
    """Field names of optax's states by class; of the installed optax, never what a file names."""
    import optax.contrib  # noqa: F401, it loads the others

    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "optax"]
    return {
        c.__name__: c._fields
        for m in modules
        for c in vars(m).values()
        if isinstance(c, type) and issubclass(c, tuple) and hasattr(c, "_fields")
    }


def _leaves(x: Any, where: str, build: Builder, aside: dict) -> dict | np.ndarray | None:
    """The state: nested dictionaries of arrays, None where there are no leaves; `aside` gets what is no array."""
    build.spend(nodes=1)
    if isinstance(x, StandIn) and x.has_arrays:
        x = x.content
    if isinstance(x, list) and x and not has_array(x) and any(isinstance(value, str) for value in x):
        aside[where] = build.json(x)  # a list of text, not leaves that are text
        return None
    if isinstance(x, list):
        x = {str(i): value for i, value in enumerate(x)}
    if isinstance(x, dict):
        leaves = {}
        for key, value in x.items():
            if len(where) + len(key) > MAX_NAME:
                raise _unfit(key, where)
            if (found := _leaves(value, f"{where}/{key}".lstrip("/"), build, aside)) is None:
                continue
            if not key.isprintable() or "/" in key or not key.strip("."):
                raise _unfit(key, where)
            leaves[key] = found
        return leaves or None
    if x is None or isinstance(x, np.ndarray):
        return x
    if isinstance(x, (str, StandIn)) or isinstance(x, int) and not _INT64.min <= x <= _INT64.max:
        aside[where] = build.json(x)
        return None
    if isinstance(x, float):
        with np.errstate(over="ignore"):
            return np.array(x, np.float32)
    kind = np.bool_ if isinstance(x, bool) else np.int32 if _INT32.min <= x <= _INT32.max else np.int64
    return np.array(x, kind)


def _unfit(key: str, where: str) -> UserError:
    """Keys become the names of leaves, `params/a/b`, and may become those of files."""
    return UserError(
        f"has {printable(key[:100])!r} for a name in {printable(where[:100]) or 'its state'}, "
        "which cannot be one of a leaf. Rename it where the checkpoint was made."
    )


# --- writing ---

_RECONSTRUCT = np.empty(0).__reduce__()[0]


class _Pickler(pickle._Pickler):
    def save_global(self, obj, name=None):
        if obj is not _RECONSTRUCT:
            return super().save_global(obj, name)
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n")  # the name that numpy 1 and 2 both know
        self.memoize(obj)


def write(path: str | os.PathLike, state: dict, metadata: dict, timestamp: str | None) -> None:
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
    if array.dtype.name not in numpy_arrays.NUMBERS:
        raise UserError(
            f"The checkpoint holds a leaf of type {array.dtype}, which is not one of numbers; it cannot be "
            "written as a pickle."
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
