"""A sweep's folder: what it notes there, and that one sweep has it at a time."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from ifvit.config import Config, completed, config_of, keys_with, read_toml
from ifvit.errors import UserError
from ifvit.fields import COMMON, FREE
from ifvit.files import write_whole
from tune import space as spaces
from tune.campaign import modules1
from tune.space import RUNS

PARENT = "IFVIT_SWEEP_OF"  # environment variable: the process whose end also ends the sweep
PATIENCE = 30.0  # seconds to wait for a sweep that is ending and still has the folder


def noted(out: Path) -> dict:
    """The content of a folder's `sweep.json`; UserError where it is damaged."""
    file = out / "sweep.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        raise UserError(f"{file} is damaged; give --resume never, or another --sweep_dir.") from None


def check_same_sweep(out: Path, plan, space, data: str) -> None:
    """Writes `sweep.json`, which says what the sweep is. UserError where the folder holds another sweep.

    `data`: digest of the prints.
    """
    free = keys_with(FREE)

    base = {k: v for k, v in plan.base.to_dict().items() if k not in free}
    ours = json.loads(
        json.dumps(
            {
                "metric": plan.metric,
                "configuration": base,
                "data": data,
                "module1": modules1(plan.base, space) if plan.module == "match" else [],
                "space": {k: {**dataclasses.asdict(p), "why": ""} for k, p in space.items()},
            }
        )
    )
    if theirs := noted(out):
        theirs["configuration"] = {
            k: v for k, v in completed(type(plan.base), theirs["configuration"]).items() if k not in free
        }
        for part in ("configuration", "space"):
            for key in ours[part].keys() | theirs[part].keys():
                if ours[part].get(key) != theirs[part].get(key):
                    raise UserError(
                        f"{out} holds a sweep with another {part}: {key} was {theirs[part].get(key)}, and is "
                        f"{ours[part].get(key)}. Give the same, or --resume never, or another --sweep_dir."
                    )
        if ours["metric"] != theirs["metric"]:
            raise UserError(
                f"{out} holds a sweep by the metric {theirs['metric']}; give the same, or another --sweep_dir."
            )
        for part, what in (("data", "other prints"), ("module1", "another Module 1")):
            if theirs.get(part) != ours[part]:
                raise UserError(
                    f"{out} holds a sweep on {what}; give the same, or --resume never, or another --sweep_dir."
                )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "sweep.json", json.dumps(ours, indent=1) + "\n")


def write_best(out: Path, best: dict[str, Config], trained: dict[str, str], preset: str) -> None:
    """Writes best.toml and best.json, with what an earlier sweep in this folder has found for the other module."""
    from tune import results
    from tune.record import read_all

    if (out / "best.toml").exists() and (out / "best.json").exists():
        found = {
            name: config_of(spaces.CONFIGS[name], table) for name, table in read_toml(str(out / "best.toml")).items()
        }
        best, trained, new = found | best, json.loads((out / "best.json").read_text(encoding="utf-8")) | trained, best
        if len(best) > len(new) and (other := [k for k in keys_with(COMMON) if best["dense"][k] != best["match"][k]]):
            (old,) = best.keys() - new.keys()
            print(
                f"What was found for {old} before goes with another {other[0]}: it is left out of {out / 'best.toml'}."
            )
            best.pop(old), trained.pop(RUNS[old], None)
        best, trained = (
            {name: table[name] for name in order if name in table}
            for table, order in ((best, RUNS), (trained, RUNS.values()))
        )
    searched = {name: {k for r in read_all(out / name) for k in r.values} for name in best}
    header = [f"The best of a sweep from preset {preset}; --config of every training command."]
    write_whole(out / "best.toml", results.best_toml(best, searched, header))
    write_whole(out / "best.json", json.dumps(trained, indent=1))


def move_away(out: Path) -> Path:
    """Gives a sweep's folder another name, and returns that."""
    number = next(n for n in range(1, 10**6) if not out.with_name(f"{out.name}_before_{n}").exists())
    return out.rename(out.with_name(f"{out.name}_before_{number}"))


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """A block in which this process alone has a sweep's folder. UserError where another one has it and does not end."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("ab") as file:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"Another sweep is running in {out}; wait for its end, or give another --sweep_dir."
                    ) from None
                time.sleep(0.5)
        yield


def end_with(parent: int) -> None:
    """Sends SIGTERM to this process when the process that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
