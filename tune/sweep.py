"""A sweep: runs trials of one module side by side under Ray Tune, until the number asked for has been tried."""

import collections
import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig
from ray.tune.experiment import Trial as Tried
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from cluster.address import alone
from cluster.host import INTERRUPTED, PREEMPTED
from cluster.placement import Missing, jax_platforms_ask, kind_of_devices, wait_for_hosts
from cluster.session import passed_on
from ifvit.commands import JOB
from ifvit.devices.cores import cores
from ifvit.errors import Failure, Interrupted
from tune import record
from tune.samples import Optuna, Random, Samples
from tune.space import Range, Space
from tune.trial import Plan, Trial

RETRIES = 3  # how often a trial is started again whose process or host died
SCRATCH = ".tune-"


@dataclass(frozen=True)
class Request:
    """How a sweep is run."""

    num_samples: int
    searcher: str = "random"  # or optuna
    scheduler: str = "asha"  # or pbt, none
    reduction: int = 4  # ASHA: one trial in so many goes on at each rung
    grace: int = 1  # epochs that every trial gets
    concurrent: int = 0  # trials at once; 0: as many as there is room for
    seed: int = 0
    wait_for_hosts: float = 50.0
    cpus: int = 0  # cores of a trial; 0: so many that all cores are busy
    workers: int = 1  # hosts of a trial; 1: a trial is one process
    accelerators: float = 0.0  # GPUs or TPU chips of a trial, e.g. 0.5; 0: one, where there are any


def run(plan: Plan, space: Space, request: Request) -> list[record.Record]:
    """Runs what is left of a sweep, and returns all its trials.

    Failure where all trials failed, Interrupted after a signal.
    """
    begun = record.read_all(plan.folder)
    left = request.num_samples - sum(r.end is not None for r in begun)
    if left > 0:
        _run(placed(plan, request), space, request, begun, left)
    records = record.read_all(plan.folder)
    _complain(records, plan)
    return records


def _run(plan: Plan, space: Space, request: Request, begun: list[record.Record], left: int) -> None:
    Path(plan.folder).mkdir(parents=True, exist_ok=True)
    mode = "max" if plan.higher_is_better else "min"
    param_space = {}
    if request.scheduler == "pbt":  # Ray's population-based training takes no search algorithm
        search, param_space = _population(plan, space, request, begun)
    else:
        how = space, plan.base, request.seed
        source = Optuna(*how, mode) if request.searcher == "optuna" else Random(*how)
        search = Samples(source, plan.folder, plan.metric, mode, begun, request.num_samples)
    watch = Watch(plan, request, begun)
    for left_behind in Path(plan.folder).glob(f"{SCRATCH}*"):
        shutil.rmtree(left_behind, ignore_errors=True)
    # The folder is for Tune's own state; nothing of the trials lies there. All hosts have to see it.
    with (
        tempfile.TemporaryDirectory(dir=plan.folder, prefix=SCRATCH, ignore_cleanup_errors=True) as scratch,
        _signals(watch),
    ):
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(Trial, plan=plan), plan.resources),
            param_space=param_space,
            tune_config=tune.TuneConfig(
                metric=plan.metric,
                mode=mode,
                search_alg=search,
                scheduler=_scheduler(plan, space, request, begun),
                num_samples=left,
                reuse_actors=True,
                max_concurrent_trials=min(filter(None, (request.concurrent, plan.at_once)), default=None),
                trial_name_creator=lambda trial: str(trial.config["trial"]),
                trial_dirname_creator=lambda trial: f"{trial.config['trial']:03d}_{trial.trial_id}",
            ),
            run_config=RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                callbacks=[watch],
                stop=_Unless(watch),
                failure_config=FailureConfig(max_failures=RETRIES),
                checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        tuner.fit()
    if watch.problem:
        raise Failure(watch.problem)
    if watch.told:
        code = INTERRUPTED if watch.told[0] == signal.SIGINT else PREEMPTED
        raise Interrupted(
            f"The sweep was stopped; {watch.ended} of {request.num_samples} trials have ended, and the same command "
            "goes on with the others from their checkpoints.",
            code,
        )


def _population(plan: Plan, space: Space, request: Request, begun: list[record.Record]):
    """The members for population-based training, each with all its values; and the space in Tune's form."""
    source = Random(space, plan.base, request.seed)
    points = [{"trial": r.number, **r.values} for r in begun if r.end is None]
    for number in set(range(request.num_samples)) - {r.number for r in begun}:
        values = {k: plan.base[k] for k in space} | source.draw(number)
        record.note_values(plan.folder, number, values)
        points.append({"trial": number, **values})
    numbers = tune.choice([p["trial"] for p in points])
    return BasicVariantGenerator(points_to_evaluate=points), {"trial": numbers, **_domains(space)}


def _scheduler(plan: Plan, space: Space, request: Request, begun: list[record.Record]) -> TrialScheduler | None:
    if request.scheduler == "asha":
        return Halving(
            plan,
            begun,
            grace_period=min(request.grace, plan.base.num_epochs),
            max_t=plan.base.num_epochs,
            reduction_factor=request.reduction,
            time_attr="epoch",
            stop_last_trials=False,
        )
    if request.scheduler == "pbt":

        def within(config: dict) -> dict:
            return config | {k: min(max(config[k], p.low), p.high) for k, p in space.items() if isinstance(p, Range)}

        return Population(
            time_attr="epoch",
            perturbation_interval=max(1, plan.base.num_epochs // 10),
            synch=True,
            log_config=False,
            custom_explore_fn=within,
            hyperparam_mutations=_domains(space),
        )
    return None


def _domains(space: Space) -> dict:
    """The ranges in Tune's form."""
    return {k: (tune.loguniform if p.scale == "log" else tune.uniform)(p.low, p.high) for k, p in space.items()}


class Population(PopulationBasedTraining):
    """Ray's synchronous PBT (Jaderberg et al. 2017). Here a round also ends when its last member fails."""

    def choose_trial_to_run(self, tune_controller) -> Tried | None:
        chosen = super().choose_trial_to_run(tune_controller)
        members = tune_controller.get_trials()
        waiting = [t for t in members if not t.is_finished()]
        if chosen is None and waiting and all(t.status == Tried.PAUSED for t in waiting):
            for gone in set(members) - set(waiting):  # Ray would wait for ever for members whose process died
                state = self._trial_state[gone]
                state.last_train_time = max(state.last_train_time, self._next_perturbation_sync)
            # This result counts as the round's last one.
            self.on_trial_result(tune_controller, waiting[-1], waiting[-1].last_result)
            chosen = super().choose_trial_to_run(tune_controller)
            if chosen is None:  # members of an earlier attempt have reached the end of this round already
                self._next_perturbation_sync += self._perturbation_interval
                chosen = super().choose_trial_to_run(tune_controller)
        return chosen


class Halving(ASHAScheduler):
    """Ray's ASHA (Li et al. 2020). Here it knows what the trials of an earlier attempt at the sweep have reached."""

    def __init__(self, plan: Plan, begun: list[record.Record], **how):
        super().__init__(**how)
        self._plan, self._open = plan, {r.number: r for r in begun if r.end is None}
        for r in begun:
            if r.end is not None:
                self._remember(r, _Named(f"ended {r.number}"))

    def on_trial_add(self, tune_controller, trial) -> None:
        super().on_trial_add(tune_controller, trial)
        if earlier := self._open.get(trial.config["trial"]):
            self._remember(earlier, trial)

    def _remember(self, r: record.Record, trial) -> None:
        sign = 1.0 if self._plan.higher_is_better else -1.0
        for row in r.rows:
            if row.get(self._plan.metric) is not None:
                self._brackets[0].on_result(trial, row["epoch"], sign * row[self._plan.metric])


@dataclass(frozen=True)
class _Named:
    trial_id: str


class Watch(tune.Callback):
    """Prints a line for each thing that happens, and notes in a trial's folder how the trial ended."""

    def __init__(self, plan: Plan, request: Request, begun: list[record.Record]):
        self._plan, self._request = plan, request
        self._started: dict[str, float] = {}
        self.ended = sum(r.end is not None for r in begun)
        self.told: list[int] = []  # the signals that have come
        self.problem = ""  # a sentence; where it is not empty the sweep ends

    def on_trial_start(self, iteration, trials, trial, **_) -> None:
        self._started.setdefault(trial.trial_id, time.monotonic())

    def on_trial_result(self, iteration, trials, trial, result, **_) -> None:
        if result.get("no_metric"):
            self.problem = (
                f"No trial reports the metric {self._plan.metric!r}: trial {trial.custom_trial_name} "
                f"{result['failed']}. Give another --metric, or more fingers to validate on."
            )
        elif "failed" not in result:
            print(
                f"trial {trial.custom_trial_name}: epoch {result['epoch']} of {self._plan.base.num_epochs}, "
                f"{self._plan.metric} {result[self._plan.metric]:.4g}",
                flush=True,
            )

    def on_trial_complete(self, iteration, trials, trial, **_) -> None:
        if self.told:  # the signal ended the trial, which goes on later
            return
        last = trial.last_result or {}
        failed = last.get("failed")
        self._end(trial, "failed" if failed else "finished" if last.get("finished") else "stopped", failed or "")

    def on_trial_error(self, iteration, trials, trial, **_) -> None:
        error = str(trial.get_error() or "its process died").strip().splitlines()
        self._end(trial, "failed", error[-1][:300])

    def _end(self, trial, how: str, reason: str) -> None:
        number = int(trial.custom_trial_name)
        seconds = time.monotonic() - self._started.get(trial.trial_id, time.monotonic())
        record.note_end(self._plan.folder, number, how, reason, seconds)
        self.ended += 1
        print(
            f"trial {number}: {how}{': ' + reason if reason else ''} ({self.ended} of {self._request.num_samples})",
            flush=True,
        )


class _Unless(tune.Stopper):
    """Ends all trials once the watch has a problem."""

    def __init__(self, watch: Watch):
        self._watch = watch

    def __call__(self, trial_id, result) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._watch.problem)


@contextlib.contextmanager
def _signals(watch: Watch):
    """Lets SIGINT and SIGTERM end the sweep without ending its trials, which go on when the sweep does.

    The first signal is enough.
    """

    def note(number, frame):
        watch.told.append(number)
        if len(watch.told) == 1:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if not watch.told:
            raise
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def placed(plan: Plan, request: Request) -> Plan:
    """The plan, with the devices that each trial gets. ClusterError where no host has them within `wait_for_hosts`.

    A trial of several workers gets whole hosts from Ray Train; Ray Tune itself then gives it no devices.
    """

    def look(nodes: list[dict]) -> Plan | Missing:
        hosts = [n["Resources"] for n in nodes]
        every = sum(int(h.get("CPU", 0)) for h in hosts)
        found = kind_of_devices(nodes, alone())
        kind = "GPU" if request.accelerators and found == "CPU" else found  # hosts with GPUs may be still to come
        cores = max((int(h.get("CPU", 0)) for h in hosts), default=0)
        beside = min((h.get("CPU", 0) / h[kind] for h in hosts if h.get(kind)), default=0)  # cores for each accelerator
        if request.workers > 1:
            wanted = {kind: 1}
        elif kind == "CPU":
            wanted = {"CPU": request.cpus or max(1, min(cores, every // request.num_samples))}
        else:
            share = request.accelerators or 1.0
            wanted = {"CPU": request.cpus or max(1, int(beside * share)), kind: share}
        room = sum(all(h.get(k, 0) >= v for k, v in wanted.items()) for h in hosts)
        if room >= request.workers:
            at = dataclasses.replace(plan, platform=kind, resources=wanted, workers=request.workers)
            return (
                dataclasses.replace(at, resources={"memory": 1}, at_once=room // request.workers)
                if request.workers > 1
                else at
            )
        asked = " and ".join(f"{v:g} {k}" for k, v in wanted.items())
        there = ", ".join(" and ".join(f"{h.get(k, 0):g} {k}" for k in wanted) for h in hosts)
        where = f"on each of {request.workers} hosts" if request.workers > 1 else "on one host"
        return Missing(
            [wanted] * request.workers,
            (
                f"The cluster cannot fit a trial: it asks for {asked} {where}, and there are {there or 'no hosts'}; "
                f"{'' if request.accelerators else jax_platforms_ask(kind)}ask for less with --trial_cpus, "
                "--trial_accelerators or --trial_workers, or start more or larger hosts."
            ),
        )

    return wait_for_hosts(look, 0 if alone() else request.wait_for_hosts)


def _complain(records: list[record.Record], plan: Plan) -> None:
    """Failure where every trial failed; its text has the most frequent reasons first."""
    failed = [r for r in records if r.end and r.end["how"] == "failed"]
    if records and len(failed) == len(records):
        reasons = collections.Counter(r.end["reason"] for r in failed).most_common()
        raise Failure(
            f"All {len(records)} trials failed. "
            + " ".join(f"{n} × {why}" for why, n in reasons[:3])
            + f" Their logs are in {plan.folder}/trials; mend that, then give another --sweep_dir, or --resume never."
        )


def session_options() -> dict:
    """Arguments for `cluster.session.session`. It also switches off Tune's own tables, files and signal handlers."""
    for name in (
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
        "TUNE_DISABLE_SIGINT_HANDLER",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING",
    ):
        os.environ[name] = "1"
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # A trial has the devices that Ray gives it, whatever devices the driver has.
    env = {k: v for k, v in passed_on(JOB["variables"]).items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return {
        "cores": cores(),
        "runtime_env": {"env_vars": env | {"RAY_CHDIR_TO_TRIAL_DIR": "0", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}},
    }


def platform() -> str:
    """The kind of device that the cluster's trials run on: TPU, GPU or CPU."""
    return kind_of_devices([n for n in ray.nodes() if n["Alive"]], alone())
