"""The training loop of both modules."""

import datetime
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from etils import epath
from flax import serialization

from cluster.host import Host
from ifvit import checkpoint, plots, progress
from ifvit.cli import Failure, Interrupted
from ifvit.config import Config, completed
from ifvit.digest import digest
from ifvit.errors import UserError
from ifvit.processes import exchange
from ifvit.training import saving
from ifvit.training.hosts import Pace
from ifvit.training.metrics import ATTEMPTS, Metrics, one_by_one, read_rows
from ifvit.training.sharding import make_mesh, put_batch, replicated, shardings
from ifvit.training.state import TrainState

log = logging.getLogger("ifvit")

SAVE_NOW = 1  # `host.asked()`: this host will go soon. Greater: save and end with that exit code

# what a run may change and still be the same run
FREE = {"checkpoint_dir", "dataset_root", "input_workers", "max_broken", "dense_reg_ckpt", "loftr_ckpt",
        "save_every", "save_steps", "keep_last", "keep_best", "model_parallel", "remat"}


@dataclass
class Task:
    """What differs between the modules; the loop knows nothing else of them."""

    name: str                                                  # `dense_reg` or `matcher`: also the files' names
    config: Config
    steps_per_epoch: int
    data_digest: str
    init: Callable[[int], TrainState]                          # (seed); pure: also evaluated for its shapes alone
    step: Callable                                             # (state, batch, rate, *constants) -> (state, metrics)
    rates: np.ndarray                                          # (steps,) the learning rate of each step
    constants: tuple                                           # the configuration's scalars, Module 1's frozen parameters
    batches: Callable[[int, int], Iterator[dict]]              # (first step, last step) -> host batches
    validate: Callable[[TrainState, int], dict[str, float]]    # (state, epoch) -> metrics
    metric: str                                                # of validation, chooses the best checkpoint
    higher_is_better: bool
    metadata: dict                                             # more of it, e.g. `num_classes`
    to_saved: Callable[[dict], dict] = lambda tree: tree       # params -> params in the checkpoint
    from_saved: Callable[[dict], dict] = lambda tree: tree
    aligner: dict | None = None
    finish: Callable[[TrainState], dict] = lambda state: {}    # metadata of the final checkpoint only
    seed_from: Callable[[dict, dict], tuple] = lambda params, stats: (params, stats)  # puts loaded weights in


def train(task: Task, resume: str, host: Host, may_change: Set[str] = frozenset()) -> epath.Path:
    """Trains to the end, from the start or from the newest good checkpoint; returns the final checkpoint's path.

    `may_change`: configuration keys that the checkpoint may have been trained with otherwise, beside FREE.
    `host` (`cluster.host.Host`) is the process this is, which may be one of several. Ctrl-C and SIGTERM, on any of
    them, save `{name}_step_{S}` and raise Interrupted; NaN or Inf raises Failure, and so does a final
    checkpoint that cannot be written.
    """
    config = task.config
    folder = checkpoint.as_writable_path(config.checkpoint_dir)
    total = config.num_epochs * task.steps_per_epoch
    mesh = make_mesh(config.micro_batch, config.model_parallel)
    several, mine = jax.process_count() > 1, config.batch_size // jax.process_count()
    abstract = jax.eval_shape(task.init, 0)
    placement = shardings(abstract, mesh)

    # The order of a resume: 1. find the furthest checkpoint and compare configs; 2. read it, every process
    # what its devices need, every leaf against its digest; one that is damaged is set aside, and 1. begins
    # again; 3. drop the metric rows that came after it; 4. read batches from its step on. Its metadata tell
    # of the best epoch so far and of the run's history. Nothing else has state.
    this = str(folder / task.name)  # both modules may have one folder
    again = "again" in exchange("again", "again" if resume != "auto" and host.has_begun(this) else "")
    if again and resume == "never":  # this command's own processes are started again: once was asked for
        resume, again = "auto", False
    found, history = find_resume(task, folder, resume, again, abstract, placement, FREE | may_change)
    if found and found.metadata["finished"]:
        checkpoint.discard_unfinished(folder, f"{task.name}_*")
        print(f"{found.path} is finished ({found.metadata['epoch']} epochs); nothing to do. "
              "--resume never trains anew.", flush=True)
        if (rows := read_rows(folder / "metrics.jsonl")) and not (folder / "curves.png").exists():  # it ended just before them
            _draw(folder, rows)
        return checkpoint.as_path(found.path)
    if why := saving.writable(folder):
        raise UserError(f"Cannot write checkpoints to {folder} ({why}); give another directory.")
    if found:
        state, best = restored_state(abstract, found.state, task), found.metadata["best"]
        print(f"Going on from {found.path}, step {int(state.step)} of {total}", flush=True)
        print(lost(read_rows(folder / "metrics.jsonl"), int(state.step), found.metadata["timestamp"]), flush=True)
        if resume != "auto" and not again:
            saving.move_away(folder, task.name, task.steps_per_epoch, int(state.step))
    else:
        if resume == "never":
            saving.move_away(folder, task.name)
            saving.write_beside(folder / ATTEMPTS, lambda file: file.write_text(""))
        elif gone := read_rows(folder / "metrics.jsonl"):
            print(lost(gone, 0), flush=True)
        state, best = begin(task, placement), None
    if resume != "auto":
        exchange("begun", "")  # what was moved away is
        host.begun(this)
    constants = jax.device_put(task.constants, replicated(mesh))
    step = jax.jit(task.step, donate_argnums=0, out_shardings=(placement, replicated(mesh)))
    first = int(state.step)
    history = history + [{"time": now(), "from_step": first, "processes": jax.process_count(),
                          "mesh": dict(mesh.shape), "devices": jax.devices()[0].device_kind,
                          **{f"{p} version": v for p, v in checkpoint.versions().items() if p in ("ifvit", "jax")}}]
    metrics = Metrics(folder, first, total, task.name)
    metrics.attempt(first)
    saver = saving.Saver(folder, task.name, config, task.steps_per_epoch, task.higher_is_better, host.saved)

    def write_config(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config.to_dict(), indent=1) + "\n")

    saving.write_beside(folder / "config.json", write_config)

    def save(what: str, at: int, value: float | None = None, finished: bool = False) -> str:
        if checkpoint.is_local(folder) and not (folder / "config.json").exists():  # somebody has removed the folder
            saving.write_beside(folder / "config.json", write_config)
        epoch, within = divmod(at, task.steps_per_epoch)
        saver.start(saving.Saved(f"{task.name}_{what}", at, None if within else epoch, value), saved_tree(state, task), {
            "epoch": epoch, "step": at, "steps_per_epoch": task.steps_per_epoch, "finished": finished, "best": best,
            "value": value, "config": config.to_dict(), "data": task.data_digest, "history": history, **task.metadata,
            **(task.finish(state) if finished else {}),
        }, task.aligner)
        if saver.taken_over:
            raise Failure(f"Another run has begun to write to {folder}, so this one ends; what it saved before is whole.")
        return str(folder / f"{task.name}_{what}")

    pace = Pace(host.name)
    waiting: tuple[int, dict] | None = None  # metrics of the step before, fetched while this one runs
    sums: dict[str, list[float]] = {}
    waits = {"input_seconds": 0.0, "compile_seconds": 0.0}
    asked, epoch_began, epoch_waits = 0, time.perf_counter(), dict.fromkeys(("input_seconds", "compile_seconds", "checkpoint_seconds"), 0.0)
    clock, done, ended, value = time.perf_counter(), first, first, found and found.metadata["value"]
    last = first if _out_of_patience(task, best, first) else total
    batches = iter(task.batches(first, last))
    try:
        with host.stoppable(), host.watched(progress.count), jax.set_mesh(mesh):
            for at in range(first, last):
                before = time.perf_counter()
                batch = next(batches)
                waits["input_seconds"] += time.perf_counter() - before
                if several:  # so that all learn in the same step what one is asked
                    batch["asked"] = np.full(mine, host.asked(), np.int32)
                before = time.perf_counter()
                state, out = step(state, put_batch(batch, mesh, config.accumulate), task.rates[at], *constants)
                if at == first:  # compiled here, and on every other process: no time of steps
                    jax.block_until_ready(out)
                    waits["compile_seconds"] = time.perf_counter() - before
                if waiting:
                    asked = max(asked, _collect(*waiting, sums))
                waiting = (at + 1, out)
                ended = at + 1
                if not several:
                    asked = host.asked()
                end_of_epoch = ended % task.steps_per_epoch == 0
                within = not end_of_epoch and config.save_steps and ended % config.save_steps == 0
                if ended - done >= 10 or end_of_epoch or within or asked:
                    asked = max(asked, _collect(*waiting, sums))
                    waiting = None
                    seconds = time.perf_counter() - clock
                    rate = (ended - done) * config.batch_size / seconds
                    means = {k: float(np.mean(v)) for k, v in sums.items()}
                    times = {"seconds": seconds, "pairs_per_second": rate, "checkpoint_seconds": saver.blocked, **waits}
                    metrics.write_steps(ended, at // task.steps_per_epoch + 1, means, times)
                    metrics.progress(ended - done, means["loss"], rate)
                    epoch_waits = {k: v + times[k] for k, v in epoch_waits.items()}
                    waits = dict.fromkeys(waits, 0.0)
                    sums, clock, done, saver.blocked = {}, time.perf_counter(), ended, 0.0
                if within:
                    save(f"step_{ended}", ended)
                if end_of_epoch:
                    epoch = ended // task.steps_per_epoch
                    compared = pace.compare(epoch_waits, time.perf_counter() - epoch_began)
                    if compared:
                        metrics.write(ended, epoch, "hosts", compared)
                    values = task.validate(state, epoch)
                    metrics.write(ended, epoch, "val", values)
                    told = {"step": ended, "epoch": epoch, **metrics.newest("train"), **values, **one_by_one(compared)}
                    value = values.get(task.metric)
                    if value is not None and (best is None or (value > best["value"]) == task.higher_is_better
                                              and value != best["value"]):
                        best = {"value": value, "epoch": epoch, "metric": task.metric}
                    if ended < total and _out_of_patience(task, best, ended):
                        print(f"{task.metric} has not been better for {config.patience} epochs; the run ends after epoch "
                              f"{epoch}.", flush=True)
                        break
                    if ended < total:
                        save(f"epoch_{epoch}", ended, value)
                        host.report(told)
                    epoch_began, epoch_waits = time.perf_counter() - saver.blocked, dict.fromkeys(epoch_waits, 0.0)
                    clock = epoch_began  # the epoch's checkpoint counts with the next row, as `checkpoint_seconds` does
                if asked and ended < total:
                    path = save(f"step_{ended}", ended)
                    if asked > SAVE_NOW:
                        whole = saver.settle()
                        raise Interrupted(f"Stopped at step {ended} of {total}; " + (f"saved {path}." if whole else (
                            f"that could not be saved, the newest checkpoint is {saver.last or 'none'}."))
                            + " The same command goes on from there.", asked)
                    print(f"A host will go soon: saving {path} at step {ended}; the run goes on.", flush=True)
                asked = 0
        epoch = ended // task.steps_per_epoch
        if epoch % config.save_every == 0 and ended > first:
            save(f"epoch_{epoch}", ended, value)
        final = save("ckpt", ended, value, finished=True)
        if not saver.settle():
            save("ckpt", ended, value, finished=True)  # once more: what the run trained for hangs on it
            if not saver.settle():
                raise Failure(f"The training is done, and its final checkpoint {final} could not be written. Make room, "
                              "then run the same command: it goes on from the newest checkpoint.")
        if ended > first:
            host.report(told)
    finally:
        saver.close()
        metrics.close()
    _draw(folder, metrics.rows())
    return checkpoint.as_path(final)


def _draw(folder: epath.Path, rows: list[dict]) -> None:
    saving.write_beside(folder / "curves.png", lambda file: plots.curves(file, rows))


def _out_of_patience(task: Task, best: dict | None, step: int) -> bool:
    """Whether a step ends the last epoch that `patience` allows."""
    epoch, within = divmod(step, task.steps_per_epoch)
    return bool(task.config.patience and best and not within and epoch - best["epoch"] >= task.config.patience)


def begin(task: Task, placement: TrainState) -> TrainState:
    """A fresh state, made where it lives, with the weights that the task starts from."""
    state = jax.jit(task.init, out_shardings=placement)(np.int32(task.config.seed))
    params, stats = jax.device_put(task.seed_from(state.params, state.batch_stats),
                                   (placement.params, placement.batch_stats))
    return state._replace(params=params, batch_stats=stats)


def _collect(step: int, out: dict, sums: dict[str, list[float]]) -> int:
    """Fetches a step's metrics, and what any process was asked; Failure when a metric is NaN or Inf."""
    out = jax.device_get(out)
    progress.made()
    asked = int(out.pop("asked", 0))
    for k, v in out.items():
        v = float(v)
        if not math.isfinite(v):
            raise Failure(f"{k} is {v} at step {step}; nothing was saved after the last checkpoint. Lower the learning "
                          "rate (--set learning_rate=…), then run again.")
        sums.setdefault(k, []).append(v)
    return asked


def lost(rows: list[dict], step: int, saved: str = "") -> str:
    """What an attempt that died had done after the checkpoint of `step`, as far as its metrics tell; `saved`: when it was written."""
    gone = [r for r in rows if r["split"] == "train" and r["step"] > step]
    what = f"{gone[-1]['step'] - step} steps ({sum(r['seconds'] for r in gone):.0f} s of training)" if gone else "no step that was logged"
    if not saved:
        return f"Lost: {what}; there is no checkpoint, and the run begins anew"
    since = (datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(saved)).total_seconds()
    return f"Lost: {what}; the checkpoint was written {since:.0f} s ago"


def saved_tree(state: TrainState, task: Task) -> dict:
    """The state as a checkpoint holds it, nested dictionaries; of arrays, or of whatever stands for them."""
    return {"params": task.to_saved(state.params), "batch_stats": state.batch_stats,
            "opt_state": _without_empty(serialization.to_state_dict(state.opt_state)), "step": state.step}


def restored_state(abstract: TrainState, saved: dict, task: Task) -> TrainState:
    """The inverse of `saved_tree`."""
    opt_state = serialization.from_state_dict(abstract.opt_state, _with_empty(
        saved["opt_state"], serialization.to_state_dict(abstract.opt_state)))
    return TrainState(task.from_saved(saved["params"]), saved["batch_stats"], opt_state, saved["step"])


def _without_empty(tree: dict) -> dict:
    """optax has states without leaves; a checkpoint has leaves only."""
    clean = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in clean.items() if not (isinstance(v, dict) and not v)}


def _with_empty(saved: dict, target: dict) -> dict:
    return {k: _with_empty(saved.get(k, {}), v) if isinstance(v, dict) else saved[k] for k, v in target.items()}


def find_resume(task: Task, folder: epath.Path, resume: str, again: bool, abstract: TrainState, placement: TrainState,
                free: Set[str]) -> tuple[checkpoint.Checkpoint | None, list[dict]]:
    """The checkpoint to go on from, read onto the devices, and the run's history until there.

    `auto`: the furthest good one in `folder`; damaged ones are set aside on the way, and it is said.
    `never`: none. Else the path given, which must be good; where this command has begun from there before (`again`), what it
    has written since comes first.
    """
    if resume == "never":
        return None, []
    if again and not exchange("named", "there" if _is_there(resume) else "")[0]:
        resume = "auto"  # what this command wrote since has taken its place
    if resume != "auto" and not checkpoint.locate(resume).is_dir():
        raise UserError(f"{resume} is a pickle; make a checkpoint of it first: python -m ifvit.checkpoint import {resume} DIR.")
    named = [] if resume == "auto" else [checkpoint.locate(resume)]
    paths = []
    if resume == "auto" or again:  # as the first process sees them: a shared folder may look older elsewhere
        beyond = _read_metadata(named[0])["step"] if named else -1
        names = [p.name for p in saving.candidates(folder, task.name, task.steps_per_epoch, beyond)]
        paths = [folder / name for name in json.loads(exchange("candidates", json.dumps(names))[0])]
    paths += named
    aside = []
    for path in paths:
        try:
            metadata = _read_metadata(path)
            _check_same_run(task, path, metadata, abstract, free)
            found = checkpoint.restore(path, metadata, saved_tree(placement, task))
        except checkpoint.Damaged as e:
            if path in named:
                raise
            aside.append(str(saving.set_aside(path)))
            log.warning("⚠ %s It is set aside as %s.", e, aside[-1])
            continue
        history = metadata["history"] + [{"time": now(), "set_aside": name} for name in aside]
        return found, history
    if aside:
        log.warning("⚠ No good checkpoint is left in %s; the training begins anew.", folder)
    return None, [{"time": now(), "set_aside": name} for name in aside]


def _is_there(path: str) -> bool:
    try:
        return bool(checkpoint.locate(path))
    except UserError:
        return False


def _read_metadata(path: epath.Path) -> dict:
    """A checkpoint's metadata; Damaged on all processes where it is on one."""
    metadata, problem = {}, ""
    try:
        metadata = checkpoint.read_metadata(path)
    except checkpoint.Damaged as e:
        problem = str(e)
    said = exchange("metadata", problem)
    if any(said):
        raise checkpoint.Damaged(problem or next(filter(None, said)))
    return metadata


def _check_same_run(task: Task, path: epath.Path, metadata: dict, abstract: TrainState, free: Set[str]) -> None:
    """UserError unless a checkpoint is of this module, configuration and data, and has this state's leaves."""
    checkpoint.check_module(path, metadata, task.name)
    checkpoint.check_ours(path, metadata)
    if None in metadata["digests"].values():
        raise UserError(f"{path} has no digests: other software wrote it, and a run goes on from what it can check alone. "
                        "Give a checkpoint that was trained here, or --resume never.")
    theirs, ours = completed(type(task.config), metadata["config"]), task.config.to_dict()
    changed = [k for k in ours if k not in free and theirs[k] != ours[k]]
    if changed:
        k = changed[0]
        raise UserError(f"{path} was trained with {k} = {theirs[k]}, this run asks for {ours[k]}"
                        + (f" (also changed: {', '.join(changed[1:])})" if changed[1:] else "")
                        + ". Give the same value, or --resume never to train anew, or another checkpoint directory.")
    if metadata["data"] != task.data_digest:
        raise UserError(f"{path} was trained on other prints than this run has; give the same --dataset_root, or "
                        "--resume never, or another checkpoint directory.")
    aligner = checkpoint.leaves({"aligner": task.aligner}) if task.aligner else {}
    if {n: digest(x) for n, x in aligner.items()} != {n: d for n, d in metadata["digests"].items() if n.startswith("aligner/")}:
        raise UserError(f"{path} was trained with another Module 1 than {task.config.dense_reg_ckpt or 'none'}; give that one, or --resume never, or "
                        "another checkpoint directory.")
    want = {n: checkpoint.kind(x.dtype, x.shape) for n, x in checkpoint.leaves({"state": saved_tree(abstract, task)}).items()}
    have = {n: d.split(":")[0] for n, d in metadata["digests"].items() if n.startswith("state/")}
    wrong = [n for n in sorted(want.keys() | have.keys()) if want.get(n) != have.get(n)]
    if wrong:
        n = wrong[0]
        raise UserError(f"{path} does not fit this configuration: {len(wrong)} leaves differ, e.g. {n} is "
                        f"{have.get(n, 'missing')} there and {want.get(n, 'missing')} here. Use the configuration it was "
                        "trained with, or --resume never.")


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
