"""Trains Module 1, dense registration.

python -m ifvit.train_dense --dataset_root DIR --checkpoint_dir ./checkpoints/dense_reg
"""

import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cluster.host import Host
from ifvit import cli
from ifvit.commands import TrainArgs, build_config, given
from ifvit.config import DenseConfig
from ifvit.training.watch import PLAIN, Watch


@dataclass(frozen=True)
class Args(TrainArgs):
    """Trains Module 1, dense registration."""

    checkpoint_dir: str | None = None
    """where checkpoints and metrics go [./checkpoints/dense_reg]"""
    batch_size: int | None = None
    """pairs a step, over all devices [the preset's]"""
    num_epochs: int | None = None
    """[the preset's]"""
    loftr_ckpt: str | None = None
    """LoFTR weights (.ckpt, .pt, .safetensors) that start the transformer [none]"""

    command: ClassVar[str] = "ifvit.train_dense"

    def configs(self, preset: str | None) -> tuple[DenseConfig]:
        flags = given(
            checkpoint_dir=self.checkpoint_dir,
            batch_size=self.batch_size,
            num_epochs=self.num_epochs,
            loftr_ckpt=self.loftr_ckpt,
        )
        return (build_config(DenseConfig, self, flags, preset),)

    def train(self, configs: tuple, host: Host) -> None:
        print(f"Module 1 checkpoint: {run(*configs, self.resume, host, watch=self.watch())}")


def run(
    config: DenseConfig,
    resume: str,
    host: Host,
    may_change: Set[str] = frozenset(),
    validation: DenseConfig | None = None,
    watch: Watch = PLAIN,
) -> Path:
    """Trains Module 1, and returns the final checkpoint's path.

    `may_change` and `watch` as in `loop.train`, `validation` as in `dense_task`.
    """
    from ifvit.data.gather import gather
    from ifvit.training.dense import dense_task
    from ifvit.training.loop import train
    from ifvit.training.startup import check_hosts, settled

    check_hosts(config, host)
    config = settled(config, resume)
    _, train_set, held_out = gather(config, host)
    return train(dense_task(config, train_set, held_out, validation), resume, host, may_change, watch)


if __name__ == "__main__":
    sys.exit(cli.main(Args, Args.command, huge_pages=True))
