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
    """Whether this package is being imported for `python -m` of one of its commands: a program of the user's keeps its own path."""
    after = (word for flag, word in itertools.pairwise(sys.orig_argv) if re.fullmatch(r"-[A-Za-z]*m", flag))
    return sys.argv[:1] == ["-m"] and next(after, "").partition(".")[0] in ("ifvit", *NAMES)


def path_without_others(path: list[str], here: str) -> list[str]:
    """A `sys.path` without the current folder `here` at its head, and with folders that hold others of our names behind ROOT."""
    path = list(path)
    if path and path[0] in ("", here) and not _same(here) and not sys.flags.safe_path:
        del path[0]
    ours = next((n for n, folder in enumerate(path) if _same(folder)), len(path))
    others = [folder for folder in path[:ours] if any(PathFinder.find_spec(name, [folder]) for name in NAMES)]
    if not others:
        return path
    rest = [folder for folder in path if folder not in others]
    return rest + [str(ROOT)] * (ours == len(path)) + others


def _same(folder: str) -> bool:
    return os.path.realpath(folder) == os.path.realpath(ROOT)


if is_command():
    sys.path[:] = path_without_others(sys.path, os.getcwd())
