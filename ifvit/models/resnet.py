"""ResNet-18 (He et al. 2015, arXiv 1512.03385) cut to a stride of 8, for grey prints."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ifvit.devices.batch_axes import batch_axes


class Statistic(nnx.BatchStat):
    """A running statistic, which is replaced whole.

    flax asks first whether the new value is sharded as the old one. JAX answers for a traced array with an error, whose
    words took a quarter of the time in which the ResNet was traced.
    """

    def set_value(self, value, *, index=...):
        assert index is ...
        super().set_value(value)


class BatchNorm(nnx.BatchNorm):
    """Over the global batch, on whatever devices it lies: flax's, which asks for the axes it is mapped over by name."""

    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.mean, self.var = Statistic(self.mean[...]), Statistic(self.var[...])

    @property
    def axis_name(self):
        return batch_axes() or None

    @axis_name.setter
    def axis_name(self, _):
        """Set by flax's constructor; what counts is where the module is called."""


class ConvBN(nnx.Module):
    """Convolution without bias, then BatchNorm over batch, height and width."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, *, dtype=None, rngs: nnx.Rngs):
        init = jax.nn.initializers.he_normal()
        self.conv = nnx.Conv(
            cin,
            cout,
            (kernel, kernel),
            strides=stride,
            padding="SAME",
            use_bias=False,
            kernel_init=init,
            dtype=dtype,
            rngs=rngs,
        )
        # statistics, scale and shift are float32 in every compute dtype: flax would round the running ones
        self.bn = BatchNorm(
            cout, momentum=0.95, epsilon=1e-5, dtype=dtype, promote_dtype=lambda arrays, dtype: arrays, rngs=rngs
        )

    def __call__(self, x, train: bool):
        return self.bn(self.conv(x), use_running_average=not train)


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions and a shortcut (fig. 5 left; projection shortcut where shapes change)."""

    def __init__(self, cin: int, cout: int, stride: int, *, dtype=None, rngs: nnx.Rngs):
        self.conv1 = ConvBN(cin, cout, 3, stride, dtype=dtype, rngs=rngs)
        self.conv2 = ConvBN(cout, cout, 3, 1, dtype=dtype, rngs=rngs)
        if cin != cout or stride != 1:
            self.shortcut = ConvBN(cin, cout, 1, stride, dtype=dtype, rngs=rngs)
        else:
            self.shortcut = None

    def __call__(self, x, train: bool):
        y = self.conv2(nnx.relu(self.conv1(x, train)), train)
        if self.shortcut is not None:
            x = self.shortcut(x, train)
        return nnx.relu(x + y)


class ResNet18(nnx.Module):
    """Two basic blocks a stage; the stem and two of the stages halve the resolution.

    `widths` are the stages' channels: (64, 128, 256, 512) is ResNet-18, whose last stage keeps
    stride 8 here; fewer or narrower stages make the small presets. No max-pooling: at 5–9 px
    a ridge it would erase what is matched. Computes in `dtype`, float32 out; with `remat` the backward pass
    computes each block's activations again instead of keeping them.
    """

    def __init__(self, widths: tuple[int, ...], out_width: int, *, dtype=None, remat: bool = False, rngs: nnx.Rngs):
        self.stem = ConvBN(1, widths[0], 7, 2, dtype=dtype, rngs=rngs)
        cin = widths[0]
        self.stages = len(widths)
        self.remat = remat
        for i, cout in enumerate(widths):
            stride = 2 if i in (1, 2) else 1
            setattr(self, f"stage{i}_block0", BasicBlock(cin, cout, stride, dtype=dtype, rngs=rngs))
            setattr(self, f"stage{i}_block1", BasicBlock(cout, cout, 1, dtype=dtype, rngs=rngs))
            cin = cout
        self.project = nnx.Conv(cin, out_width, (1, 1), use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "N H W 1"], train: bool) -> Float[Array, "N H/8 W/8 D"]:
        call = nnx.remat(BasicBlock.__call__, static_argnums=2) if self.remat else BasicBlock.__call__
        x = nnx.relu(self.stem(x, train))
        for i in range(self.stages):
            x = call(getattr(self, f"stage{i}_block0"), x, train)
            x = call(getattr(self, f"stage{i}_block1"), x, train)
        # What is added to it is not made a part of the last convolution: oneDNN's takes six times as long with that.
        return jax.lax.optimization_barrier(self.project(x).astype(jnp.float32))
