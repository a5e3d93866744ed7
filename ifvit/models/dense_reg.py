"""Module 1, dense registration: siamese ResNet-18, transformer, dual softmax."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ifvit.config import Settings
from ifvit.models.cells import cell_mask
from ifvit.models.matching import log_dual_softmax, similarity
from ifvit.models.resnet import ResNet18
from ifvit.models.transformer import Transformer, position_encoding


class DenseRegistration(nnx.Module):
    """Two prints -> log of the matching confidence of every cell with every cell.

    The transformer is the attribute `loftr_transformer` or `siamese_transformer`, by its kind.
    """

    def __init__(self, config: Settings, *, rngs: nnx.Rngs):
        self.temp_bug_fix, self.temperature = config.temp_bug_fix, config.temperature
        self.transformer_name = f"{config.transformer}_transformer"
        how = dict(dtype=jnp.dtype(config.compute_dtype), remat=config.remat, rngs=rngs)
        self.resnet = ResNet18(config.resnet_widths, config.transformer_width, **how)
        setattr(
            self,
            self.transformer_name,
            Transformer(
                config.transformer_width, config.transformer_heads, config.transformer_layers, config.transformer, **how
            ),
        )
        self.log_scale = nnx.Param(jnp.log(jnp.float32(20))) if config.similarity == "cosine" else None

    def __call__(
        self,
        image0: Float[Array, "B H W 1"],
        image1: Float[Array, "B H W 1"],
        mask0: Bool[Array, "B H W"],
        mask1: Bool[Array, "B H W"],
        train: bool,
    ) -> Float[Array, "B L L"]:
        """Normalised prints and foreground masks -> log confidence, L = H/8 · W/8 cells, rows image 0.

        Both prints pass the ResNet as one batch: BatchNorm sees the whole pair.
        """
        batch = image0.shape[0]
        # interleaved, not one after the other: a batch split over devices needs no exchange
        both = jnp.stack([image0, image1], axis=1).reshape(2 * batch, *image0.shape[1:])
        f = self.features(both, train)
        f = f.reshape(batch, 2, *f.shape[1:])
        return self.match(f[:, 0], f[:, 1], mask0, mask1, train)

    def described(self, images: Float[Array, "N H W 1"], train: bool) -> Float[Array, "N L D"]:
        """Of each print alone: the ResNet's features, wherever they lie."""
        x = self.resnet(images, train)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def features(self, images: Float[Array, "N H W 1"], train: bool) -> Float[Array, "N L D"]:
        """Of each print alone: the ResNet's features, with their positions."""
        x = self.resnet(images, train)
        x = x + position_encoding(*x.shape[1:], self.temp_bug_fix)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def match(
        self,
        f0: Float[Array, "B L D"],
        f1: Float[Array, "B L D"],
        mask0: Bool[Array, "B H W"],
        mask1: Bool[Array, "B H W"],
        train: bool,
    ) -> Float[Array, "B L L"]:
        """`features` of both prints -> log confidence."""
        m0, m1 = cell_mask(mask0), cell_mask(mask1)
        f0, f1 = getattr(self, self.transformer_name)(f0, f1, m0, m1)
        scale = None if self.log_scale is None else self.log_scale[...]
        return log_dual_softmax(similarity(f0, f1, scale, self.temperature), m0, m1)
