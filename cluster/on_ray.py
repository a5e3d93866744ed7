"""Runs a job on Ray: says where its workers go, how often it is tried again, and how it is stopped.

Ray Train's controller keeps one group of actors going; by default one actor on each host, with all of that host's
accelerators. Each actor calls the job's function in its own JAX process. When one dies, the group is started again, and
the job goes on from its own checkpoints. Ray gets the metrics and nothing else.
"""

import os
import re
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace

import ray
import ray.train
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from cluster.backend import JaxBackendConfig
from cluster.environment import set_default
from cluster.host import INTERRUPTED, PREEMPTED, ClusterError, Host
from cluster.jax_errors import explained
from cluster.job import Job, Request
from cluster.placement import Placement, placement
from cluster.private import (
    NODE_ID_LABEL,
    DataParallelTrainer,
    DatasetsCallback,
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    FailureDecision,
    FixedScalingPolicy,
    PlacementGroupCleanerCallback,
    TrainingFailedError,
    WorkerGroupError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from cluster.session import passed_on, session
from cluster.worker import LOOK, Desk, Ended, work

START_FAILURES = (RayTaskError, WorkerGroupStartupFailedError)  # JAX's processes did not start; Ray's did not
RESIZE = 30.0  # seconds between two looks for new hosts, where the number of workers is a range


def run(job_for: Callable[[str], Job], request: Request, cores: int | None = None) -> tuple[int, str]:
    """Runs a job on the cluster of RAY_ADDRESS, or on a Ray of this machine alone; returns (exit code, message).

    `cores`: how many cores a Ray of this machine alone may use.
    """
    prepare(request)
    with session(cores) as alone:
        place = placement(request, alone)
        job = job_for(place.platform)
        fitting = place.fitting(job)
        if fitting.workers[0] > place.workers[0]:  # more than `place` was found for: look again for hosts
            fitting = placement(replace(request, num_workers="{}:{}".format(*fitting.workers)), alone).fitting(job)
        return run_connected(job, request, fitting, alone, Host())


def prepare(request: Request) -> None:
    """Puts Ray Train's settings into this process's environment."""
    set_default("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    set_default("RAY_CHDIR_TO_TRIAL_DIR", "0")
    if request.hang_timeout:  # how long Ray waits for a worker that does not even answer
        set_default("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", f"{request.hang_timeout:g}")


class Trainer(DataParallelTrainer):
    """Ray's trainer, which tells a job's own end from a failure, and takes worker counts that divide the batches."""

    def __init__(self, place: Placement, batches: tuple[int, ...], desk, max_failures: int, alone: bool, **how):
        super().__init__(work, **how)
        self._place, self._batches, self._desk, self._max_failures, self._alone = (
            place,
            batches,
            desk,
            max_failures,
            alone,
        )

    def _create_default_callbacks(self):
        # Some of Ray's processes are of no use here and still take time on the cores. One is for Ray Data's datasets.
        # Another asks the dashboard every second whether the controller lives; a Ray of this machine alone has no
        # dashboard.
        useless = (DatasetsCallback, PlacementGroupCleanerCallback) if self._alone else (DatasetsCallback,)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, useless)]

    def _initialize_and_run_controller(self, **how):
        how["failure_policy"] = FailurePolicy(self.run_config.failure_config, self._desk, self._max_failures)
        if self.scaling_config.elasticity_enabled:
            how["scaling_policy"] = ScalingPolicy(self.scaling_config, self._place, self._batches)
        elif self._alone:
            how["scaling_policy"] = WithoutAutoscaler(self.scaling_config)
        if self._alone:  # nobody gives notice of preemption to a Ray that the run started: no process looks for it
            set_default("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        return super()._initialize_and_run_controller(**how)


class FailurePolicy(DefaultFailurePolicy):
    """Tries again as long as the job gets on; gives up after over `max_failures` in a row without a new checkpoint.

    Ray's own policy counts all failures of a run, and a long run on preemptible hosts meets any number of them. Ray
    itself deals with preemptions that have a notice, and with hosts that are still to come; these are not counted.
    """

    def __init__(self, failure_config: FailureConfig, desk, max_failures: int):
        super().__init__(failure_config)
        self._desk, self._limit = desk, max_failures
        self._furthest, self._in_vain = -1, 0

    def make_decision(self, training_failed_error) -> FailureDecision:
        if _ended(training_failed_error):
            return FailureDecision.RAISE
        cause = getattr(training_failed_error, "controller_failure", None)
        start_failed = isinstance(cause, START_FAILURES)
        decision = FailureDecision.RETRY if start_failed else super().make_decision(training_failed_error)
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            free = ", ".join(f"{v:g} {k}" for k, v in ray.available_resources().items() if k in ("CPU", "GPU", "TPU"))
            print(
                f"The cluster has no room for {cause.num_workers} workers at present (free: {free or 'nothing'}); "
                "the run waits for it.",
                flush=True,
            )
        for rank, error in getattr(training_failed_error, "worker_failures", {}).items():
            print(f"⚠ Process {rank} has failed: {_first_line(error)}", flush=True)
        if start_failed or isinstance(training_failed_error, WorkerGroupError):
            if start_failed:
                print(f"⚠ The workers could not be started: {_first_line(cause)}", flush=True)
            furthest = ray.get(self._desk.furthest.remote())
            self._in_vain = 1 if furthest > self._furthest else self._in_vain + 1
            self._furthest = furthest
            if self._in_vain > self._limit:
                return FailureDecision.RAISE
            print("The workers are started again; the run goes on from the newest checkpoint.", flush=True)
        return decision


class ScalingPolicy(ElasticScalingPolicy):
    """As many workers as there are hosts for, and as divide the batch."""

    def __init__(self, scaling_config: ScalingConfig, place: Placement, batches: tuple[int, ...]):
        super().__init__(scaling_config)
        self._place, self._batches = place, batches

    def _count_possible_workers(self, reserved_resources) -> int:
        # Ray's coordinator may still count hosts that have gone in the last 20 s.
        alive = {n["NodeID"] for n in ray.nodes() if n["Alive"]}
        most = super()._count_possible_workers({node: r for node, r in reserved_resources.items() if node in alive})
        return max((n for n in range(1, most + 1) if self._place.fits(n, self._batches)), default=0)


class WithoutAutoscaler(FixedScalingPolicy):
    """As many workers as were asked for, on a Ray of this machine alone. It starts no actor to ask an autoscaler."""

    def _send_resource_request(self) -> None:
        pass

    _maybe_send_resource_request = _cancel_resource_request = _send_resource_request


def _ended(error: BaseException | None) -> Ended | None:
    """A job's own end among the workers' errors, if it is there; errors of other workers follow from it."""
    return next((e for e in getattr(error, "worker_failures", {}).values() if isinstance(e, Ended)), None)


def _first_line(error: BaseException) -> str:
    """What an error says, without its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[0])[:300]


def run_connected(job: Job, request: Request, place: Placement, alone: bool, host: Host) -> tuple[int, str]:
    """Runs a job from a process that is connected to Ray. `host` gets what the first worker reports."""
    low, high = place.workers
    print(
        f"Ray: {low if low == high else f'{low} to {high}'} worker{'s' if high > 1 else ''}, each with "
        + ", ".join(f"{v:g} {k}" for k, v in place.resources.items()),
        flush=True,
    )
    desk = (
        ray.remote(num_cpus=0)(Desk)
        .options(scheduling_strategy="DEFAULT", label_selector={NODE_ID_LABEL: ray.get_runtime_context().get_node_id()})
        .remote()
    )
    env = {k: v for k, v in passed_on(job.variables).items() if k != "JAX_PLATFORMS" or place.platform == "CPU"}
    if place.platform == "CPU":
        env["JAX_PLATFORMS"] = "cpu"
    if sys.platform == "linux":
        env |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # malloc takes huge pages for large blocks
    with tempfile.TemporaryDirectory() as scratch:  # only for Ray Train's own state; the run writes nothing there
        try:
            trainer = Trainer(
                place,
                job.batches,
                desk,
                request.max_failures,
                alone,
                train_loop_config={
                    "job": ray.cloudpickle.dumps(job),
                    "request": request,
                    "desk": desk,
                    "cwd": os.getcwd(),
                },
                backend_config=JaxBackendConfig(place.platform, job.packages, request.coordinator_port),
                scaling_config=ScalingConfig(
                    num_workers=high if low == high else (low, high),
                    resources_per_worker=place.resources,
                    use_gpu=place.platform == "GPU",
                    use_tpu=place.platform == "TPU",
                    topology=place.topology,
                    accelerator_type=place.accelerator,
                    placement_strategy=_strategy(place, request, alone),
                    elastic_resize_monitor_interval_s=RESIZE,
                ),
                run_config=RunConfig(
                    name=f"{job.name}-{uuid.uuid4().hex[:8]}",
                    storage_path=scratch,
                    failure_config=FailureConfig(max_failures=-1),
                    logging_config=LoggingConfig(log_level="WARNING"),
                    worker_runtime_env={"env_vars": env},
                ),
            )
        except ValueError as e:  # e.g. a TPU slice cannot be split among this number of workers
            raise ClusterError(
                f"Ray refuses {high} workers on {place.platform}: {e}; ask for another --num_workers."
            ) from None
        return _wait(trainer, desk, request.max_failures, host)


def _strategy(place: Placement, request: Request, alone: bool) -> str:
    """Ray's placement strategy. SPREAD keeps a large host from getting two workers where each host is to have one.

    A TPU slice has a strategy of its own.
    """
    return "SPREAD" if request.workers_per_host <= 1 and not alone and place.platform != "TPU" else "PACK"


def _wait(trainer: Trainer, desk, max_failures: int, host: Host) -> tuple[int, str]:
    """Runs the trainer in another thread, to its end.

    Meanwhile this thread passes on messages: the workers' epochs to `host`, and what `host` is asked (for example by a
    signal) to the workers.
    """
    result: list[BaseException | None] = []

    def fit():
        try:
            trainer.fit()
            result.append(None)
        except BaseException as e:
            result.append(e)

    thread = threading.Thread(target=fit, daemon=True)
    said = 0
    try:
        with host.stoppable():
            thread.start()
            going = True
            while going:
                thread.join(LOOK)
                going = thread.is_alive()
                for values in ray.get(desk.news.remote()):
                    host.report(values)
                if (asked := host.asked()) != said:
                    said = asked
                    print("Stopping: the workers save, then end.", flush=True)
                    desk.ask.remote(asked)
    except KeyboardInterrupt:
        return INTERRUPTED, "Stopped without saving; the same command goes on from the last checkpoint."
    except Exception:  # `host` wants no more epochs: the workers save and stop
        desk.ask.remote(PREEMPTED)
        thread.join()
        raise
    error = result[0]
    if error is None:
        return 0, ""
    if ended := _ended(error):
        return ended.code, ended.message
    if not isinstance(error, TrainingFailedError):
        raise error
    if (cause := getattr(error, "controller_failure", None)) and not isinstance(cause, START_FAILURES):
        return 1, f"Ray could not run it: {_first_line(cause)}. Its checkpoints, if there are any, are whole."
    return 1, (
        f"The run has failed {max_failures + 1} times without getting on, last with: "
        f"{_first_line(error)}. Its checkpoints are whole; the same command goes on from them.{_remedy(error)}"
    )


def _remedy(error: BaseException) -> str:
    """What can be done where workers, or their start, have failed with an error of JAX's runtime; else ''."""
    of_workers = getattr(error, "worker_failures", {}).values()
    for cause in (*of_workers, getattr(error, "controller_failure", None), error):
        cause = getattr(cause, "cause", None) or cause  # Ray's error of a task holds the task's own
        if cause is not None and (known := explained(cause)):
            return f" {known.sentence.partition(' JAX says: ')[0]}"
    return ""
