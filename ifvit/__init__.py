"""IFViT: interpretable fixed-length fingerprint matching (arXiv 2404.08237), trained in JAX."""

from ifvit import neighbours  # noqa: F401  before `cluster` and `tune` are looked for
