"""How annotations are checked while the tests run: the checker that `conftest.py` hands to jaxtyping's import hook."""

from pathlib import Path

from beartype import BeartypeConf, FrozenDict, beartype
from etils import epath

# As in PEP 484, a whole number will do where a float is asked for. A path may lie in a bucket wherever one is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Path: Path | epath.Path})))
