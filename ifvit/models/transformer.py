"""LoFTR's coarse transformer (Sun et al. 2021, arXiv 2104.00680, section 3.2), and its softmax variant.

Layer: x + norm2(mlp([x, norm1(merge(attention(q(x), k(source), v(source))))])). `x` itself is never
normalised, no linear map has a bias, there is no dropout. One layer serves both images, and a
cross layer is sequential: image 1 attends to the image 0 that was just updated.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int


def linear_attention(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H D"],
    q_mask: Bool[Array, "B L"],
    kv_mask: Bool[Array, "B S"],
) -> Float[Array, "B L H D"]:
    """Attention with the feature map elu(x) + 1 (Katharopoulos et al. 2020, eq. 7), O(L + S)."""
    q, k = nnx.elu(q) + 1, nnx.elu(k) + 1
    q = q * q_mask[:, :, None, None]
    k = k * kv_mask[:, :, None, None]
    v = v * kv_mask[:, :, None, None]
    count = v.shape[1]
    v = v / count  # keeps the sums representable in low precision
    kv = jnp.einsum("bshd,bshv->bhdv", k, v)
    z = 1 / (jnp.einsum("blhd,bhd->blh", q, k.sum(axis=1)) + 1e-6)
    return jnp.einsum("blhd,bhdv,blh->blhv", q, kv, z) * count


def softmax_attention(q, k, v, q_mask, kv_mask):
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); shapes as `linear_attention`.

    A masked query gets 0, as in `linear_attention`; LoFTR's full attention makes it NaN.
    """
    logits = jnp.einsum("blhd,bshd->bhls", q, k) / math.sqrt(q.shape[-1])
    logits = jnp.where(kv_mask[:, None, None, :], logits, -1e9)
    out = jnp.einsum("bhls,bshd->blhd", jax.nn.softmax(logits, axis=-1), v)
    return out * (q_mask[:, :, None, None] & kv_mask.any(axis=1)[:, None, None, None])


ATTENTION = {"loftr": linear_attention, "siamese": softmax_attention}


class EncoderLayer(nnx.Module):
    """One self- or cross-attention layer; `kind` is a key of `ATTENTION`."""

    def __init__(self, width: int, heads: int, kind: str, *, dtype=None, rngs: nnx.Rngs):
        def linear(cin, cout):
            return nnx.Linear(
                cin, cout, use_bias=False, dtype=dtype, rngs=rngs, kernel_init=jax.nn.initializers.xavier_uniform()
            )

        self.heads = heads
        self.kind = kind
        self.q_proj = linear(width, width)
        self.k_proj = linear(width, width)
        self.v_proj = linear(width, width)
        self.merge = linear(width, width)
        self.mlp_0 = linear(2 * width, 2 * width)
        self.mlp_2 = linear(2 * width, width)
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L C"],
        source: Float[Array, "B S C"],
        x_mask: Bool[Array, "B L"],
        source_mask: Bool[Array, "B S"],
    ) -> Float[Array, "B L C"]:
        def split(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        message = ATTENTION[self.kind](
            split(self.q_proj(x)), split(self.k_proj(source)), split(self.v_proj(source)), x_mask, source_mask
        )
        message = self.norm1(self.merge(message.reshape(x.shape)))
        message = self.mlp_2(nnx.relu(self.mlp_0(jnp.concatenate([x, message], axis=-1))))
        return x + self.norm2(message)


class Transformer(nnx.Module):
    """`pairs` times one self and one cross layer: `layer_0` … `layer_{2·pairs − 1}`.

    Four pairs at width 256 are LoFTR's 80 arrays (5,251,072 parameters). Computes in `dtype`, float32 out; with
    `remat` the backward pass computes each layer's activations again instead of keeping them.
    """

    def __init__(
        self, width: int, heads: int, pairs: int, kind: str, *, dtype=None, remat: bool = False, rngs: nnx.Rngs
    ):
        self.pairs = pairs
        self.dtype = dtype
        self.remat = remat
        for i in range(2 * pairs):
            setattr(self, f"layer_{i}", EncoderLayer(width, heads, kind, dtype=dtype, rngs=rngs))

    def __call__(
        self, f0: Float[Array, "B L C"], f1: Float[Array, "B S C"], m0: Bool[Array, "B L"], m1: Bool[Array, "B S"]
    ):
        """Features of both images, flattened, and their foreground masks -> updated features."""
        call = nnx.remat(EncoderLayer.__call__) if self.remat else EncoderLayer.__call__
        f0, f1 = f0.astype(self.dtype or f0.dtype), f1.astype(self.dtype or f1.dtype)
        for i in range(self.pairs):
            self_layer, cross_layer = getattr(self, f"layer_{2 * i}"), getattr(self, f"layer_{2 * i + 1}")
            f0, f1 = call(self_layer, f0, f0, m0, m0), call(self_layer, f1, f1, m1, m1)
            f0 = call(cross_layer, f0, f1, m0, m1)
            f1 = call(cross_layer, f1, f0, m1, m0)
        return f0.astype(jnp.float32), f1.astype(jnp.float32)


def position_encoding(
    height: int,
    width: int,
    channels: int,
    temp_bug_fix: bool = True,
    shift: Int[Array | np.ndarray, "*B 2"] | None = None,
) -> Float[Array, "*B H W C"]:
    """2-D sine encoding (LoFTR's `PositionEncodingSine`): positions from 1, sin x, cos x, sin y, cos y in turn.

    `temp_bug_fix=False` gives the frequencies that the published `outdoor_ds` weights were trained with. `shift` (x, y)
    is added to the positions.
    """
    shift = np.zeros(2, np.int32) if shift is None else shift
    quarter = jnp.arange(0, channels // 2, 2, dtype=jnp.float32)
    rate = math.log(1e4) / (channels // 2) if temp_bug_fix else 1.0
    freq = jnp.exp(-quarter * rate)
    x = jnp.arange(1, width + 1, dtype=jnp.float32) + shift[..., :1]
    y = jnp.arange(1, height + 1, dtype=jnp.float32) + shift[..., 1:]
    x, y = jnp.broadcast_arrays(x[..., None, :, None] * freq, y[..., :, None, None] * freq)
    waves = jnp.stack([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=-1)
    return waves.reshape(*shift.shape[:-1], height, width, channels)
