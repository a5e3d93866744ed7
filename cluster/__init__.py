"""How a run gets its processes: this one alone, or one Ray actor a host. Knows nothing of fingerprints."""
