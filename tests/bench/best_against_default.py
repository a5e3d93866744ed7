"""Whether what a sweep of Module 1 found beats the configuration it began with, on seeds that the sweep did not see.

    python tests/bench/best_against_default.py --best SWEEP/best.toml --preset cpu --seeds 11 12 13 --out OUT \\
        --dataset_root DIR [DIR …] [--test DIR] [--set key=value …]

Both are trained on each seed, which also chooses the held-out fingers; both are validated on the same views of those,
with the corruption of the configuration that the sweep began with. `--test`: the registered matches' macro EER there too.
"""

import argparse
import statistics
from pathlib import Path

from cluster.host import Host
from ifvit import cli, train_dense
from ifvit.config import DenseConfig, parse_value, preset, read_toml, with_changes
from ifvit.data.prepare import prepare
from ifvit.data.sources import read_roots
from ifvit.evaluate import evaluate
from ifvit.paths import cache_dir
from ifvit.scorer import Scorer
from ifvit.training.metrics import read_rows
from ifvit.training.sharding import use_cpu_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--best", required=True)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset_root", nargs="+", required=True)
    parser.add_argument("--test")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    cli.prepare_output()
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    sets = dict(item.split("=") for item in args.set)
    base = with_changes(preset(args.preset, DenseConfig), {k: parse_value(DenseConfig, k, v) for k, v in sets.items()})
    base = base.replace(dataset_root=tuple(args.dataset_root))
    kinds = {"default": base, "best": with_changes(base, read_toml(args.best)["dense"])}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for seed in args.seeds:
        for name, config in kinds.items():
            config = config.replace(seed=seed, checkpoint_dir=str(args.out / f"{name}_{seed}"))
            ckpt = train_dense.run(config, "auto", Host(), validation=base)
            rows = [r for r in read_rows(args.out / f"{name}_{seed}" / "metrics.jsonl") if r["split"] == "val"]
            found[name].append(rows[-1]["accuracy"])
            said = f"seed {seed}, {name}: accuracy {rows[-1]['accuracy']:.4f}"
            if args.test:
                scorer = Scorer.from_checkpoint(ckpt)
                prints = prepare(read_roots([args.test], None), scorer.config.canvas_size, 0.1, cache_dir())
                said += f", EER {evaluate(scorer, prints, args.out / f'test_{name}_{seed}')['macro']['eer']:.2%}"
            print(said, flush=True)
    for name, values in found.items():
        print(f"{name}: {statistics.mean(values):.4f} [{min(values):.4f} … {max(values):.4f}]")
    gains = [b - a for a, b in zip(found["default"], found["best"])]
    print(f"best less default, seed by seed: {', '.join(f'{g:+.4f}' for g in gains)}")


if __name__ == "__main__":
    main()
