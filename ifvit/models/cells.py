"""Cells: the squares of STRIDE px that the networks match."""

from jaxtyping import Array, Bool

from ifvit.constants import STRIDE


def cell_mask(mask: Bool[Array, "N H W"]) -> Bool[Array, "N L"]:
    """Cells of STRIDE × STRIDE px of which at least half is foreground, flattened."""
    n, h, w = mask.shape
    blocks = mask.reshape(n, h // STRIDE, STRIDE, w // STRIDE, STRIDE).mean(axis=(2, 4))
    return (blocks >= 0.5).reshape(n, -1)
