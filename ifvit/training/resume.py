"""Where a run begins: from nothing, or from the furthest good checkpoint."""

import datetime
import json
import logging
from collections.abc import Set
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cluster.host import Host
from ifvit import checkpoint
from ifvit.checkpoint.digest import digest
from ifvit.config import completed, keys_with
from ifvit.devices.processes import exchange
from ifvit.devices.sharding import make_mesh, shardings
from ifvit.errors import UserError
from ifvit.fields import FREE
from ifvit.training import run_folder
from ifvit.training.metrics import ATTEMPTS, read_rows
from ifvit.training.saved import restored_state, saved_tree
from ifvit.training.state import TrainState
from ifvit.training.task import Task

log = logging.getLogger("ifvit")


class Run(NamedTuple):
    """A run that is about to take its next step."""

    folder: epath.Path
    mesh: Mesh
    placement: TrainState  # the sharding of every leaf
    state: TrainState  # on the devices
    best: dict | None  # `value`, `epoch` and `metric` of the best validation so far
    value: float | None  # of the newest validation
    history: list[dict]  # an entry for each time the run was started
    finished: epath.Path | None = None  # the final checkpoint of a run that has nothing left to do


def open_run(task: Task, resume: str, host: Host, may_change: Set[str]) -> Run:
    """Finds out where the run goes on, and puts its state on the devices.

    The order of a resume:
    1. Find the furthest checkpoint, and compare its configuration, prints and Module 1 with this run's.
    2. Read it. Every process reads what its devices need, and checks every leaf against its digest. A damaged
       checkpoint is set aside, and 1. begins again.
    3. Drop the rows of metrics that came after it (`metrics.Metrics`).
    4. Read batches from its step on (`Task.batches`).
    The checkpoint's metadata tell the best epoch so far and the run's history. Nothing else has state.

    `resume`: `auto`, `never` or a checkpoint's path; `may_change` as `loop.train`.
    UserError where a checkpoint does not fit this run, or the folder cannot be written to.
    """
    config = task.config
    folder = checkpoint.as_writable_path(config.checkpoint_dir)
    total = config.num_epochs * task.steps_per_epoch
    mesh = make_mesh(config.micro_batch, config.model_parallel)
    abstract = jax.eval_shape(task.init, 0)
    placement = shardings(abstract, mesh)

    this = str(folder / task.name)  # both modules may share a folder, so the module's name is needed
    again = "again" in exchange("again", "again" if resume != "auto" and host.has_begun(this) else "")
    # `never` begins anew once. This command's own processes, when started again, go on from what they have saved.
    if again and resume == "never":
        resume, again = "auto", False
    found, history = find_resume(task, folder, resume, again, abstract, placement, {*keys_with(FREE), *may_change})
    rows = read_rows(folder / "metrics.jsonl")
    if found and found.metadata["finished"]:
        checkpoint.discard_unfinished(folder, f"{task.name}_*")
        print(
            f"{found.path} is finished ({found.metadata['epoch']} epochs); nothing to do. --resume never trains anew.",
            flush=True,
        )
        return Run(folder, mesh, placement, abstract, None, None, history, checkpoint.as_path(found.path))
    if found:
        state, best = restored_state(abstract, found.state, task), found.metadata["best"]
    else:
        state, best = begin(task, placement), None  # weights that are refused leave the run before as it is
    if why := run_folder.writable(folder):
        raise UserError(f"Cannot write checkpoints to {folder} ({why}); give another directory.")
    if found:
        print(f"Going on from {found.path}, step {int(state.step)} of {total}", flush=True)
        print(lost(rows, int(state.step), found.metadata["timestamp"]), flush=True)
        if resume != "auto" and not again:
            run_folder.move_away(folder, task.name, task.steps_per_epoch, int(state.step))
    elif resume == "never":
        run_folder.move_away(folder, task.name)
        run_folder.write_beside(folder / ATTEMPTS, lambda file: file.write_bytes(b""))
    elif rows:
        print(lost(rows, 0), flush=True)
    if resume != "auto":
        exchange("begun", "")  # waits until the first process has moved the old checkpoints away
        host.begun(this)
    history = history + [
        {
            "time": now(),
            "from_step": int(state.step),
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
            "devices": jax.devices()[0].device_kind,
            **{f"{p} version": v for p, v in checkpoint.versions().items() if p in ("ifvit", "jax")},
        }
    ]
    return Run(folder, mesh, placement, state, best, found and found.metadata["value"], history)


def begin(task: Task, placement: TrainState) -> TrainState:
    """A fresh state on the devices, with the weights that the task starts from."""
    state = jax.jit(task.init, out_shardings=placement)(np.int32(task.config.seed))
    params, stats = jax.device_put(
        task.seed_from(state.params, state.batch_stats), (placement.params, placement.batch_stats)
    )
    return state._replace(params=params, batch_stats=stats)


def lost(rows: list[dict], step: int, saved: str = "") -> str:
    """A sentence on the work that an attempt had done after the checkpoint of `step`, as far as its metrics tell.

    `saved`: when the checkpoint was written.
    """
    gone = [r for r in rows if r["split"] == "train" and r["step"] > step]
    what = (
        f"{gone[-1]['step'] - step} steps ({sum(r['seconds'] for r in gone):.0f} s of training)"
        if gone
        else "no step that was logged"
    )
    if not saved:
        return f"Lost: {what}; there is no checkpoint, and the run begins anew"
    since = (datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(saved)).total_seconds()
    return f"Lost: {what}; the checkpoint was written {since:.0f} s ago"


def find_resume(
    task: Task,
    folder: epath.Path,
    resume: str,
    again: bool,
    abstract: TrainState,
    placement: TrainState,
    free: Set[str],
) -> tuple[checkpoint.Checkpoint | None, list[dict]]:
    """The checkpoint to go on from, read onto the devices, and the run's history until there.

    `resume` is one of these:
    - `auto`: takes the furthest good checkpoint in `folder`. Damaged ones are set aside with a line in the log.
    - `never`: takes none.
    - a path: takes that checkpoint, which must be good. Where this command has begun from there before (`again`),
      the checkpoints that it has written since come first.
    """
    if resume == "never":
        return None, []
    if again and not exchange("named", "there" if _is_there(resume) else "")[0]:
        resume = "auto"  # a checkpoint that this command wrote later has replaced it
    if resume != "auto" and checkpoint.is_packed(checkpoint.locate(resume)):
        raise UserError(
            f"{resume} has weights without an optimiser's state, so no run goes on from it; begin one from it: "
            f"--set init={resume}."
        )
    if resume != "auto" and checkpoint.is_pickle(checkpoint.locate(resume)):
        raise UserError(
            f"{resume} is a pickle; make a checkpoint of it first: python -m ifvit.checkpoint import {resume} DIR."
        )
    named = [] if resume == "auto" else [checkpoint.locate(resume)]
    paths = []
    if resume == "auto" or again:  # all take the first process's list: others may see an older state of a shared folder
        beyond = _read_metadata(named[0])["step"] if named else -1
        names = [p.name for p in run_folder.candidates(folder, task.name, task.steps_per_epoch, beyond)]
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
            aside.append(str(run_folder.set_aside(path)))
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
    """A checkpoint's metadata. Raises Damaged on all processes where one process finds it damaged."""
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
    """UserError unless a checkpoint has this module, configuration and data, and the leaves of this state."""
    checkpoint.check_module(path, metadata, task.name)
    checkpoint.check_ours(path, metadata)
    if None in metadata["digests"].values():
        raise UserError(
            f"{path} has no digests: other software wrote it, and a run goes on from what it can check alone. "
            "Give a checkpoint that was trained here, or --resume never."
        )
    theirs, ours = completed(type(task.config), metadata["config"]), task.config.to_dict()
    changed = [k for k in ours if k not in free and theirs[k] != ours[k]]
    if changed:
        k = changed[0]
        raise UserError(
            f"{path} was trained with {k} = {theirs[k]}, this run asks for {ours[k]}"
            + (f" (also changed: {', '.join(changed[1:])})" if changed[1:] else "")
            + ". Give the same value, or --resume never to train anew, or another checkpoint directory."
        )
    if metadata["data"] != task.data_digest:
        raise UserError(
            f"{path} was trained on other prints, or on another teacher's pairs; give the same --dataset_root, or "
            "--resume never, or another checkpoint directory."
        )
    aligner = checkpoint.leaves({"aligner": task.aligner}) if task.aligner else {}
    if {n: digest(x) for n, x in aligner.items()} != {
        n: d for n, d in metadata["digests"].items() if n.startswith("aligner/")
    }:
        raise UserError(
            f"{path} was trained with another Module 1 than {task.config.dense_reg_ckpt or 'none'}; give that one, or "
            "--resume never, or another checkpoint directory."
        )
    want = {
        n: checkpoint.kind(x.dtype, x.shape)
        for n, x in checkpoint.leaves({"state": saved_tree(abstract, task)}).items()
    }
    have = {n: d.split(":")[0] for n, d in metadata["digests"].items() if n.startswith("state/")}
    have = {n: kind for n, kind in have.items() if not checkpoint.RETIRED.search(n)}
    wrong = [n for n in sorted(want.keys() | have.keys()) if want.get(n) != have.get(n)]
    if wrong:
        n = wrong[0]
        raise UserError(
            f"{path} does not fit this configuration: {len(wrong)} leaves differ, e.g. {n} is "
            f"{have.get(n, 'missing')} there and {want.get(n, 'missing')} here. Use the configuration it was "
            "trained with, or --resume never."
        )


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
