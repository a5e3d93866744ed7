"""The one interpreter for pickles. It runs nothing: what a pickle asks for is described, never done.

A pickle is a program that can call whatever it can name. Here a name becomes a `Name`, which is text;
a call becomes a `Call`, which says what was to be called with what. Nothing is imported and nothing is
looked up. What a description stands for is decided later, by code of our own: `plain.py` for the values
of Python and numpy, `ifvit.legacy` for JAX's libraries, `ifvit.foreign.torch_file` for torch's tensors. What none
of them knows stays a description.

Keys of dictionaries are never hashed: to hash a tuple that is nested deeply enough ends the process.
"""

import codecs
import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from ifvit.errors import UserError

MAX_INSTRUCTIONS = 2_000_000  # a jax array takes 40
MAX_NAME = 1000  # characters of what a pickle may name
_MAX_BITS = 1024  # of an integer: states of random generators have 128
REMEDY = "Save it again where it was made, with plain arrays alone."

# What a pickle may not even name. Nothing would be called in any case; but a file that asks for one of
# these was made to do harm, and its reader is told so.
_HARM = re.compile(
    r"(?:os|posix|nt|subprocess|_posixsubprocess|pty|importlib|runpy|imp|ctypes|_ctypes|socket|_socket|shutil|marshal"
    r"|pickle|_pickle|codeop|pdb|bdb|timeit|webbrowser|sys|_winapi)\..*"
    r"|code\.(?:interact|Interactive\w+)|commands\.get\w+|site\.(?:os|sys|exec\w*|add\w*)"
    r"|builtins\.(?:eval|exec|execfile|compile|__import__|open|input|breakpoint|apply|setattr|delattr|globals|locals"
    r"|vars)|torch\.(?:load|hub\..*)|(?:joblib|cloudpickle|dill)\.loads?|numpy\.(?:load|fromfile|memmap)"
    r"|pandas\.(?:eval|read_pickle)"
)
# The names that Python 2 and numpy 2 have for the same things.
_OTHER_NAMES = {"numpy._core": "numpy.core", "__builtin__": "builtins", "copy_reg": "copyreg"}

# Instructions that are values.
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
codecs.lookup("raw-unicode-escape")  # Python would import it while it reads text of protocol 0


class Broken(Exception):
    """The file's content contradicts itself."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or a function that a pickle names, `module.attribute`."""

    name: str


class List(list):
    """A list or a set. Like all that can contain itself it is known by identity, and never compared."""

    __slots__ = ()
    __eq__, __hash__ = object.__eq__, object.__hash__


@dataclass(eq=False, slots=True)
class Dict:
    """A dictionary, in the order of the file; of equal keys the last one counts."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    def named(self) -> dict[str, Any]:
        """What stands under text."""
        return {key: value for key, value in self.pairs if type(key) is str}


@dataclass(eq=False, slots=True)
class Call:
    """An object that a pickle asks for: what it calls, with which arguments, and what it adds to the outcome."""

    what: Any  # a Name, or a Call whose outcome would be called
    args: tuple
    state: Any = None  # its attributes, mostly a Dict
    items: list = field(default_factory=List)  # appended to it
    pairs: list[tuple[Any, Any]] = field(default_factory=list)  # set in it

    @property
    def name(self) -> str:
        return self.what.name if type(self.what) is Name else ""

    def attributes(self) -> dict[str, Any] | None:
        """Its attributes, those of `__slots__` too; None where the state is something else."""
        states = self.state if type(self.state) is tuple and len(self.state) == 2 else (self.state,)
        if not all(part is None or type(part) is Dict for part in states):
            return None
        return {key: value for part in states if part for key, value in part.named().items()}


def parse(file: BinaryIO | bytes, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value that a pickle describes, of None, bool, int, float, str, bytes, tuple, List, Dict, Name and Call.

    `file` is read up to the pickle's end; its `read(n)` must not make room for more than is there. Sets
    come as Lists. `persistent` is given what stands for something outside the pickle, and returns what
    is to stand there; without it such a pickle is refused.

    Raises Broken, UserError (a name that could do harm, bounds), and what `pickletools` raises.
    """
    stack: list = []
    below: list[list] = []  # the stacks under each mark
    memo: dict[int, Any] = {}
    for count, (op, arg, _) in enumerate(pickletools.genops(io.BytesIO(file) if isinstance(file, bytes) else file)):
        if count >= MAX_INSTRUCTIONS:
            raise UserError(f"has more than {MAX_INSTRUCTIONS:,} instructions, as no checkpoint needs. {REMEDY}")
        if op.name in _VALUES:
            if type(arg) is int and arg.bit_length() > _MAX_BITS:
                raise Broken(f"an integer of more than {_MAX_BITS} bits")
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
                stack.append(Dict())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append(List())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, int(op.name[-1]))))
            case "TUPLE" | "FROZENSET" | "LIST" | "DICT":
                items, stack = stack, below.pop()
                made = {"LIST": List, "DICT": lambda x: Dict(_pairs(x))}.get(op.name, tuple)
                stack.append(made(items))
            case "APPEND" | "SETITEM":
                items = _pop(stack, 1 if op.name == "APPEND" else 2)
                _add(stack[-1], items, in_pairs=op.name == "SETITEM")
            case "APPENDS" | "ADDITEMS" | "SETITEMS":
                items, stack = stack, below.pop()
                _add(stack[-1], items, in_pairs=op.name == "SETITEMS")
            case "GLOBAL":
                stack.append(_name(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*_pop(stack, 2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*_pop(stack, 2)))
            case "NEWOBJ_EX":
                what, args, keywords = _pop(stack, 3)
                if type(keywords) is not Dict or type(args) is not tuple:
                    raise Broken("keywords or arguments that are none")
                stack.append(_call(what, (args, keywords) if keywords.pairs else args))  # not one: a copy each time
            case "INST" | "OBJ":
                items, stack = stack, below.pop()
                what = _name(*arg.split(" ", 1)) if op.name == "INST" else items.pop(0)
                stack.append(_call(what, tuple(items)))
            case "BUILD":
                (state,) = _pop(stack, 1)
                if type(stack[-1]) is not Call or stack[-1].state is not None:
                    raise Broken("a state for something that takes none")
                stack[-1].state = state
            case "DUP":
                stack.append(stack[-1])
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                stack = below.pop()
            case "PROTO":
                if arg > 5:
                    raise UserError(f"is a pickle of protocol {arg}, and 5 is the newest known. {REMEDY}")
            case "FRAME":
                pass  # it tells how much to read ahead
            case "BINPERSID" if persistent:
                stack.append(persistent(_pop(stack, 1)[0]))
            case "STOP":
                return stack.pop()
            case _:  # EXT1, EXT2, EXT4, PERSID, BINPERSID, NEXT_BUFFER, READONLY_BUFFER
                raise UserError(
                    f"has the instruction {op.name}, which refers to something outside the file, as files "
                    f"of other software do; it was refused and nothing in it was run. {REMEDY}"
                )
    raise Broken("no end")


def _pop(stack: list, count: int) -> list:
    if len(stack) < count:
        raise Broken("too few values on the stack")
    items = stack[-count:]
    del stack[-count:]
    return items


def _pairs(items: list) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise Broken("a key without a value")
    pairs = list(zip(items[::2], items[1::2]))
    if any(type(key) in (List, Dict, bytearray) for key, _ in pairs):
        raise Broken("a key that can be none")
    return pairs


def _add(target: Any, items: list, in_pairs: bool) -> None:
    if type(target) is Call:
        (target.pairs if in_pairs else target.items).extend(_pairs(items) if in_pairs else items)
    elif in_pairs and type(target) is Dict:
        target.pairs.extend(_pairs(items))
    elif not in_pairs and type(target) is List:
        target.extend(items)
    else:
        raise Broken("items for something that takes none")


def _name(module: Any, attribute: Any) -> Name:
    if type(module) is not str or type(attribute) is not str:
        raise Broken("a name that is no text")
    if len(module) + len(attribute) > MAX_NAME:  # a long name, stored once, could be looked up without end
        raise _refused(f"{module[:100]}.{attribute[:100]}")
    for new, old in _OTHER_NAMES.items():
        if module == new or module.startswith(new + "."):
            module = old + module[len(new) :]
    name = f"{module}.{attribute}"
    if _HARM.fullmatch(name):
        raise _refused(name)
    return Name(name)


def _refused(name: str) -> UserError:
    return UserError(
        f"needs {printable(name[:200])}, which is not an array or a plain container; it was refused and "
        f"nothing in it was run. {REMEDY}"
    )


def _call(what: Any, args: Any) -> Call:
    """The call; those by which protocols 0 and 1 make objects are told as the newer ones tell them.

    Content is handed on as it is: a copy each time would take memory without end.
    """
    if type(what) not in (Name, Call) or type(args) is not tuple:
        raise Broken("a call of something that cannot be called")
    match what.name, args:
        case "copyreg._reconstructor", (Name() | Call() as made, Name(base), content):
            made = Call(made, ())
            if type(content) is tuple and base == "builtins.tuple":
                made.args = content
            elif type(content) is Dict:
                made.pairs = content.pairs
            elif type(content) is List:
                made.items = content
            elif base != "builtins.object":
                made.args = (content,)
            return made
        case "copyreg.__newobj__", (Name() | Call() as made, *rest) if len(rest) < 1000:
            return Call(made, tuple(rest))
    return Call(what, args)


def printable(text: str) -> str:
    """Text of a file, of which nothing steers a terminal."""
    return re.sub(r"[^ -~]", "?", text)
