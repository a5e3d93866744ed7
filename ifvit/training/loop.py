"""The training loop of both modules."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from ifvit import checkpoint, plots
from ifvit.cli import Failure, Interrupted
from ifvit.errors import UserError
from ifvit.training.metrics import Metrics, read_rows
from ifvit.training.sharding import make_mesh, over_data, put_batch, replicated
from ifvit.training.state import TrainState

# what a run may change and still be the same run
FREE = {"checkpoint_dir", "dataset_root", "input_workers", "save_every", "max_broken", "dense_reg_ckpt", "loftr_ckpt"}


@dataclass
class Task:
    """What differs between the modules; the loop knows nothing else of them."""

    name: str                                                  # `dense_reg` or `matcher`: also the files' names
    config: Any
    steps_per_epoch: int
    data_digest: str
    create: Callable[[], TrainState]
    step: Callable                                             # (state, batch, *constants) -> (state, metrics)
    constants: tuple                                           # e.g. Module 1's frozen parameters
    batches: Callable[[int, int], Iterator[dict]]              # (first step, last step) -> host batches
    validate: Callable[[TrainState, int], dict[str, float]]    # (state, epoch) -> metrics
    metric: str                                                # of validation, chooses the best checkpoint
    higher_is_better: bool
    metadata: dict                                             # more of it, e.g. `num_classes`
    to_saved: Callable[[dict], dict] = lambda tree: tree       # params -> params in the checkpoint
    from_saved: Callable[[dict], dict] = lambda tree: tree
    aligner: dict | None = None
    finish: Callable[[TrainState], dict] = lambda state: {}    # metadata of the final checkpoint only


def train(task: Task, resume: str) -> Path:
    """Trains to the end, from the start or from the newest checkpoint; returns the final checkpoint's path.

    Ctrl-C and SIGTERM save `{name}_step_{S}` and raise Interrupted; NaN or Inf raises Failure.
    """
    config = task.config
    folder = Path(os.path.abspath(config.checkpoint_dir))
    total = config.num_epochs * task.steps_per_epoch
    mesh = make_mesh(config.batch_size)

    # The order of a resume: 1. find the checkpoint and compare configs, before anything is made;
    # 2. create the state, which gives the tree; 3. put the saved leaves into it; 4. drop the metric
    # rows that came after it; 5. read batches from its step on. Nothing else has state.
    found = find_resume(task, folder, resume)
    if found and found.metadata["finished"]:
        print(f"{found.path} is finished ({found.metadata['epoch']} epochs); nothing to do. "
              "--resume never trains anew.", flush=True)
        return found.path
    _check_writable(folder)
    state = task.create()
    best = None
    if found:
        state = restore_state(state, found.state, task)
        best = found.metadata["best"]
        print(f"Going on from {found.path}, step {int(state.step)} of {total}", flush=True)
    state = jax.device_put(state, replicated(mesh))
    constants = jax.device_put(task.constants, replicated(mesh))
    step = jax.jit(task.step, donate_argnums=0, in_shardings=(replicated(mesh), over_data(mesh)) + (replicated(mesh),) * len(constants),
                   out_shardings=replicated(mesh))
    first = int(state.step)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    metrics = Metrics(folder, first, total, task.name)

    def save(name: str, at: int, finished: bool = False) -> Path:
        tree = saved_state(state, task)
        checkpoint.save(folder / name, task.name, tree, {
            "epoch": at // task.steps_per_epoch, "config": config.to_dict(), "data": task.data_digest, "best": best,
            "step": at, "finished": finished, "steps_per_epoch": task.steps_per_epoch, **task.metadata,
            **(task.finish(state) if finished else {}),
        }, task.aligner)
        return folder / name

    stop = StopSignals()
    waiting: tuple[int, dict] | None = None  # metrics of the step before, fetched while this one runs
    sums: dict[str, list[float]] = {}
    clock, done = time.perf_counter(), first
    try:
        with stop:
            for at, batch in zip(range(first, total), task.batches(first, total)):
                state, out = step(state, put_batch(batch, mesh), *constants)
                if waiting:
                    _collect(*waiting, sums)
                waiting = (at + 1, out)
                ended = at + 1
                end_of_epoch = ended % task.steps_per_epoch == 0
                if ended - done >= 10 or end_of_epoch or stop.received:
                    _collect(*waiting, sums)
                    waiting = None
                    seconds = time.perf_counter() - clock
                    rate = (ended - done) * config.batch_size / seconds
                    means = {k: float(np.mean(v)) for k, v in sums.items()}
                    metrics.write(ended, at // task.steps_per_epoch + 1, "train",
                                  means | {"seconds": seconds, "pairs_per_second": rate})
                    metrics.progress(ended - done, means["loss"], rate)
                    sums, clock, done = {}, time.perf_counter(), ended
                if end_of_epoch:
                    epoch = ended // task.steps_per_epoch
                    values = task.validate(state, epoch)
                    metrics.write(ended, epoch, "val", values)
                    value = values.get(task.metric)
                    if value is not None and (best is None or (value > best["value"]) == task.higher_is_better
                                              and value != best["value"]):
                        best = {"value": value, "epoch": epoch, "metric": task.metric}
                        save(f"{task.name}_best", ended)
                    if epoch % config.save_every == 0 and ended < total:
                        save(f"{task.name}_epoch_{epoch}", ended)
                    clock = time.perf_counter()
                if stop.received and ended < total:
                    path = save(f"{task.name}_step_{ended}", ended)
                    raise Interrupted(f"Stopped at step {ended} of {total}; saved {path}. The same command goes on "
                                      "from there.", 130 if stop.received == signal.SIGINT else 75)
        if config.num_epochs % config.save_every == 0:
            save(f"{task.name}_epoch_{config.num_epochs}", total)
        final = save(f"{task.name}_ckpt", total, finished=True)
    finally:
        metrics.close()
    plots.curves(folder / "curves.png", read_rows(metrics.path))
    return final


def _collect(step: int, out: dict, sums: dict[str, list[float]]) -> None:
    """Fetches a step's metrics; Failure when one of them is NaN or Inf."""
    for k, v in out.items():
        v = float(v)
        if not math.isfinite(v):
            raise Failure(f"{k} is {v} at step {step}; nothing was saved after the last checkpoint. Lower the learning "
                          "rate (--set learning_rate=…), then run again.")
        sums.setdefault(k, []).append(v)


def saved_state(state: TrainState, task: Task) -> dict:
    """The state as a checkpoint holds it: nested dictionaries of numpy arrays."""
    host = jax.device_get(state)
    return {"params": task.to_saved(host.params), "batch_stats": host.batch_stats,
            "opt_state": _without_empty(serialization.to_state_dict(host.opt_state)), "step": host.step}


def restore_state(state: TrainState, saved: dict, task: Task) -> TrainState:
    """The saved leaves in the tree of `state`; UserError names leaves that do not fit."""
    target = {"params": state.params, "batch_stats": state.batch_stats,
              "opt_state": _without_empty(serialization.to_state_dict(state.opt_state)), "step": state.step}
    source = {**saved, "params": task.from_saved(saved["params"])}
    want, have = checkpoint.leaves(target), checkpoint.leaves(source)
    wrong = [n for n in sorted(want.keys() | have.keys())
             if n not in want or n not in have or want[n].shape != have[n].shape]
    if wrong:
        raise UserError(f"The checkpoint's state does not fit this configuration: {len(wrong)} leaves differ, e.g. "
                        f"{wrong[0]}. Use the configuration it was trained with, or --resume never.")
    opt_state = serialization.from_state_dict(state.opt_state, _with_empty(
        source["opt_state"], serialization.to_state_dict(state.opt_state)))
    return TrainState(source["params"], source["batch_stats"], opt_state, source["step"])


def _without_empty(tree: dict) -> dict:
    """optax has states without leaves; a checkpoint has leaves only."""
    clean = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in clean.items() if not (isinstance(v, dict) and not v)}


def _with_empty(saved: dict, target: dict) -> dict:
    return {k: _with_empty(saved.get(k, {}), v) if isinstance(v, dict) else saved[k] for k, v in target.items()}


def find_resume(task: Task, folder: Path, resume: str) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from: `auto` the furthest whole one in `folder`, `never` none, else the path given."""
    if resume == "never":
        return None
    if resume == "auto":
        candidates = [p for p in folder.glob(f"{task.name}_*") if p.is_dir() and "orbax-checkpoint-tmp" not in p.name
                      and not p.name.endswith((".new", "_best")) and checkpoint.complete(p)]
        if not candidates:
            return None
        def progress(p):
            meta = checkpoint.read_metadata(p)
            return meta["finished"], meta["step"], p.name
        resume = str(max(candidates, key=progress))
    found = checkpoint.load(resume, task.name)
    theirs, ours = found.metadata["config"], task.config.to_dict()
    before = type(task.config)().to_dict()  # a key that is newer than the checkpoint had its default's effect
    changed = [k for k in ours if k not in FREE and theirs.get(k, before[k]) != ours[k]]
    if changed:
        k = changed[0]
        raise UserError(f"{found.path} was trained with {k} = {theirs.get(k, before[k])}, this run asks for {ours[k]}"
                        + (f" (also changed: {', '.join(changed[1:])})" if changed[1:] else "")
                        + ". Give the same value, or --resume never to train anew, or another checkpoint directory.")
    if found.metadata["data"] != task.data_digest:
        raise UserError(f"{found.path} was trained on other prints than this run has; give the same --dataset_root, or "
                        "--resume never, or another checkpoint directory.")
    return found


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise UserError(f"Cannot write checkpoints to {folder} ({e.strerror}); give another directory.") from None


class StopSignals:
    """SIGINT and SIGTERM are noted, and acted on between two steps; a second SIGINT stops at once."""

    def __init__(self):
        self.received: int | None = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)
