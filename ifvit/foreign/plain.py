"""Plain values of what a pickle describes: what Python and numpy write is known, all else becomes a stand-in."""

import datetime
import re
import uuid
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from ifvit.errors import UserError
from ifvit.foreign import numpy_arrays
from ifvit.foreign.pickles import REMEDY, Broken, Call, Dict, List, Name

_MAX_NODES = 1_000_000  # visited, so that shared references cannot multiply
_MAX_DEPTH = 200
_MAX_COPIES = 10  # arrays and text may have so many times the file's size (tied weights, names), and
_SLACK = 10_000_000  # so many bytes more
_MAX_BYTES = 100  # of bytes outside an array, which are told as text
_BIG = 10_000  # numbers of an array that are listed outside the state
_NOT_DATA = ("apply_fn", "tx")  # functions that a TrainState carries along

_DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
_LISTS = ("collections.deque", "builtins.list", "builtins.set", "builtins.frozenset", "builtins.tuple")
_VALUES = ("builtins.int", "builtins.float", "builtins.str", "builtins.bool")
_RECORDS = ("argparse.Namespace", "types.SimpleNamespace")
_PATH = re.compile(r"pathlib\.(?:_local\.)?(?:Pure)?(Posix|Windows)?Path")


@dataclass(frozen=True, eq=False)
class StandIn:
    """An object of a class that is not known here: nothing but what the file says of it."""

    name: str  # of its class or function
    args: list  # what it would be made from
    state: Any  # its attributes; None for none
    has_arrays: bool

    @property
    def content(self) -> dict:
        """What lies in it, by name; by position what has no name, as in a NamedTuple."""
        if isinstance(self.state, dict):
            return self.state
        return {str(i): value for i, value in enumerate(self.args if self.state is None else [self.state])}


class Builder:
    """Plain values as a tree of dictionaries with text as keys, lists, arrays, numbers, text and StandIns.

    References may be shared or circular, so everything is counted, by the size of the file. Subclasses know
    the objects of further libraries.
    """

    def __init__(self, size: int):
        self.nodes = _MAX_NODES
        self.bytes = _MAX_COPIES * size + _SLACK
        self.open: set[Call | Dict | List] = set()  # what is being built now: it may contain itself
        self.depth = self.deepest = 0
        self.inert = 0  # how many StandIns are being built around it
        self.built: dict[Call, tuple[Any, int, int, int]] = {}  # values, and the nodes, bytes and levels that they took

    def spend(self, nodes: int = 0, size: int = 0) -> None:
        self.nodes -= nodes
        self.bytes -= size
        if self.nodes < 0 or self.bytes < 0:
            raise UserError(
                f"refers to the same content so often that it would take more than {_MAX_NODES:,} items or "
                f"{_MAX_COPIES} times the file's size. {REMEDY}"
            )

    def plain(self, x: Any) -> Any:
        """Raises UserError where a limit is passed, Broken where an array contradicts itself."""
        self.spend(nodes=1)
        if x is None or type(x) in (bool, int, float):
            return x
        if type(x) is str:
            return self.text(x)
        if type(x) in (bytes, bytearray):
            return x.hex() if len(x) <= _MAX_BYTES else f"{len(x):,} bytes"
        if type(x) is Name:
            dtype = numpy_arrays.DTYPE_NAME.fullmatch(x.name)
            return dtype[1] if dtype else x.name
        can_contain_itself = type(x) in (Call, Dict, List)  # a tuple only by way of one of these
        if self.depth > _MAX_DEPTH or can_contain_itself and x in self.open:
            return self.cut(x)
        levels = 3 if type(x) is Call else 1  # of Python's own stack a call takes more
        if can_contain_itself:
            self.open.add(x)
        self.depth += levels
        self.deepest = max(self.deepest, self.depth)
        try:
            if type(x) is Dict:
                return self.dictionary(x.pairs)
            if type(x) in (List, tuple):
                return [self.plain(item) for item in x]
            if type(x) is Call:
                return self.call(x)
        finally:
            self.depth -= levels
            if can_contain_itself:
                self.open.discard(x)
        raise Broken("something that stands outside the file")

    def cut(self, x: Any) -> str:
        """What stands where it goes no deeper. Objects of other software often refer to what they are part of."""
        if not self.inert:
            raise UserError(f"is nested more than {_MAX_DEPTH} levels deep, or contains itself. {REMEDY}")
        return f"… {self.called(x)}" if type(x) is Call else "…"

    def text(self, x: str) -> str:
        self.spend(size=len(x.encode()))  # half a surrogate pair cannot be encoded
        return x

    def dictionary(self, pairs: list) -> dict:
        keys = [self.key(key) for key, _ in pairs]
        kinds: dict[str, type] = {}
        for key, (original, _) in zip(keys, pairs):
            if kinds.setdefault(key, type(original)) is not type(original):
                raise Broken("a key twice, as text and as something else")
        return {key: self.plain(value) for key, (_, value) in zip(keys, pairs)}

    def key(self, x: Any) -> str:
        """Text for a key; of an object its name, or what it stands for where that is text."""
        if type(x) is str:
            return self.text(x)
        value = self.json(self.plain(x))
        if isinstance(value, dict) and value.get("class"):
            value = f"{value['class']}({', '.join(map(str, value.get('arguments', [])))})"
        elif isinstance(value, list):
            value = f"({', '.join(map(str, value))})"
        return self.text(str(value)[:1000])

    # --- objects ---

    def call(self, x: Call) -> Any:
        if x in self.built:
            value, nodes, size, levels = self.built[x]
            if self.depth + levels > _MAX_DEPTH + 3:
                return self.cut(x)
            self.deepest = max(self.deepest, self.depth + levels)
            if not isinstance(value, StandIn):  # of which there is one, however often it is referred to
                self.spend(nodes, size)
            return value
        nodes, size, deepest, self.deepest = self.nodes, self.bytes, self.deepest, self.depth
        value = self.known(x)
        if value is NotImplemented:
            value = self.stand_in(x)
        if isinstance(value, (StandIn, np.ndarray)) or x.name in numpy_arrays.ARRAYS:
            self.built[x] = value, nodes - self.nodes, size - self.bytes, self.deepest - self.depth
        self.deepest = max(deepest, self.deepest)
        return value

    def known(self, x: Call) -> Any:
        """What a call of the standard library or numpy stands for; NotImplemented where it is not known."""
        if x.name in numpy_arrays.ARRAYS:
            return numpy_arrays.build(x, self.spend, self.plain)
        if x.pairs:  # of any class: it is a dictionary
            return self.dictionary(x.pairs)
        if x.items and x.state is None or x.name == "collections.deque" and x.items:
            return [self.plain(item) for item in x.items]
        if x.name in _DICTS:
            match x.args:
                case (Dict(pairs),):
                    return self.dictionary(pairs)
                case (list(items),) if all(type(i) in (List, tuple) and len(i) == 2 for i in items):  # Python 2's
                    return self.dictionary(items)
            return {}
        if x.name in _LISTS and len(x.args) < 3 and all(type(a) in (List, tuple, int, type(None)) for a in x.args):
            return [self.plain(item) for item in x.args[0]] if x.args and type(x.args[0]) in (List, tuple) else []
        if x.name in _VALUES and len(x.args) == 1 and type(x.args[0]) in (int, float, str, bool):
            return self.plain(x.args[0])
        if x.name in _RECORDS and x.attributes() is not None and (not x.args or type(x.args[0]) is Dict):
            self.spend(nodes=len(x.attributes()))
            return self.dictionary(x.args[0].pairs if x.args else list(x.attributes().items()))
        raw = numpy_arrays.raw_bytes(x, self.spend)
        return self.standard(x) if raw is None else self.plain(raw)

    def standard(self, x: Call) -> Any:
        """Text for a value of the standard library."""
        if known := _PATH.fullmatch(x.name):
            self.spend(nodes=len(x.args))
            if all(type(part) is str for part in x.args):
                return str((PureWindowsPath if known[1] == "Windows" else PurePosixPath)(*map(self.text, x.args)))
        args = (
            x.args
            if len(x.args) > 4
            else tuple(a if (raw := numpy_arrays.raw_bytes(a, self.spend)) is None else raw for a in x.args)
        )
        try:
            match x.name, args:
                case "datetime.datetime", (bytes(raw), *zone) if len(zone) < 2:
                    return datetime.datetime(raw).isoformat() + self.zone(*zone)
                case "datetime.time", (bytes(raw), *zone) if len(zone) < 2:
                    return datetime.time(raw).isoformat() + self.zone(*zone)
                case "datetime.date", (bytes(raw),):
                    return datetime.date(raw).isoformat()
                case "datetime.timedelta", (int(days), int(seconds), int(micro)):
                    return str(datetime.timedelta(days, seconds, micro))
                case "datetime.timezone", _:
                    return self.zone(x)
                case "builtins.complex", (int() | float() as real, int() | float() as imaginary):
                    return str(complex(real, imaginary))
                case "decimal.Decimal", (str(number),):
                    return self.text(number)
                case "fractions.Fraction", (str(number),):
                    return self.text(number)
                case "fractions.Fraction", (int(over), int(under)):
                    return f"{over}/{under}"
                case "builtins.getattr", (Name(of), str(attribute)):  # members of an enum
                    return self.text(f"{of}.{attribute}")
                case "uuid.UUID", () if type(number := (x.attributes() or {}).get("int")) is int:
                    return str(uuid.UUID(int=number))
        except (ValueError, TypeError, OverflowError):  # no such moment, no such number
            raise Broken(f"a {x.name} that is none") from None
        return NotImplemented

    def zone(self, x: Any = None) -> str:
        """`+02:00` of a time's zone; its name in brackets where the offset is not in the file."""
        match x:
            case None:
                return ""
            case Call(
                Name("datetime.timezone"), (Call(Name("datetime.timedelta"), (int(days), int(seconds), int(micro))), *_)
            ):
                zone = datetime.timezone(datetime.timedelta(days, seconds, micro))
                return datetime.datetime(2000, 1, 1, tzinfo=zone).isoformat()[19:]
            case Call(Name("pytz._UTC" | "dateutil.tz.tz.tzutc")):
                return "+00:00"
            case Call(_, (str(name), *_)):
                return f"[{self.text(name[:100])}]"
        return "[a zone of its own]"

    def stand_in(self, x: Call) -> StandIn:
        self.inert += 1
        try:
            attributes = x.attributes()
            if attributes is None:
                state = self.plain(x.state)
            else:
                self.spend(nodes=len(attributes))
                state = self.dictionary([(k, v) for k, v in attributes.items() if k not in _NOT_DATA]) or None
            args = [self.plain(a) for a in x.args]
            if x.items:
                args += [[self.plain(item) for item in x.items]]
        finally:
            self.inert -= 1
        return StandIn(self.called(x), args, state, has_array(args) or has_array(state))

    def called(self, x: Call) -> str:
        """The name of what it calls: `module.Class`, `module.Class.method`, `module.function()` for its outcome."""
        ending = ""
        for _ in range(5):
            if type(x.what) is Name:
                return self.text(x.what.name + ending)
            x = x.what
            match x.name, x.args:
                case "builtins.getattr", (Name(of), str(attribute)):
                    return self.text(f"{of}.{attribute[:100]}{ending}")
            ending += "()"
        return "…" + ending

    # --- what is told of it as JSON ---

    def json(self, x: Any) -> Any:
        """A value in JSON. Small arrays become lists of numbers, large ones their type and shape.

        Objects become their class and content.
        """
        told: set[StandIn] = set()

        def of(x: Any) -> Any:
            if isinstance(x, dict):
                return {key: of(value) for key, value in x.items()}
            if isinstance(x, list):
                return [of(value) for value in x]
            if isinstance(x, StandIn):
                self.spend(nodes=1)
                again, parts = x in told, {"arguments": x.args or None, "state": x.state}
                told.add(x)
                return {"class": x.name} | ({} if again else {k: of(v) for k, v in parts.items() if v is not None})
            return self.numbers(x) if isinstance(x, np.ndarray) else x

        return of(x)

    def numbers(self, x: np.ndarray) -> Any:
        if not x.size:  # its other dimensions may be of any size
            return []
        if x.size > _BIG:
            return {"array": x.dtype.name, "shape": list(x.shape)}
        self.spend(nodes=x.size)
        if "complex" in x.dtype.name:
            return x.astype(str).tolist()
        return (x if x.dtype.kind in "biu" else x.astype(np.float64)).tolist()


def has_array(x: Any) -> bool:
    """Whether arrays with dimensions lie in it."""
    if isinstance(x, (dict, list)):
        return any(map(has_array, x.values() if isinstance(x, dict) else x))
    return x.has_arrays if isinstance(x, StandIn) else isinstance(x, np.ndarray) and x.ndim > 0
