"""The training loop of both modules."""

import json
from collections.abc import Set
from pathlib import Path

import jax
from etils import epath

from cluster.host import SAVE, Host
from ifvit import checkpoint
from ifvit.devices import progress
from ifvit.devices.precision import compiled
from ifvit.devices.sharding import put_batch, replicated
from ifvit.errors import Failure, Interrupted
from ifvit.files import write_whole
from ifvit.training import run_folder
from ifvit.training.meter import Meter
from ifvit.training.metrics import Metrics, one_by_one, read_rows
from ifvit.training.policy import Saved
from ifvit.training.profile import Profile
from ifvit.training.resume import open_run
from ifvit.training.saved import saved_tree
from ifvit.training.saver import Saver
from ifvit.training.state import TrainState
from ifvit.training.task import Task
from ifvit.training.watch import PLAIN, Watch


def train(task: Task, resume: str, host: Host, may_change: Set[str] = frozenset(), watch: Watch = PLAIN) -> epath.Path:
    """Trains to the end, from the start or from the newest good checkpoint; returns the final checkpoint's path.

    `may_change`: configuration keys whose value may differ from the checkpoint's, beside those with the role
    `fields.FREE`. `host` stands for this process, which may be one of several; `watch` says what the run is to show.
    Ctrl-C or SIGTERM to any of them saves `{name}_step_{S}` and raises Interrupted. NaN or Inf raises Failure, and so
    does a final checkpoint that cannot be written.
    """
    config = task.config
    run = open_run(task, resume, host, may_change)
    folder, mesh, state, best, value = run.folder, run.mesh, run.state, run.best, run.value
    if run.finished:
        # The process may have ended after the final checkpoint and before the report.
        if not (folder / "report.html").exists():
            _report(folder, read_rows(folder / "metrics.jsonl"), config)
        return run.finished
    first, total = int(state.step), config.num_epochs * task.steps_per_epoch
    watch.check(total)
    last = first if _out_of_patience(task, best, first) else total
    step = jax.jit(task.step, donate_argnums=0, out_shardings=(run.placement, replicated(mesh)))
    constants = jax.device_put(task.constants, replicated(mesh))
    metrics = Metrics(folder, first, total, task.name, watch.trackers, config.to_dict())
    profile = Profile(watch.profile, metrics.folder / "profile", f"{folder}/profile")
    metrics.attempt(first)
    saver = Saver(folder, task.name, config, task.steps_per_epoch, task.higher_is_better, host.saved)
    _write_config(folder, config)
    metrics.keep(folder / "config.json")

    def save(what: str, state: TrainState, value: float | None = None, finished: bool = False) -> str:
        """Begins to write `{name}_{what}`, and returns its path."""
        if checkpoint.is_local(folder) and not (folder / "config.json").exists():  # somebody has removed the folder
            _write_config(folder, config)
        at = ended
        epoch, within = divmod(at, task.steps_per_epoch)
        metadata = {
            "epoch": epoch,
            "step": at,
            "steps_per_epoch": task.steps_per_epoch,
            "finished": finished,
            "best": best,
            "value": value,
            "config": config.to_dict(),
            "data": task.data_digest,
            "history": run.history,
            **task.metadata,
            **(task.finish(state) if finished else task.of_epoch() if what.startswith("epoch_") else {}),
        }
        saved = Saved(f"{task.name}_{what}", at, None if within else epoch, value)
        saver.start(saved, saved_tree(state, task), metadata, task.aligner, task.template(state, finished))
        if saver.taken_over:
            raise Failure(
                f"Another run has begun to write to {folder}, so this one ends; what it saved before is whole."
            )
        return str(folder / saved.name)

    ended, told = first, {}
    try:
        meter = Meter(metrics, saver, host, config.batch_size, task.steps_per_epoch, first)
        batches = iter(task.batches(first, last))
        with host.stoppable(), host.watched(progress.count), jax.set_mesh(mesh):
            for at in range(first, last):
                batch = put_batch(meter.next_batch(batches), mesh, config.accumulate)
                profile.before(at)
                if at == first:  # compiled once, here: what it costs is known of a compiled program alone
                    step = compiled(step.lower(state, batch, task.rates[at], *constants), config.compute_dtype)
                    meter.count_flops(step, config)
                state, out = step(state, batch, task.rates[at], *constants)
                ended = at + 1
                meter.add(ended, out)
                profile.after(ended, out)

                end_of_epoch = ended % task.steps_per_epoch == 0
                within = not end_of_epoch and config.save_steps and ended % config.save_steps == 0
                if meter.row_is_due(ended) or end_of_epoch or within or meter.asked:
                    meter.write_row(ended)
                if within:
                    save(f"step_{ended}", state)
                if end_of_epoch:
                    epoch = ended // task.steps_per_epoch
                    if compared := meter.compare_processes():
                        metrics.write(ended, epoch, "hosts", compared)
                    values = task.validate(state, epoch)
                    metrics.write(ended, epoch, "val", values)
                    told = {"step": ended, "epoch": epoch, **metrics.newest("train"), **values, **one_by_one(compared)}
                    value = values.get(task.metric)
                    if _is_better(task, value, best):
                        best = {"value": value, "epoch": epoch, "metric": task.metric}
                    if ended < total and _out_of_patience(task, best, ended):
                        print(
                            f"{task.metric} has not been better for {config.patience} epochs; the run ends after epoch "
                            f"{epoch}.",
                            flush=True,
                        )
                        break
                    if ended < total:
                        save(f"epoch_{epoch}", state, value)
                        host.report(told)
                    meter.begin_epoch()
                if meter.asked and ended < total:
                    path = save(f"step_{ended}", state)
                    if meter.asked > SAVE:  # it shall stop, too
                        raise _interrupted(ended, total, path, saver, meter.asked)
                    print(f"A host will go soon: saving {path} at step {ended}; the run goes on.", flush=True)
                meter.asked = 0
        epoch = ended // task.steps_per_epoch
        if epoch % config.save_every == 0 and ended > first:
            save(f"epoch_{epoch}", state, value)
        final = save("ckpt", state, value, finished=True)
        if not saver.settle():
            save("ckpt", state, value, finished=True)  # tries again: the whole run depends on this checkpoint
            if not saver.settle():
                raise Failure(
                    f"The training is done, and its final checkpoint {final} could not be written. Make room, "
                    "then run the same command: it goes on from the newest checkpoint."
                )
        if ended > first:
            host.report(told)
        _report(folder, metrics.rows(), config)
        metrics.keep(folder / "curves.png", folder / "report.html")
        metrics.finished = True
    finally:
        profile.close()
        saver.close()
        metrics.close()
    return checkpoint.as_path(final)


def _is_better(task: Task, value: float | None, best: dict | None) -> bool:
    if value is None or best is None:
        return value is not None
    return value > best["value"] if task.higher_is_better else value < best["value"]


def _out_of_patience(task: Task, best: dict | None, step: int) -> bool:
    """Whether a step ends the last epoch that `patience` allows."""
    epoch, within = divmod(step, task.steps_per_epoch)
    return bool(task.config.patience and best and not within and epoch - best["epoch"] >= task.config.patience)


def _interrupted(step: int, total: int, path: str, saver: Saver, code: int) -> Interrupted:
    whole = saver.settle()
    return Interrupted(
        f"Stopped at step {step} of {total}; "
        + (
            f"saved {path}."
            if whole
            else (f"that could not be saved, the newest checkpoint is {saver.last or 'none'}.")
        )
        + " The same command goes on from there.",
        code,
    )


def _write_config(folder: epath.Path, config) -> None:
    def write(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(config.to_dict(), indent=1) + "\n")

    run_folder.write_beside(folder / "config.json", write)


def _report(folder: epath.Path, rows: list[dict], config) -> None:
    """Writes curves.png and report.html; neither where metrics.jsonl was lost."""
    from ifvit.scoring import plots, report

    if not rows:
        return
    curves = folder / "curves.png"
    run_folder.write_beside(curves, lambda file: plots.curves(file, rows))
    run_folder.write_beside(
        folder / "report.html", lambda file: report.of_training(file, str(folder), rows, curves, config.to_dict())
    )
