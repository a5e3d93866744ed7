"""How annotations are checked while the tests run: the checker that `conftest.py` hands to jaxtyping's import hook."""

from beartype import BeartypeConf, beartype

# As in PEP 484, a whole number will do where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
