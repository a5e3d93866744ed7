"""Sweeps: searches settings for both modules with Ray Tune. `python -m tune --help`."""
