"""Trains Module 2, the matcher, from Module 1's checkpoint.

python -m ifvit.train_match --dataset_root DIR --pretrained_ckpt ./checkpoints/dense_reg/dense_reg_ckpt.pkl
"""

import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cluster.host import Host
from ifvit import cli
from ifvit.commands import TrainArgs, build_config, given
from ifvit.config import MatchConfig
from ifvit.training.watch import PLAIN, Watch


@dataclass(frozen=True)
class Args(TrainArgs):
    """Trains Module 2, the matcher."""

    pretrained_ckpt: str | None = None
    """Module 1's checkpoint, or `pretrained`, the package's; '' for none: random start, no alignment
    [./checkpoints/dense_reg/dense_reg_ckpt.pkl]"""
    checkpoint_dir: str | None = None
    """where checkpoints and metrics go [./checkpoints/matcher]"""
    num_classes: int | None = None
    """ArcFace classes, at least the number of training fingers [counted]"""
    batch_size: int | None = None
    """pairs a step, over all devices [the preset's]"""
    num_epochs: int | None = None
    """[the preset's]"""

    command: ClassVar[str] = "ifvit.train_match"

    def configs(self, preset: str | None) -> tuple[MatchConfig]:
        flags = given(
            dense_reg_ckpt=self.pretrained_ckpt,
            checkpoint_dir=self.checkpoint_dir,
            num_classes=self.num_classes,
            batch_size=self.batch_size,
            num_epochs=self.num_epochs,
        )
        return (build_config(MatchConfig, self, flags, preset),)

    def train(self, configs: tuple, host: Host) -> None:
        print(f"Module 2 checkpoint: {run(*configs, self.resume, host, watch=self.watch())}")


def run(config: MatchConfig, resume: str, host: Host, may_change: Set[str] = frozenset(), watch: Watch = PLAIN) -> Path:
    """Trains Module 2; returns the final checkpoint's path. `may_change` and `watch` as `loop.train`."""
    from ifvit.data.gather import gather
    from ifvit.training.loop import train
    from ifvit.training.match import checkpoint_of_module1, match_task
    from ifvit.training.startup import check_hosts, settled

    checkpoint_of_module1(config)  # a wrong path shows before prints are read
    check_hosts(config, host)
    config = settled(config, resume)
    _, train_set, held_out = gather(config, host)
    return train(match_task(config, train_set, held_out), resume, host, may_change, watch)


if __name__ == "__main__":
    sys.exit(cli.main(Args, Args.command, huge_pages=True))
