"""Kinds of configuration fields: their ranges, and what they are to programs, runs and sweeps."""

import dataclasses
import math
import types
import typing
from dataclasses import field

from ifvit.errors import UserError

# What a field is to the compiled programs: a part of them (PROGRAM), a number that they take as an argument
# (SCALAR: runs that differ in such alone share one program), or nothing (HOST).
PROGRAM, SCALAR, HOST = "program", "scalar", "host"


# What a field is to a run and to a sweep; most are none of these.
FREE = "free"  # a run goes on with another value of it, and is the same run
OWN = "own"  # a run's own affair: no setting to hand on
SWEEP = "sweep"  # the same for all trials of a sweep, or they could not be compared
COMMON = "common"  # the same for both modules: their windows and networks share it
LIVE = "live"  # the host's, and may change while a run trains


def number(default, lo=-math.inf, hi=math.inf, use=PROGRAM, word=None, roles=frozenset()):
    """A numeric field with its closed range; `word`: what it may be instead."""
    return field(
        default=default, metadata={"lo": lo, "hi": hi, "use": use, "roles": roles} | ({"word": word} if word else {})
    )


def choice(default, *choices, use=PROGRAM, roles=frozenset()):
    """A field that has one of some values."""
    return field(default=default, metadata={"choices": choices, "use": use, "roles": roles})


def program(default, roles=frozenset()):
    """A field of any kind that compiled programs depend on."""
    return field(default=default, metadata={"roles": roles})


def host(default, roles=frozenset()):
    """A field of any kind that no compiled program depends on."""
    return field(default=default, metadata={"use": HOST, "roles": roles})


def place(default, roles=frozenset()):
    """A field of the host's that is a path, or several."""
    return field(default=default, metadata={"use": HOST, "path": True, "roles": roles})


TINY = 1e-12  # the lower bound of "positive"


def use_of(f: dataclasses.Field) -> str:
    """PROGRAM, SCALAR or HOST."""
    return f.metadata.get("use", PROGRAM)


def kind_of(f: dataclasses.Field) -> type | types.GenericAlias:
    """The field's type; of a number that may be a word instead, the number's."""
    return typing.get_args(f.type)[0] if "word" in f.metadata else f.type


def check(f: dataclasses.Field, value) -> None:
    """UserError unless `value` has the field's type and lies in its range."""
    kind = kind_of(f)
    what = f"{f.name} is {value!r}"
    if isinstance(value, str) and value == f.metadata.get("word"):
        return
    if isinstance(kind, types.GenericAlias):
        inner = typing.get_args(kind)[0]
        if not isinstance(value, tuple) or not value or not all(isinstance(v, inner) for v in value):
            raise UserError(f"{what}, which is not a list of {inner.__name__}; give at least one.")
        return
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        word = f" nor {f.metadata['word']!r}" if "word" in f.metadata else ""
        raise UserError(f"{what}, which is not of type {kind.__name__}{word}; give one.")
    if "choices" in f.metadata and value not in f.metadata["choices"]:
        raise UserError(f"{what}, which is not known; choose from {', '.join(f.metadata['choices'])}.")
    if "lo" in f.metadata:
        lo, hi = f.metadata["lo"], f.metadata["hi"]
        if not (lo <= value <= hi) or math.isnan(value) or (kind is float and math.isinf(value)):
            low = "more than 0" if lo == TINY else f"at least {lo:g}" if lo > -math.inf else ""
            high = f"at most {hi:g}" if hi < math.inf else ""
            raise UserError(f"{what}, which is out of range; it must be {' and '.join(x for x in (low, high) if x)}.")
