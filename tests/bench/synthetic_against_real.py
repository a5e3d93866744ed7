"""Does Module 1 learn from generated prints what it learns from real ones?

Trains it twice for as many steps, on generated prints and on the given folders, and compares the
known-warp accuracy on prints that neither has seen (uncorrupted views; pose and distortion alone).

    python tests/bench/synthetic_against_real.py --real DIR [DIR …] --test DIR --out OUT [--preset quick]
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from cluster.host import Host
from ifvit import checkpoint, cli
from ifvit.config import DenseConfig, preset
from ifvit.data.prepare import prepare
from ifvit.data.sources import read_roots
from ifvit.devices.sharding import use_cpu_cores
from ifvit.models.networks import dense_network
from ifvit.paths import cache_dir
from ifvit.scoring.known_warps import dense_eval
from ifvit.train_dense import run
from ifvit.training.dense import warp_metrics


@dataclass(frozen=True)
class Args:
    real: tuple[str, ...]
    test: tuple[str, ...]
    out: str
    preset: str = "quick"
    pairs: int = 320  # test views
    seed: int = 0


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    base = preset(args.preset, DenseConfig).replace(seed=args.seed)
    test = prepare(read_roots(args.test), base.canvas_size, base.max_broken, cache_dir())
    views = {True: base.replace(noise=0.0, thickness=0.0, partial=0.0), False: base}  # warped only, or corrupted too
    evaluate = {plain: jax.jit(dense_eval(dense_network(base), views[plain])) for plain in views}
    result = {}
    for name, roots in (("synthetic", ("synthetic",)), ("real", args.real)):
        config = base.replace(dataset_root=roots, checkpoint_dir=str(Path(args.out) / name))
        state = checkpoint.load(run(config, "auto", Host())).state
        for plain in views:
            values = warp_metrics(evaluate[plain], (state["params"], state["batch_stats"]), test, base, args.pairs)
            result[f"{name}, {'warped only' if plain else 'warped and corrupted'}"] = values["accuracy"]
    for kind in ("warped only", "warped and corrupted"):
        result[f"ratio, {kind}"] = result[f"synthetic, {kind}"] / result[f"real, {kind}"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    cli.use_huge_pages()
    main(tyro.cli(Args, use_underscores=True))
