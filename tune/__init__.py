"""Sweeps: searches settings for both modules with Ray Tune. `python -m tune --help`."""

import ifvit  # noqa: F401  which sees to it that `cluster` is ours
