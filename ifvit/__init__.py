"""IFViT: interpretable fixed-length fingerprint matching (arXiv 2404.08237), trained in JAX."""

import importlib
import sys

from ifvit import neighbours  # noqa: F401  before `cluster` and `tune` are looked for


def _tell_failed_imports(kind, error, trace) -> None:
    """A sentence where JAX cannot be imported, wherever a command first needs it; else the traceback."""
    from cluster.jax_errors import cannot_import

    if why := cannot_import(error):
        print(f"Error: {why}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # so it stands while Python looks for the module of `python -m ifvit.X`
    sys.excepthook = _tell_failed_imports


OFFERED = ("Matcher", "Picture", "Comparison", "Registration")  # of ifvit.matcher


def __getattr__(name: str):
    """What a program takes from here, looked up when it is asked for: commands start without it."""
    if name in OFFERED:
        return getattr(importlib.import_module("ifvit.matcher"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
