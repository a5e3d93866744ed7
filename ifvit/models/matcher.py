"""Module 2, the matcher: global and local branch, one embedding of each a print."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

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
    over the whole print would not.
    """

    def __init__(self, config: Settings, *, rngs: nnx.Rngs):
        self.grid = config.embedding_grid
        self.reduce = nnx.Linear(config.transformer_width, config.embedding_channels, rngs=rngs)
        self.embed = nnx.Linear(self.grid**2 * config.embedding_channels, config.embedding_size, rngs=rngs)

    def __call__(self, f: Float[Array, "B L C"], mask: Bool[Array, "B L"]) -> Float[Array, "B E"]:
        side = round(f.shape[1] ** 0.5)
        x = nnx.relu(self.reduce(f)) * mask[..., None]
        x = x.reshape(x.shape[0], side, side, -1)
        x = jax.image.resize(x, (x.shape[0], self.grid, self.grid, x.shape[-1]), "linear")
        x = self.embed(x.reshape(x.shape[0], -1))
        x = jnp.where(mask.any(-1, keepdims=True), x, 0.0)  # nothing seen is like nothing, not like the bias
        return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


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
        init = jax.nn.initializers.normal(1.0)
        self.arcface_global = nnx.Param(init(rngs.params(), (config.embedding_size, num_classes)))
        self.arcface_local = nnx.Param(init(rngs.params(), (config.embedding_size, num_classes)))

    def __call__(self, pair: Aligned, train: bool) -> Embeddings:
        f0, f1, cells = self._features(
            self.resnet_global, self.loftr_transformer_global, pair.global0, pair.global1, pair.overlap, train
        )
        scale = None if self.log_scale is None else self.log_scale[...]
        log_conf = log_dual_softmax(similarity(f0, f1, scale, self.temperature), cells, cells)
        l0, l1, roi = self._features(
            self.resnet_local, self.loftr_transformer_local, pair.local0, pair.local1, pair.roi, train
        )
        return Embeddings(
            self.head_global(f0, cells),
            self.head_global(f1, cells),
            self.head_local(l0, roi),
            self.head_local(l1, roi),
            log_conf,
            cells,
        )

    def _features(self, resnet, transformer, image0, image1, mask, train):
        batch, size = image0.shape[:2]
        pad = -size % STRIDE  # a window of 90 px has 12 cells a side, the last of them partly empty
        image0, image1 = (jnp.pad(i, ((0, 0), (0, pad), (0, pad), (0, 0))) for i in (image0, image1))
        cells = cell_mask(jnp.pad(mask, ((0, 0), (0, pad), (0, pad))))
        x = resnet(jnp.stack([image0, image1], axis=1).reshape(2 * batch, *image0.shape[1:]), train)
        x = (x + position_encoding(*x.shape[1:], self.temp_bug_fix)).reshape(batch, 2, -1, x.shape[-1])
        return *transformer(x[:, 0], x[:, 1], cells, cells), cells
