"""How a callable gets its processes: this one with all its devices, or one Ray actor a host. Knows nothing of fingerprints.

`launch.launch` decides and starts; `host.Host` is what the callable sees of the process it finds itself in.
"""
