"""Sweeps: searches settings for both modules with Ray Tune. `python -m tune --help`."""

import ifvit  # noqa: F401  (as for its own commands: says it in a sentence where JAX cannot be imported)
