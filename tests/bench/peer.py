"""A training step of Module 1 beside PyTorch's: the same layers, loss and optimiser, on the same cores, in turns.

    make parity && .venv-parity/bin/python tests/bench/peer.py [--rounds 7] [--shapes cpu wide8 wide16]

The peer has this project's ResNet, kornia's LoFTR transformer, dual softmax, focal loss and AdamW, in float32 and in
bfloat16 by autocast. It is given its inputs. This project's step is timed whole (with augmentation and masks), and as
the networks alone, from the same inputs as the peer. A product of two 2048 × 2048 matrices is timed in each round too:
the shares of its rate count the FLOPs of convolutions, linear layers, attention and matching by their shapes, forward
once and backward twice.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
from kornia.feature.loftr.loftr_module.transformer import LocalFeatureTransformer
from kornia.feature.loftr.utils.position_encoding import PositionEncodingSine
from torch import nn

from ifvit.config import DenseConfig, Traced, preset
from ifvit.models.losses import DENSE_LOSSES, IGNORE
from ifvit.models.networks import dense_network
from ifvit.training.state import init_state, optimizer
from ifvit.training.step import dense_step, train_step

# name: what differs from preset cpu
SHAPES = {
    "cpu": {},
    "wide8": dict(image_size=128, resnet_widths=(64, 128, 256), transformer_width=256, batch_size=8),
    "wide16": dict(image_size=128, resnet_widths=(64, 128, 256), transformer_width=256, batch_size=16),
    "small": dict(image_size=96, batch_size=32),
}
PRODUCT = 2048


# --- the peer -------------------------------------------------------------------------------------


class ConvBN(nn.Sequential):
    def __init__(self, cin, cout, kernel, stride):
        conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(cout, momentum=0.05))


class Block(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1, self.conv2 = ConvBN(cin, cout, 3, stride), ConvBN(cout, cout, 3, 1)
        self.shortcut = ConvBN(cin, cout, 1, stride) if cin != cout or stride != 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.shortcut(x) + self.conv2(torch.relu(self.conv1(x))))


class Peer(nn.Module):
    def __init__(self, config: DenseConfig):
        super().__init__()
        widths, width = config.resnet_widths, config.transformer_width
        layers, cin = [ConvBN(1, widths[0], 7, 2), nn.ReLU()], widths[0]
        for i, cout in enumerate(widths):
            layers += [Block(cin, cout, 2 if i in (1, 2) else 1), Block(cout, cout, 1)]
            cin = cout
        self.resnet = nn.Sequential(*layers, nn.Conv2d(cin, width, 1, bias=False))
        self.position = PositionEncodingSine(width, temp_bug_fix=True)
        layer_names = ["self", "cross"] * config.transformer_layers
        self.transformer = LocalFeatureTransformer(
            dict(d_model=width, nhead=config.transformer_heads, layer_names=layer_names, attention="linear")
        )

    def forward(self, images, labels):
        """Images (2 B 1 S S), the first prints before the second; labels (B L)."""
        f = self.position(self.resnet(images)).flatten(2).transpose(1, 2)
        f0, f1 = self.transformer(*f.chunk(2))
        similarity = (f0 @ f1.transpose(1, 2)).float() / (f0.shape[-1] * 0.1)
        log_conf = similarity.log_softmax(1) + similarity.log_softmax(2)
        p = log_conf.exp().clamp(1e-6, 1 - 1e-6)
        positive = torch.arange(p.shape[2]) == labels[:, :, None]
        negative = (labels != IGNORE)[:, :, None] & ~positive
        loss_pos, loss_neg = -0.25 * (1 - p) ** 2 * p.log(), -0.25 * p**2 * (1 - p).log()
        return (loss_pos * positive).sum() / positive.sum() + (loss_neg * negative).sum() / negative.sum()


def peers(config: DenseConfig, images, labels) -> dict[str, Callable]:
    """Name -> a step of the peer, which returns when it is done."""
    found = {}
    x, y = torch.from_numpy(images), torch.from_numpy(labels).long()
    for name, dtype in (("PyTorch float32", None), ("PyTorch bfloat16", torch.bfloat16)):
        net = Peer(config).train()
        adam = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=config.weight_decay)

        def step(net=net, adam=adam, dtype=dtype):
            adam.zero_grad()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = net(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
            adam.step()

        found[name] = step
    return found


# --- this project ---------------------------------------------------------------------------------


def ours(config: DenseConfig, images, labels, dtype: str) -> dict[str, Callable]:
    """The whole step, and the networks alone; each keeps its own state."""
    config = config.replace(compute_dtype=dtype)
    program = config.program()
    net = dense_network(program)
    batch, side, canvas = config.batch_size, config.image_size, config.canvas_size
    rng = np.random.default_rng(0)
    prints = {
        **{f"canvas{n}": rng.integers(0, 255, (batch, canvas, canvas)).astype(np.uint8) for n in (0, 1)},
        **{f"mask{n}": np.ones((batch, canvas // 8, canvas // 8), bool) for n in (0, 1)},
        "genuine": np.ones(batch, bool),
    }
    pairs = images.reshape(2, batch, side, side, 1)
    given = {"image0": pairs[0], "image1": pairs[1], "labels": labels, "genuine": np.ones(batch, bool)}

    def networks(params, batch_stats, batch, keys):
        everywhere = jnp.ones(batch["image0"].shape[:3], bool)
        log_conf, stats = net.apply(
            params, batch_stats, batch["image0"], batch["image1"], everywhere, everywhere, train=True
        )
        cells = jnp.ones(batch["labels"].shape, bool)
        return DENSE_LOSSES["focal"](log_conf, batch["labels"], cells, cells), (stats, {})

    def whole(state, batch, rate, scalars):
        return dense_step(net, Traced(program, scalars))(state, batch, rate)

    def alone(state, batch, rate, scalars):
        return train_step(networks, Traced(program, scalars))(state, batch, rate)

    def steps(of, batch):
        run = jax.jit(of, donate_argnums=0)
        state = jax.jit(lambda seed: init_state(net, optimizer(program, 0.0), seed))(0)
        batch, scalars = jax.device_put((batch, config.scalars()))

        def step():
            nonlocal state
            state, _ = run(state, batch, jnp.float32(1e-3), scalars)
            jax.block_until_ready(state)

        return step

    return {f"whole step {dtype}": steps(whole, prints), f"networks {dtype}": steps(alone, given)}


# --- the machine ----------------------------------------------------------------------------------


def products() -> dict[str, Callable]:
    x = np.random.default_rng(0).normal(size=(PRODUCT, PRODUCT)).astype(np.float32)
    a, t = jnp.asarray(x), torch.from_numpy(x)
    run = jax.jit(lambda a: a @ a)
    return {"product JAX": lambda: run(a).block_until_ready(), "product PyTorch": lambda: t @ t}


def flops(config: DenseConfig) -> float:
    """Of a step: products of convolutions, linear layers, linear attention and matching, times three."""
    side, cin, total = config.image_size // 2, config.resnet_widths[0], 0.0
    total += side**2 * 49 * cin
    for i, cout in enumerate(config.resnet_widths):
        first = cin
        if i in (1, 2):
            side //= 2
        total += side**2 * 9 * (first * cout + 3 * cout**2) + side**2 * first * cout * (first != cout or i in (1, 2))
        cin = cout
    width, cells = config.transformer_width, side**2
    total += cells * cin * width
    layer = cells * width**2 * (4 + 6) + 2 * cells * width**2 / config.transformer_heads
    total += 2 * config.transformer_layers * layer
    pair = 2 * total + cells**2 * width
    return 3 * 2 * pair * config.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["cpu", "wide8", "wide16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for shape in args.shapes:
        config = preset("cpu", DenseConfig).replace(similarity="scaled_dot", dense_loss="focal", **SHAPES[shape])
        cells = (config.image_size // 8) ** 2
        rng = np.random.default_rng(1)
        images = rng.normal(size=(2 * config.batch_size, 1, config.image_size, config.image_size)).astype(np.float32)
        labels = np.tile(np.arange(cells, dtype=np.int32), (config.batch_size, 1))
        runs = products() | peers(config, images, labels)
        for dtype in ("float32", "bfloat16"):
            runs |= ours(config, images, labels, dtype)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for n in range(args.rounds + 1):
            for name in sorted(runs, reverse=n % 2 == 1):
                clock = time.perf_counter()
                runs[name]()
                if n:  # the first compiles, and fills caches
                    times[name].append(time.perf_counter() - clock)
        report(shape, config, times)


def report(shape: str, config: DenseConfig, times: dict[str, list[float]]) -> None:
    print(
        f"{shape}: {config.image_size} px, widths {config.resnet_widths}, {config.transformer_width} wide, "
        f"{config.batch_size} pairs; {flops(config) / 1e9:.0f} GFLOP a step"
    )
    rate = {name: 2 * PRODUCT**3 / statistics.median(t) for name, t in times.items() if name.startswith("product")}
    for name, t in times.items():
        middle = statistics.median(t)
        if name in rate:
            print(f"  {name:22s} {rate[name] / 1e9:6.0f} GFLOP/s")
            continue
        pairs = [config.batch_size / s for s in sorted(t)]
        peer = times[f"PyTorch {name.split()[-1]}"]
        ratio = statistics.median(b / a for a, b in zip(t, peer))
        share = flops(config) / middle / rate["product PyTorch" if name.startswith("PyTorch") else "product JAX"]
        print(
            f"  {name:22s} {config.batch_size / middle:6.1f} pairs/s [{pairs[-1]:.1f}, {pairs[0]:.1f}], "
            f"{ratio:.2f} of PyTorch's, {share:.0%} of the product's rate",
            flush=True,
        )


if __name__ == "__main__":
    main()
