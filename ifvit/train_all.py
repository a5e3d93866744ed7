"""Trains Module 1, seeds Module 2 from it, trains that, evaluates both: from folders of prints to a matcher.

    python -m ifvit.train_all --dataset_root DIR [DIR …]
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from etils import epath

from ifvit import cli
from ifvit.commands import TrainArgs, build_config, given
from ifvit.config import DenseConfig, MatchConfig
from ifvit.errors import UserError


@dataclass(frozen=True)
class Args(TrainArgs):
    """Trains both modules and evaluates them on the held-out fingers; `--set dense.KEY=…`, `--set match.KEY=…`."""

    dense_checkpoint_dir: str | None = None
    """Module 1's checkpoints and metrics [./checkpoints/dense_reg]"""
    matcher_checkpoint_dir: str | None = None
    """Module 2's checkpoints and metrics [./checkpoints/matcher]; the evaluation goes into its folder `evaluation`"""
    num_classes: int | None = None
    """ArcFace classes, at least the number of training fingers [counted]"""
    batch_size: int | None = None
    """pairs a step of both modules, over all devices [the preset's]"""
    loftr_ckpt: str | None = None
    """LoFTR weights (.ckpt, .pt, .safetensors) that start Module 1's transformer [none]"""

    command: ClassVar[str] = "ifvit.train_all"

    def configs(self, preset: str | None) -> tuple[DenseConfig, MatchConfig]:
        if self.resume not in ("auto", "never"):
            raise UserError(f"--resume {self.resume}: train_all has two modules and takes auto or never; give a path to "
                            "train_dense or train_match.")
        dense = build_config(DenseConfig, self, given(
            checkpoint_dir=self.dense_checkpoint_dir, batch_size=self.batch_size, loftr_ckpt=self.loftr_ckpt), preset, "dense")
        match = build_config(MatchConfig, self, given(
            checkpoint_dir=self.matcher_checkpoint_dir, batch_size=self.batch_size, num_classes=self.num_classes),
            preset, "match")
        return dense, match

    def train(self, configs, host) -> None:
        from ifvit import train_dense, train_match

        dense, match = configs
        print("Module 1: dense registration", flush=True)
        module1 = train_dense.run(dense, self.resume, host)
        print("Module 2: matcher", flush=True)
        match = match.replace(dense_reg_ckpt=str(module1))
        module2 = train_match.run(match, self.resume, host)
        self.report(match, module1, module2, host)

    def report(self, match: MatchConfig, module1: epath.Path, module2: epath.Path, host) -> None:
        """Evaluates both modules on the held-out fingers; prints the table and where everything lies."""
        from ifvit.checkpoint_places import written_here
        from ifvit.data.gather import gather
        from ifvit.evaluate import evaluate, print_table
        from ifvit.scorer import Scorer
        from ifvit.training.metrics import read_rows

        _, _, held_out = gather(match, host)
        out = module2.parent / "evaluation"
        rows = [r for r in read_rows(module1.parent / "metrics.jsonl") if r["split"] == "val" and "accuracy" in r]
        print(f"\nEvaluation on {len({p.identity for p in held_out.prints})} held-out fingers")
        if rows:
            print(f"registration: {rows[-1]['accuracy']:.1%} of the cells of a known warp found within one cell (8 px)")
        for name, ckpt, folder in (("Module 1, registered matches", module1, out / "dense_reg"),
                                   ("Module 2, fused score", module2, out / "matcher")):
            print(f"\n{name}")
            try:
                with written_here(folder) as here:
                    print_table(evaluate(Scorer.from_checkpoint(ckpt), held_out, here))
            except UserError as e:  # the training is done and good; single impressions, say, have no genuine pair
                print(f"not evaluated: {e}")
        print()
        for what, path in (("Module 1 checkpoint", module1), ("Module 2 checkpoint", module2),
                           ("curves, Module 1", module1.parent / "curves.png"),
                           ("curves, Module 2", module2.parent / "curves.png"),
                           ("rates, scores, DET, histogram, matches", out)):
            print(f"{what}: {path}")


if __name__ == "__main__":
    sys.exit(cli.main(Args, Args.command))
