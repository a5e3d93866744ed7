"""Whether what a sweep found beats the configuration it began with, on seeds that the sweep did not see.

    python tests/bench/best_against_default.py --best SWEEP/best.toml --preset cpu --seeds 11 12 13 --out OUT \\
        --dataset_root DIR [DIR …] [--before FILE] [--test DIR] [--set key=value …] [--pretrained_ckpt MODULE1]

It compares configurations of Module 1, or with `--pretrained_ckpt` of Module 2 on that Module 1. The sweep began with
the preset, or with `--before`. Both configurations are trained on each seed, and validated on the same fingers. With
`--set data_seed=1` these are others than those by which the sweep chose. Module 1 sees the same views of them,
corrupted as in the configuration that the sweep began with; Module 2 sees the same pairs. `--test`: the macro EER there
too.
"""

import argparse
import statistics
from pathlib import Path

from cluster.host import Host
from ifvit import checkpoint, cli, train_dense, train_match
from ifvit.config import DenseConfig, MatchConfig, keys_with, parse_value, preset, read_toml, with_changes
from ifvit.data.prepare import prepare
from ifvit.data.sources import read_roots
from ifvit.devices.sharding import use_cpu_cores
from ifvit.evaluate import evaluate
from ifvit.fields import COMMON
from ifvit.paths import cache_dir
from ifvit.scoring.scorer import Scorer
from ifvit.training.metrics import read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--best", required=True)
    parser.add_argument("--before")
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset_root", nargs="+", required=True)
    parser.add_argument("--test")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--pretrained_ckpt")
    args = parser.parse_args()
    cli.prepare_output()
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    cls, table = (MatchConfig, "match") if args.pretrained_ckpt else (DenseConfig, "dense")
    sets = {k: parse_value(cls, k, v) for k, v in (item.split("=") for item in args.set)}
    before = read_toml(args.before)[table] if args.before else {}
    base = with_changes(preset(args.preset, cls), before | sets)
    base = base.replace(dataset_root=tuple(args.dataset_root))
    if args.pretrained_ckpt:
        theirs = checkpoint.read_metadata(checkpoint.locate(args.pretrained_ckpt))["config"]
        base = with_changes(base, {"dense_reg_ckpt": args.pretrained_ckpt} | {k: theirs[k] for k in keys_with(COMMON)})

    def train(config) -> Path:
        if args.pretrained_ckpt:
            return train_match.run(config, "auto", Host())
        return train_dense.run(config, "auto", Host(), validation=base)

    kinds = {"default": base, "best": with_changes(base, read_toml(args.best)[table] | sets)}
    # metric -> whether higher is better
    shown = {"eer": False, "d_prime": True} if args.pretrained_ckpt else {"accuracy": True}
    if args.test:
        shown["test EER"] = False
    found: dict[str, list[dict]] = {name: [] for name in kinds}
    for seed in args.seeds:
        for name, config in kinds.items():
            folder = args.out / f"{name}_{seed}"
            ckpt = train(config.replace(seed=seed, checkpoint_dir=str(folder)))
            values = [r for r in read_rows(folder / "metrics.jsonl") if r["split"] == "val"][-1]
            if args.test:
                scorer = Scorer.from_checkpoint(ckpt)
                prints = prepare(read_roots([args.test], None), scorer.config.canvas_size, 0.1, cache_dir())
                values["test EER"] = evaluate(scorer, prints, args.out / f"test_{name}_{seed}")["macro"]["eer"]
            found[name].append(values)
            print(f"seed {seed}, {name}: " + ", ".join(f"{m} {values[m]:.4f}" for m in shown), flush=True)
    for metric, higher in shown.items():
        of = {name: [v[metric] for v in values] for name, values in found.items()}
        for name, values in of.items():
            print(f"{metric}, {name}: {statistics.mean(values):.4f} [{min(values):.4f} … {max(values):.4f}]")
        gains = [(b - a) if higher else (a - b) for a, b in zip(of["default"], of["best"])]
        print(f"{metric}, how much better the best is, seed by seed: {', '.join(f'{g:+.4f}' for g in gains)}")


if __name__ == "__main__":
    main()
