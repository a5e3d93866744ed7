"""Module 2, the matcher: global and local branch, one embedding of each a print."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ifvit.config import Settings
from ifvit.constants import STRIDE
from ifvit.models.cells import cell_mask
from ifvit.models.matching import log_dual_softmax, similarity
from ifvit.models.resnet import ResNet18
from ifvit.models.transformer import Transformer, position_encoding


class Aligned(NamedTuple):
    """An aligned pair: print 0 lies in the frame of print 1."""

    global0: Float[Array, "B S S 1"]  # enhanced overlap
    global1: Float[Array, "B S S 1"]
    overlap: Bool[Array, "B S S"]
    local0: Float[Array, "B R R 1"]  # region of interest, not enhanced
    local1: Float[Array, "B R R 1"]
    roi: Bool[Array, "B R R"]


class Embeddings(NamedTuple):
    """Unit vectors a print and branch, and the global branch's log matching confidence."""

    global0: Float[Array, "B E"]
    global1: Float[Array, "B E"]
    local0: Float[Array, "B E"]
    local1: Float[Array, "B E"]
    log_conf: Float[Array, "B L L"]
    cells: Bool[Array, "B L"]


class EmbeddingHead(nnx.Module):
    """Cells -> few channels -> means over a coarse grid -> one unit vector, 0 where the mask is empty.

    The pair is aligned, so where a feature lies is part of what it says: the grid keeps it, a mean
    over the whole print would not. With `masked_pooling` the means are over the foreground alone, and a place without
    any has the mean of all: the shape of the mask, which both prints of a pair share, does not show.
    """

    def __init__(self, config: Settings, *, rngs: nnx.Rngs):
        self.grid, self.masked = config.embedding_grid, config.masked_pooling
        self.reduce = nnx.Linear(config.transformer_width, config.embedding_channels, rngs=rngs)
        self.embed = nnx.Linear(self.grid**2 * config.embedding_channels, config.embedding_size, rngs=rngs)

    def __call__(self, f: Float[Array, "B L C"], mask: Bool[Array, "B L"]) -> Float[Array, "B E"]:
        inside = mask[..., None].astype(f.dtype)
        x = nnx.relu(self.reduce(f)) * inside
        if self.masked:
            mean = x.sum(1) / jnp.maximum(inside.sum(1), 1)
            x, share = self._pooled(x), self._pooled(inside)
            seen = share > 1e-3
            x = jnp.where(seen, x / jnp.where(seen, share, 1), mean[:, None, None])
        else:
            x = self._pooled(x)
        x = self.embed(x.reshape(x.shape[0], -1))
        x = jnp.where(mask.any(-1, keepdims=True), x, 0.0)  # nothing seen is like nothing, not like the bias
        return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)

    def _pooled(self, x: Float[Array, "B L C"]) -> Float[Array, "B G G C"]:
        side = round(x.shape[1] ** 0.5)
        x = x.reshape(x.shape[0], side, side, -1)
        return jax.image.resize(x, (x.shape[0], self.grid, self.grid, x.shape[-1]), "linear")


class Matcher(nnx.Module):
    """Both branches have a ResNet, a transformer and a head; ArcFace's class weights are parameters too.

    With `share_global_local` the two transformers are one module under both names.
    """

    def __init__(self, config: Settings, num_classes: int, *, rngs: nnx.Rngs):
        how = dict(dtype=jnp.dtype(config.compute_dtype), remat=config.remat, rngs=rngs)

        def transformer():
            return Transformer(
                config.transformer_width, config.transformer_heads, config.transformer_layers, config.transformer, **how
            )

        self.temp_bug_fix, self.temperature = config.temp_bug_fix, config.temperature
        self.resnet_global = ResNet18(config.resnet_widths, config.transformer_width, **how)
        self.resnet_local = ResNet18(config.resnet_widths, config.transformer_width, **how)
        self.loftr_transformer_global = transformer()
        self.loftr_transformer_local = self.loftr_transformer_global if config.share_global_local else transformer()
        self.head_global = EmbeddingHead(config, rngs=rngs)
        self.head_local = EmbeddingHead(config, rngs=rngs)
        self.log_scale = nnx.Param(jnp.log(jnp.float32(20))) if config.similarity == "cosine" else None
        # of norm 1, or a run of a few hundred steps would not turn them
        centres = lambda: nnx.Param(_unit_columns(rngs.params(), (config.embedding_size, num_classes)))
        self.arcface_global, self.arcface_local = centres(), centres()

    def __call__(self, pair: Aligned, shift: Int[Array, "B 2"] | None = None, *, train: bool) -> Embeddings:
        """`shift`, in cells, is added to print 0's positions in the global branch.

        Its content stays where it is, so cell i still belongs to cell i, and where they lie does not tell it.
        """
        images = jnp.stack([pair.global0, pair.global1], axis=1)
        x, cells = self._features(self.resnet_global, images, train), _cells(pair.overlap)
        f0, f1 = self.loftr_transformer_global(self._placed(x[:, 0], shift), self._placed(x[:, 1]), cells, cells)
        scale = None if self.log_scale is None else self.log_scale[...]
        log_conf = log_dual_softmax(similarity(f0, f1, scale, self.temperature), cells, cells)
        images = jnp.stack([pair.local0, pair.local1], axis=1)
        y, roi = self._features(self.resnet_local, images, train), _cells(pair.roi)
        l0, l1 = self.loftr_transformer_local(self._placed(y[:, 0]), self._placed(y[:, 1]), roi, roi)
        return Embeddings(
            self.head_global(f0, cells),
            self.head_global(f1, cells),
            self.head_local(l0, roi),
            self.head_local(l1, roi),
            log_conf,
            cells,
        )

    def _features(
        self, resnet: nnx.Module, images: Float[Array | np.ndarray, "B P S S 1"], train: bool
    ) -> Float[Array, "B P H W C"]:
        """Of P prints a pair, which BatchNorm sees as one batch; without their positions."""
        batch, prints, size = images.shape[:3]
        pad = -size % STRIDE
        images = jnp.pad(images.reshape(batch * prints, size, size, 1), ((0, 0), (0, pad), (0, pad), (0, 0)))
        x = resnet(images, train)
        return x.reshape(batch, prints, *x.shape[1:])

    def _placed(self, x: Float[Array, "N H W C"], shift: Int[Array, "N 2"] | None = None) -> Float[Array, "N L C"]:
        """Features with their positions, flattened."""
        x = x + position_encoding(*x.shape[1:], self.temp_bug_fix, shift)
        return x.reshape(x.shape[0], -1, x.shape[-1])


def _cells(mask: Bool[Array | np.ndarray, "N S S"]) -> Bool[Array, "N L"]:
    """`cell_mask` of a window of any size: one of 90 px has 12 cells a side, the last of them partly empty."""
    pad = -mask.shape[1] % STRIDE
    return cell_mask(jnp.pad(mask, ((0, 0), (0, pad), (0, pad))))


def _unit_columns(key: jax.Array, shape: tuple[int, int]) -> Float[Array, "E C"]:
    """Random directions, evenly spread."""
    x = jax.random.normal(key, shape)
    return x / jnp.linalg.norm(x, axis=0, keepdims=True)
