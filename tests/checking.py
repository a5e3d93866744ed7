"""How annotations are checked while the tests run: the checker that `conftest.py` hands to jaxtyping's import hook."""

from collections.abc import Callable
from pathlib import Path

from beartype import BeartypeConf, FrozenDict, beartype
from etils import epath

ANY_PATH = Path | epath.Path  # a path may lie in a bucket wherever one is asked for
# As in PEP 484, a whole number will do where a float is asked for.
_check = beartype(
    conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Path: ANY_PATH, epath.Path: ANY_PATH}))
)
# A configuration looks at its values itself, and says in a sentence what is wrong with them.
UNCHECKED = {"Config.__init__", "DenseConfig.__init__", "MatchConfig.__init__"}


def checked(function: Callable) -> Callable:
    return function if function.__qualname__ in UNCHECKED else _check(function)
