"""A trial: one run of a module's training loop in an actor of Ray Tune, an epoch at a time.

The same actor runs the next trial, and keeps its compiled programs: trials that differ only in scalars share a program.
A trial's folder is like any run's folder, with Orbax checkpoints and metrics. Tune's own checkpoint only holds the path
of one of these checkpoints.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import queue
import sys
import threading
import time
from pathlib import Path

from ray import tune

from cluster.cores import as_important_as_others, claim
from cluster.host import PREEMPTED, Host
from ifvit import checkpoint, cli, train_dense, train_match
from ifvit.checkpoint.places import duplicate
from ifvit.commands import JOB, check_backend
from ifvit.config import Config, with_changes
from ifvit.devices.sharding import use_cpu_cores
from ifvit.errors import Interrupted
from ifvit.paths import cache_dir
from ifvit.training.match import like_module1
from ifvit.training.saver import take
from ifvit.training.watch import PLAIN, Watch
from tune import record
from tune.space import RUNS


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all trials of a sweep have in common."""

    module: str  # dense or match
    base: Config  # a trial's values replace some of its settings
    folder: str  # of the sweep
    metric: str
    higher_is_better: bool
    changing: frozenset  # keys that may change while a trial runs (population-based training)
    cwd: str
    platform: str  # GPU, TPU or CPU
    resources: dict  # of a trial, by Ray's names
    workers: int = 1  # hosts of a trial, with a process on each; 1: the trial is this process
    at_once: int = 0  # most trials at the same time; 0: as many as the resources allow
    watch: Watch = PLAIN  # what a trial's run is to show

    def config(self, values: dict, number: int) -> Config:
        """A trial's configuration. For Module 2 some settings come from the checkpoint of its Module 1."""
        config = with_changes(self.base, values)
        if self.module == "match":
            config = like_module1(config)
        return config.replace(checkpoint_dir=str(record.folder_of(self.folder, number)))

    @property
    def worst(self) -> float:
        """The metric that a failed trial reports."""
        return -float("inf") if self.higher_is_better else float("inf")


class Trial(tune.Trainable):
    """Runs one trial after the other in this process. Tune's config has the searched values, its name the number."""

    def setup(self, config: dict, plan: Plan) -> None:
        self._plan = plan
        # Relative paths shall mean what they mean in the folder where the sweep was started, if this host has it.
        with contextlib.suppress(OSError):
            os.chdir(plan.cwd)
        _prepare_process(plan)
        self._loop = None
        self.reset_config(config)

    def reset_config(self, config: dict) -> bool:
        self.cleanup()
        self._values = {k: v for k, v in config.items() if k != "trial"}
        self._resume, self._last = "auto", {}
        return True

    def step(self) -> dict:
        """The next epoch's metrics; the last ones have `done`.

        A trial that fails returns a reason in `failed`, and its last metrics.
        """
        if self._loop is None:
            _log_to(record.folder_of(self._plan.folder, int(self.trial_name)) / "log.txt")
            self._loop = Loop(self._train)
        told = self._loop.next()
        if isinstance(told, dict):
            if self._plan.metric not in told:
                named = ", ".join(sorted(k for k, v in told.items() if k not in ("step", "epoch"))) or "nothing"
                return self._failed(f"reports no {self._plan.metric}; it reports {named}", no_metric=True)
            self._last = told
            if told["epoch"] < self._plan.base.num_epochs:
                return dict(told)
            told = self._loop.next()  # the last epoch's metrics come with the end of the run
        code, message = told
        if code:
            return self._failed(message)
        # A run that was at its end already reports no metrics; they lie in its folder.
        self._last |= record.read(self._plan.folder, int(self.trial_name)).rows[-1]
        return self._last | {"done": True, "finished": True}

    def _failed(self, reason: str, **more) -> dict:
        return {
            "epoch": 0,
            "step": 0,
            **self._last,
            self._plan.metric: self._plan.worst,
            "failed": reason,
            "done": True,
            **more,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Notes the path of the run's newest checkpoint, once that is whole."""
        path = self._checkpoint(self._last["epoch"])
        until = time.monotonic() + checkpoint.BARRIER_MS / 1000
        while not checkpoint.complete(path) and time.monotonic() < until:
            time.sleep(0.05)
        Path(checkpoint_dir, "run.json").write_text(
            json.dumps({"path": str(path), "last": self._last}), encoding="utf-8"
        )

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Goes on from a checkpoint. Another trial's checkpoint is copied into this trial's folder first."""
        self.cleanup()
        noted = json.loads(Path(checkpoint_dir, "run.json").read_text(encoding="utf-8"))
        self._last = noted["last"]
        theirs, ours = checkpoint.locate(noted["path"]), self._checkpoint(self._last["epoch"])
        if theirs != ours:
            take(ours.parent)  # the process that had this trial may be writing its checkpoint of the same epoch
            duplicate(theirs, ours)
            record.note_values(self._plan.folder, int(self.trial_name), self._values, self._last["epoch"], str(theirs))
        self._resume = str(ours)

    def cleanup(self) -> None:
        if self._loop is not None:
            self._loop.end()
        self._loop = None

    def _checkpoint(self, epoch: int):
        name = RUNS[self._plan.module]
        folder = record.folder_of(self._plan.folder, int(self.trial_name))
        final = checkpoint.as_path(folder / f"{name}_ckpt")
        return final if epoch == self._plan.base.num_epochs else checkpoint.as_path(folder / f"{name}_epoch_{epoch}")

    def _train(self, host: Host) -> None:
        config = self._plan.config(self._values, int(self.trial_name))
        if self._plan.workers == 1:
            return _run(self._plan, config, self._resume, host)
        from cluster import on_ray
        from cluster.job import Job, Request
        from cluster.placement import placement

        request = Request(num_workers=str(self._plan.workers))
        on_ray.prepare(request)
        job = Job(
            functools.partial(run_on_hosts, self._plan, config, self._resume),
            f"trial-{self.trial_name}",
            (config.micro_batch,),
            **JOB,
        )
        code, message = on_ray.run_connected(job, request, placement(request, False).fitting(job), False, host)
        if code:
            raise Interrupted(message, code)


def _run(plan: Plan, config: Config, resume: str, host: Host) -> None:
    check_backend(plan.platform, host.name)
    if plan.module == "dense":
        train_dense.run(config, resume, host, plan.changing, validation=plan.base, watch=plan.watch)
    else:
        train_match.run(config, resume, host, plan.changing, plan.watch)


def run_on_hosts(plan: Plan, config: Config, resume: str, host: Host) -> tuple[int, str]:
    """What each process of a trial runs, where it has several; returns (exit code, message)."""
    import jax

    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    _log_to(Path(os.devnull) if jax.process_index() else Path(config.checkpoint_dir) / "log.txt")
    return cli.outcome(lambda: _run(plan, config, resume, host), tried_again=True)


class Loop(Host):
    """A training run in a thread. It stands still after every epoch until `next` is called."""

    def __init__(self, train):
        super().__init__()
        self._told, self._go = queue.Queue(), threading.Semaphore(0)
        self._ending = False
        self._thread = threading.Thread(target=self._run, args=(train,), daemon=True, name="training")

    def _run(self, train) -> None:
        try:
            end = cli.outcome(lambda: train(self))
        except BaseException as e:  # whatever it is, only this trial fails and not the sweep
            logging.getLogger("ifvit").exception("The trial has failed.")
            end = 1, f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:300]
        self._told.put(end)

    def next(self) -> dict | tuple[int, str]:
        """The metrics of the next epoch, or (exit code, message) when the run has ended."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        return self._told.get()

    def report(self, values: dict) -> None:
        self._told.put(values)
        self._go.acquire()
        if self._ending:
            raise Interrupted("The sweep goes on without this trial.", PREEMPTED)

    def stoppable(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def asked(self) -> int:
        return PREEMPTED if self._ending else 0

    def end(self) -> None:
        """Ends the run where it stands, and keeps its checkpoints."""
        self._ending = True
        if self._thread.ident is not None:
            self._go.release()
            self._thread.join()


def _prepare_process(plan: Plan) -> None:
    """Gives JAX this trial's share of the devices. It must be called before JAX looks for devices."""
    import jax

    as_important_as_others()
    if plan.workers > 1:
        jax.config.update("jax_platforms", "cpu")  # the trial's workers have the devices
    elif plan.platform == "CPU":
        claim(int(plan.resources["CPU"]))
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(plan.resources["CPU"]))
    elif plan.resources[plan.platform] < 1:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * plan.resources[plan.platform]:.3f}"
    cli.use_compilation_cache(cache_dir() / "compiled")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


def _log_to(file: Path) -> None:
    """Sends everything that this process prints from now on to `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = file.open("a", buffering=1, encoding="utf-8", errors="replace")
    logging.getLogger().handlers.clear()
    cli.prepare_output()
