"""`cluster` and `tune` are the packages beside this one, whatever else has their names where a command is started.

`python -m ifvit.X` looks for modules in the current folder before anywhere else. A cluster.py of the user's own there,
or a package of that name that is installed elsewhere, would be taken for ours; a random.py for Python's.
"""

import itertools
import os
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
NAMES = ("cluster", "tune")


def is_command() -> bool:
    """Whether this package is being imported for `python -m` of one of its commands.

    A user's own program that imports it keeps its `sys.path`.
    """
    after = (word for flag, word in itertools.pairwise(sys.orig_argv) if re.fullmatch(r"-[A-Za-z]*m", flag))
    return sys.argv[:1] == ["-m"] and next(after, "").partition(".")[0] in ("ifvit", *NAMES)


def without_current(path: list[str], here: str) -> list[str]:
    """A `sys.path` without the current folder `here` at its head, unless that is where this package lies."""
    at_its_head = path[:1] in ([""], [here]) and not sys.flags.safe_path
    return path[1:] if at_its_head and not _is_root(here) else path


def others_before_us(path: list[str]) -> list[str]:
    """The folders of a `sys.path` before ROOT that hold other modules of our names.

    Where ROOT is not in it, all its folders count.
    """
    before = itertools.takewhile(lambda folder: not _is_root(folder), path)
    return [folder for folder in before if any(PathFinder.find_spec(name, [folder]) for name in NAMES)]


def behind_us(path: list[str], others: list[str]) -> list[str]:
    """The `sys.path` with these folders at its end, and ROOT before them."""
    rest = [folder for folder in path if folder not in others]
    return rest + [str(ROOT)] * (not any(map(_is_root, rest))) + others


def _is_root(folder: str) -> bool:
    return os.path.realpath(folder) == os.path.realpath(ROOT)


if is_command():
    try:
        sys.path[:] = without_current(sys.path, os.getcwd())
    except FileNotFoundError:
        print("Error: The current folder is gone; change to another one.", file=sys.stderr)
        sys.exit(2)
    if _others := others_before_us(sys.path):
        sys.path[:] = behind_us(sys.path, _others)
        # for the processes that are started from here, which make a path of their own
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
