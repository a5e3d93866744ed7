"""Sweeps: searches settings for both modules with Ray Tune. `python -m tune --help`."""

import ifvit  # noqa: F401 (it makes sure that `cluster` is this project's)
