"""What each part of Module 1 and of its training pairs gives: one left out or changed at a time, equal steps.

Each variant is trained on generated prints alone, by the recipe of the packaged weights, and registers the same genuine
and impostor pairs of databases that it has not seen. Printed are the EER of each database, and macro EER and FMR100
with their differences from `as it is`, 95 % intervals over fingers. A variant takes ten minutes on two cores (`double`:
two to three times that); those that OUT has are kept, so a second call goes on, and tells all of them.

    python tests/bench/ablation.py --roots DIR [DIR …] --out OUT [--variants NAME …]
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import tyro
from compare import measured, report

from cluster.host import Host
from ifvit import cli
from ifvit.config import DenseConfig, preset, read_toml, with_changes
from ifvit.devices.sharding import use_cpu_cores
from ifvit.models.transformer import Transformer
from ifvit.paths import cache_dir
from ifvit.scoring.scorer import Scorer
from ifvit.train_dense import run

BASE = "as it is"
# what each changes of the recipe; `PARALLEL` changes the code
VARIANTS = {
    BASE: {},
    "second seed": {"seed": 1},
    "without distortion in the step": {"distortion": 0.0},
    "without impostors": {"impostor_share": 0.0},
    "without pairs of two impressions": {"impression_share": 0.0},
    "one print twice, without distortion": {"impression_share": 0.0, "distortion": 0.0},
    "cross layers not sequential": {},
    "softmax attention": {"transformer": "siamese"},
    "half width": {"resnet_widths": (8, 16, 32), "transformer_width": 32, "transformer_heads": 2},
    "double width": {"resnet_widths": (32, 64, 128), "transformer_width": 128, "transformer_heads": 8},
    "double length": {"num_epochs": 6},
}
PARALLEL = "cross layers not sequential"


@dataclass(frozen=True)
class Args:
    roots: tuple[str, ...]
    out: str
    variants: tuple[str, ...] = tuple(VARIANTS)
    genuine: int = 150  # pairs of a database, at most
    impostor: int = 400
    batch_size: int = 8
    seed: int = 0  # of the draw of pairs


def parallel(self, f0, f1, m0, m1):
    """`Transformer.__call__`, but that image 1 attends to image 0 as it was before this layer, too."""
    for i in range(self.pairs):
        self_layer, cross_layer = getattr(self, f"layer_{2 * i}"), getattr(self, f"layer_{2 * i + 1}")
        f0, f1 = self_layer(f0, f0, m0, m0), self_layer(f1, f1, m1, m1)
        f0, f1 = cross_layer(f0, f1, m0, m1), cross_layer(f1, f0, m1, m0)
    return f0, f1


def measure(name: str, args: Args) -> None:
    """Trains a variant, and writes its scores."""
    config = with_changes(preset("cpu", DenseConfig), read_toml("ifvit/weights/recipe.toml")["dense"])
    config = config.replace(dataset_root=("synthetic",), checkpoint_dir=str(Path(args.out) / name))
    # 270 steps
    config = config.replace(
        **{"pairs_per_epoch": 1440, "num_epochs": 3, "val_pairs": 64, "template_size": 0} | VARIANTS[name]
    )
    scorer = Scorer.from_checkpoint(str(run(config, "auto", Host())))
    np.savez(Path(args.out) / f"{name}.npz", **measured(scorer, args))


def main(args: Args) -> None:
    todo = [name for name in args.variants if not (Path(args.out) / f"{name}.npz").exists()]
    if len(todo) > 1:  # each in a process of its own: what is compiled for one is not another's
        for name in todo:
            subprocess.run([sys.executable, *sys.argv, "--variants", name], check=True)
    elif todo:
        use_cpu_cores()
        cli.use_compilation_cache(cache_dir() / "compiled")
        with mock.patch.object(Transformer, "__call__", parallel if todo[0] == PARALLEL else Transformer.__call__):
            measure(todo[0], args)
    if len(args.variants) > 1 or not todo:
        report(Path(args.out), list(VARIANTS), BASE)


if __name__ == "__main__":
    cli.use_huge_pages()
    main(tyro.cli(Args, use_underscores=True))
