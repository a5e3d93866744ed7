"""Decides which checkpoints of a run are kept."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Saved:
    """What the policy has to know of a checkpoint."""

    name: str
    step: int
    epoch: int | None  # None: it was saved within an epoch
    value: float | None  # of the validation metric


def ranked(saved: list[Saved], higher_is_better: bool) -> list[Saved]:
    """The epochs that have a validation value, best first; among equals the earlier one."""
    valued = [s for s in saved if s.value is not None]
    return sorted(valued, key=lambda s: (-s.value if higher_is_better else s.value, s.step))


def doomed(saved: list[Saved], module: str, config, higher_is_better: bool) -> list[str]:
    """The names of the checkpoints that no rule keeps.

    The rules keep the final one, one every `save_every` epochs, the newest `keep_last` and the best `keep_best`.
    """
    final = f"{module}_ckpt"
    kept = {s.name for s in saved if s.name == final or (s.epoch and s.epoch % config.save_every == 0)}
    if config.keep_best > 1:  # `NAME_best` already is a copy of the best one
        best = ranked(saved, higher_is_better)
        # The final checkpoint and that of its epoch have the same step, and count once.
        steps = list(dict.fromkeys(s.step for s in best))[: config.keep_best]
        kept |= {s.name for s in best if s.step in steps}
    if final not in kept:  # a finished run needs no other checkpoint to go on from
        kept |= {s.name for s in sorted(saved, key=lambda s: s.step)[-config.keep_last :]}
    return [s.name for s in saved if s.name not in kept]
