"""Starts a callable in its processes: in this one with all its devices, or in one Ray actor on each host.

The package knows nothing of fingerprints. `launch.launch` decides and starts. `host.Host` is what the callable sees of
the process that it runs in.
"""
