"""A command's words before they are parsed: flags that are given more than once, and paths that begin at a home."""

import dataclasses
import typing

import tyro

from ifvit.errors import UserError
from ifvit.paths import from_home


def read(cls, argv: list[str]) -> list[str]:
    """`argv` for the dataclass of flags `cls`. `--resume` alone means its default. Parts of a list become one list.

    UserError for a flag of one value that is given twice: one of the two would be lost without a word.
    """
    kinds = _kinds(cls)
    parts: list[list[str]] = []  # a flag and what stands after it
    first: dict[str, list[str]] = {}  # a flag's name -> its first part
    for part in _in_parts(argv):
        flag, sign, value = part[0].partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if part == ["--resume"]:
            part.append("auto")
        before = first.setdefault(name, part)
        if before is part or kinds.get(name) is None:
            parts.append(part)
        elif kinds[name] == "list":
            before += [value] * bool(sign) + part[1:]
        else:
            raise UserError(f"--{name} is given twice ({_value(before)} and {_value(part)}); give it once.")
    return [word for part in parts for word in part]


def _in_parts(argv: list[str]) -> list[list[str]]:
    """The words from each flag to the next, and those before the first."""
    parts: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not parts:
            parts.append([])
        parts[-1].append(word)
    return parts


def _value(part: list[str]) -> str:
    """What a flag of one value has been given."""
    _, sign, value = part[0].partition("=")
    return repr(value if sign else part[1] if len(part) > 1 else "")


def _kinds(cls) -> dict[str, str]:
    """Of each flag whether it takes one value or a list; not of switches, and of what collects its values by itself."""
    hints = typing.get_type_hints(cls, include_extras=True)
    kinds = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        marks = getattr(hint, "__metadata__", ())
        kind = hint.__origin__ if marks else hint
        if kind is not bool and tyro.conf.UseAppendAction not in marks:
            kinds[f.name.rstrip("_")] = "list" if typing.get_origin(kind) in (tuple, list) else "value"
    return kinds


def from_homes(args):
    """The parsed flags with the home for `~` where a path begins with it; a name that no user has stays as it is."""

    def of(value):
        if isinstance(value, tuple):
            return tuple(map(of, value))
        if not isinstance(value, str) or not value.startswith("~"):
            return value
        try:
            return from_home(value)
        except UserError:
            if value.split("/")[0] == "~":
                raise
            return value  # a pattern, say; what takes a path refuses it

    return dataclasses.replace(args, **{f.name: of(getattr(args, f.name)) for f in dataclasses.fields(args) if f.init})
