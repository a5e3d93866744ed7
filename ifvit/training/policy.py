"""Which checkpoints of a run are kept."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Saved:
    """A checkpoint of the run, as far as the policy is concerned."""

    name: str
    step: int
    epoch: int | None  # None: within an epoch
    value: float | None  # of the validation metric


def ranked(saved: list[Saved], higher_is_better: bool) -> list[Saved]:
    """Epochs with a validation value, best first, of equals the earlier one."""
    valued = [s for s in saved if s.value is not None]
    return sorted(valued, key=lambda s: (-s.value if higher_is_better else s.value, s.step))


def doomed(saved: list[Saved], module: str, config, higher_is_better: bool) -> list[str]:
    """Names that no rule keeps: the final one; every `save_every` epochs; the newest `keep_last`; the best `keep_best`."""
    final = f"{module}_ckpt"
    kept = {s.name for s in saved if s.name == final or (s.epoch and s.epoch % config.save_every == 0)}
    if config.keep_best > 1:  # of the best alone `NAME_best` is a copy
        best = ranked(saved, higher_is_better)
        steps = list(dict.fromkeys(s.step for s in best))[: config.keep_best]  # the final one and its epoch's are one
        kept |= {s.name for s in best if s.step in steps}
    if final not in kept:  # a finished run needs no others to go on from
        kept |= {s.name for s in sorted(saved, key=lambda s: s.step)[-config.keep_last :]}
    return [s.name for s in saved if s.name not in kept]
