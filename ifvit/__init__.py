"""IFViT: interpretable fixed-length fingerprint matching (arXiv 2404.08237), trained in JAX."""
