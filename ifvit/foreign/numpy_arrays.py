"""Arrays and scalars as numpy pickles them, built out of the file's own bytes."""

import math
import re
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ifvit.errors import UserError
from ifvit.foreign.pickles import REMEDY, Broken, Call, Dict, List, Name, printable

_NUMBERS = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
_PLAIN = {name: np.dtype(name) for name in _NUMBERS}
NUMBERS = _PLAIN | {dtype.str[1:]: dtype for dtype in _PLAIN.values()} | {"bool_": np.dtype(bool)} | {  # also 'f4', …
    name: np.dtype(kind) for name, kind in vars(ml_dtypes).items()
    if isinstance(kind, type) and issubclass(kind, np.generic)}  # fmt: skip
"""The types of arrays that are parameters, by every name that a file may have for them."""

DTYPE_NAME = re.compile(rf"(?:numpy|jax\.numpy|ml_dtypes|jaxlib\.xla_extension)\.({'|'.join(NUMBERS)})")
_OTHERS = re.compile(r"[US]\d{1,9}|[Mm]8(?:\[(?:\d{1,9})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?")  # text and times
_MAX_DEPTH = 10  # of structured types in structured types

ARRAYS = frozenset(
    {
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.core.numeric._frombuffer",
        "numpy.ma.core._mareconstruct",
    }
)
"""The names of the functions that make numpy's arrays and scalars."""


def build(x: Call, spend: Callable[..., None], plain: Callable[[Any], Any]) -> Any:
    """The array of a call of one of `ARRAYS`, in the byte order of this machine.

    Numbers come as a read-only array. Text and times come as nested lists of text, objects as nested lists
    of what `plain` makes of each; the fields of a structured array as a dictionary of such; a masked array
    as a dictionary of `data` and `mask`. `spend(nodes=, size=)` refuses what takes too much.
    """
    mask, axes = None, ()
    match x.name, x.args, x.state:
        case "numpy.core.multiarray.scalar", (dtype, raw), _:
            shape, order = (), "C"
        case "numpy.core.numeric._frombuffer", (raw, dtype, shape, str(order), *axes), _ if (
            order in ("C", "F", "K") and len(axes) < 2
        ):
            order = "C" if order == "K" else order
        case "numpy.core.multiarray._reconstruct", _, (_, shape, dtype, fortran, raw):
            order = "F" if fortran is True else "C"
        case "numpy.ma.core._mareconstruct", _, (_, shape, dtype, fortran, raw, mask, _):
            order = "F" if fortran is True else "C"
        case _:
            raise Broken("an array that numpy did not write")
    if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise Broken("an impossible shape")
    kind, swapped = _dtype(dtype, spend)
    if kind.hasobject:
        return _objects(kind, raw, shape, spend, plain)
    data = _array(kind, swapped, raw, shape, order, spend)
    if axes:
        data = data.transpose(*axes)
    if mask is None:
        return _values(data, spend)
    hidden = _array(np.dtype(bool), False, mask, shape, order, spend) if data.dtype.names is None else None
    return {"data": _values(data, spend)} | ({} if hidden is None else {"mask": hidden})


def _array(dtype: np.dtype, swapped: bool, raw: Any, shape: tuple, order: str, spend: Callable) -> np.ndarray:
    raw = raw_bytes(raw, spend)
    if raw is None:
        raise Broken("an array without bytes")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise Broken(f"an array of {len(raw)} bytes has another size than its shape and type")
    array = np.ndarray(shape, dtype, raw, order=order)
    if swapped:
        array = array.byteswap()
    array.flags.writeable = False  # it may be at several places of the tree
    return array


def _values(array: np.ndarray, spend: Callable) -> Any:
    if array.dtype.names is not None:
        spend(nodes=len(array.dtype.names))
        fields = {}
        for name in array.dtype.names:
            part = array[name]
            spend(size=part.nbytes)
            part = np.ascontiguousarray(part.astype(part.dtype.newbyteorder("="))).reshape(part.shape)
            part.flags.writeable = False
            fields[name] = _values(part, spend)
        return fields
    if array.dtype.kind in "USMm":
        spend(nodes=array.size, size=array.nbytes)
        if not array.size:  # its other dimensions may be of any size
            return []
        match array.dtype.kind:
            case "S":
                array = np.array([x.decode("latin1") for x in array.ravel()]).reshape(array.shape)
            case "m":  # with its unit: "5 seconds"
                array = np.array([str(x) for x in array.ravel()]).reshape(array.shape)
        return array.astype(str).tolist()
    spend(size=array.nbytes)
    return array


def _objects(dtype: np.dtype, raw: Any, shape: tuple, spend: Callable, plain: Callable) -> Any:
    """An array of Python objects: lists of lists of them; what has objects among its fields is not taken apart."""
    if dtype.names is not None:
        return f"numpy.ndarray of {dtype.itemsize}-byte records with objects"
    if not shape:  # a scalar is the object itself, an array of no dimension has it in a list
        return plain(raw[0] if type(raw) is List and len(raw) == 1 else raw)
    if type(raw) is not List or math.prod(shape) != len(raw):
        raise Broken("an array of objects of another number than its shape")
    items = [plain(item) for item in raw]
    if not items:
        return []
    for length in reversed(shape[1:]):
        items = [items[at : at + length] for at in range(0, len(items), length)]
    return items


def raw_bytes(x: Any, spend: Callable) -> bytes | bytearray | None:
    """The bytes that stand at a place, as any protocol writes them; None where none do."""
    while type(x) is Call and x.name == "builtins.bytearray" and len(x.args) == 1:
        x = x.args[0]
    if type(x) in (bytes, bytearray):
        return x
    if type(x) is Call:  # protocols 0 to 2 have no bytes
        match x.name, x.args:
            case "_codecs.encode", (str(letters), "latin1"):
                spend(size=len(letters))
                return letters.encode("latin1")
            case (("builtins.bytes" | "builtins.bytearray"), ()):
                return b""
            case "builtins.bytearray", (str(letters), "latin-1"):
                spend(size=len(letters))
                return letters.encode("latin1")
    return None


def _dtype(x: Any, spend: Callable, depth: int = 0) -> tuple[np.dtype, bool]:
    """The type that a call of numpy.dtype describes, and whether an array's bytes are to be swapped for it."""
    if type(x) is not Call or x.name != "numpy.dtype" or not x.args or depth > _MAX_DEPTH:
        raise Broken("an array without a type")
    code, state = x.args[0], x.state or (3, "=", None, None, None, -1, -1, 0)
    if type(code) is Name and (known := DTYPE_NAME.fullmatch(code.name)):
        code = known[1]
    if type(code) is not str or type(state) is not tuple or len(state) < 5 or type(state[1]) is not str:
        raise Broken("an array of a type that is no text")  # nothing else is looked up: hashing may not end
    order, part, names, fields = state[1:5]
    swapped = {"<": "little", ">": "big"}.get(order, sys.byteorder) != sys.byteorder
    if part is not None:
        return _repeated(part, spend, depth), False
    if names is not None or fields is not None:
        return _structured(names, fields, state, spend, depth), False
    if code in NUMBERS:
        return NUMBERS[code], swapped
    if code in ("O", "O8", "O4"):
        return np.dtype(object), False
    if code in ("M8", "m8"):
        code += _unit(state, spend)
    if not _OTHERS.fullmatch(code):
        raise UserError(
            f"holds an array of type {printable(code[:50])}, which is neither of numbers nor of text; it was "
            f"refused and nothing in it was run. {REMEDY}"
        )
    dtype = np.dtype(code)
    return (dtype, swapped) if dtype.kind in "Mm" else (dtype.newbyteorder(">" if order == ">" else "<"), False)


def _unit(state: tuple, spend: Callable) -> str:
    """`[25ms]` of a datetime64's state, which ends with its unit."""
    match state[8:]:
        case ((_, (unit, int(count), *_)),):
            unit = unit.encode() if type(unit) is str else raw_bytes(unit, spend)
            return f"[{count if count != 1 else ''}{unit.decode('latin1')}]" if unit else ""
    return ""


def _repeated(part: Any, spend: Callable, depth: int) -> np.dtype:
    """A type that is an array of another one."""
    match part:
        case (Call() as base, tuple(shape)) if len(shape) <= 32 and all(map(_is_size, shape)):
            return np.dtype((_in_order(base, spend, depth), shape))
    raise Broken("a type within a type that is none")


def _structured(names: Any, fields: Any, state: tuple, spend: Callable, depth: int) -> np.dtype:
    if type(names) is not tuple or type(fields) is not Dict or len(state) < 6 or not _is_size(state[5]):
        raise Broken("fields that are none")
    spend(nodes=len(names) + len(fields.pairs))
    known = fields.named()
    places = []
    for name in names:
        place = known.get(name) if type(name) is str else None
        if type(place) is not tuple or len(place) < 2 or type(place[0]) is not Call or type(place[1]) is not int:
            raise Broken("a field without a type or a place")
        places.append((name, _in_order(place[0], spend, depth), place[1]))
    return np.dtype(
        {
            "names": [n for n, _, _ in places],
            "formats": [t for _, t, _ in places],
            "offsets": [at for _, _, at in places],
            "itemsize": state[5],
        }
    )


def _in_order(x: Call, spend: Callable, depth: int) -> np.dtype:
    """The type of a field, which has a byte order of its own."""
    dtype, swapped = _dtype(x, spend, depth + 1)
    return dtype.newbyteorder() if swapped else dtype


def _is_size(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**31
