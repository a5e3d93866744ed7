"""What a search does around its trials: Module 1 for Module 2, the best trained to its end, a summary."""

import dataclasses
import hashlib
import json
from pathlib import Path

from ifvit.config import Config, MatchConfig, keys_with, with_changes
from ifvit.errors import Failure, UserError
from ifvit.fields import COMMON
from tune import space as spaces


def with_module1(config: MatchConfig, given: tuple[str, ...]) -> MatchConfig:
    """The configuration with the settings that Module 2 takes from its Module 1.

    UserError where --set gives another value for one of them.
    """
    from ifvit.training.match import like_module1

    found = like_module1(config)
    for k in keys_with(COMMON):
        if found[k] != config[k] and any(item.startswith((f"{k}=", f"match.{k}=")) for item in given):
            raise UserError(
                f"{k} is {found[k]} of Module 1 ({config.dense_reg_ckpt}), and --set gives Module 2 {config[k]}; "
                "leave that out."
            )
    return found


def to_its_end(plan, full: Config, space: spaces.Space, request, ends: list):
    """Trains the best trial for as long as the configuration says; where it fails, the next best.

    Returns the trial and its run's folder. Failure where every trial fails.
    """
    from tune import record, sweep

    folders = [Path(plan.folder, f"best_{r.number:03d}") for r in ends]
    for best, folder in zip(ends, folders):
        last = dataclasses.replace(plan, base=with_changes(full, best.values), folder=str(folder))
        try:
            sweep.run(last, space, dataclasses.replace(request, num_samples=1, scheduler="none"))
            return best, record.folder_of(folder, 0)
        except Failure:
            end = record.read(folder, 0).end
            print(
                f"trial {best.number} fails when it is trained to its end: {end['reason'] if end else 'see its log'}",
                flush=True,
            )
    for folder in folders:  # without this file the same command tries them again
        (record.folder_of(folder, 0) / "ended.json").unlink(missing_ok=True)
    raise Failure(
        f"No trial of {plan.module} could be trained to its end; mend that, and the same command goes on. Their logs "
        f"are in {plan.folder}/best_*/trials."
    )


def summarise(records, best, metric: str, plan) -> list[str]:
    ends = [r.end["how"] for r in records if r.end]
    first = records[0].last(metric)
    full = max((r.steps for r in records if (r.end or {}).get("how") == "finished"), default=0)
    # The steps that each trial would have taken to its end.
    whole = {r.number: r.rows[-1]["step"] / r.epochs * plan.base.num_epochs for r in records if r.rows}
    share = full and sum(r.steps / whole.get(r.number, full) for r in records) / len(records)
    values = (
        ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in best.values.items())
        or "the configuration as it is"
    )
    lines = [
        f"{len(records)} trials: " + ", ".join(f"{ends.count(h)} {h}" for h in ("finished", "stopped", "failed")),
        f"best: trial {best.number}, {metric} {best.last(metric):.4g} after {best.epochs} epochs: {values}",
    ]
    # Population-based training has changed trial 0, which then does not have the configuration as it is.
    if best.number != 0 and first is not None and not plan.changing:
        lines.append(f"the configuration as it is: {metric} {first:.4g} after {records[0].epochs} epochs")
    if full:
        lines.append(f"{share:.0%} of the steps that all trials in full would take")
    return lines


def modules1(config: MatchConfig, space: spaces.Space) -> list[str]:
    """A short digest of each Module 1 of a sweep, which tells it from others.

    It is made from the checkpoint's own digests, or from the whole file where Module 1 is a pickle.
    """
    from ifvit import checkpoint
    from ifvit.training.match import module1_folder

    def of(path: str) -> str:
        if not path:
            return "none"
        found = module1_folder(config.replace(dense_reg_ckpt=path))
        content = (
            json.dumps(checkpoint.read_metadata(found)["digests"]).encode() if found.is_dir() else found.read_bytes()
        )
        return hashlib.sha256(content).hexdigest()[:16]

    return [
        of(path) for path in (space["dense_reg_ckpt"].values if "dense_reg_ckpt" in space else (config.dense_reg_ckpt,))
    ]
