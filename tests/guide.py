"""What the checkpoint guide prints."""

LOG = """\
============================================================
Loading Module 1 Transformer Weights
============================================================
Source: {source}
✓ Found transformer: loftr_transformer
✓ Sharing transformer weights between global and local branches
  ✓ Copied to loftr_transformer_global
  ✓ Copied to loftr_transformer_local (shared weights)
✓ Successfully loaded {count} parameters from Module 1
============================================================
"""
