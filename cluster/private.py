"""Private names of Ray and JAX: what each is for, and on which versions that was checked.

There is no public substitute for these. `tests/test_private.py` tells whether they are there on the installed
versions; after an upgrade read the code behind each before CHECKED is moved on. (What asks jaxlib about XLA_FLAGS is
in xla_flags.py: it has to do without Ray.)
"""

import grpc
import ray

# Where Ray puts its sockets if nobody says otherwise, by RAY_TMPDIR and TMPDIR.
from ray._common.utils import get_default_ray_temp_dir as temp_dir

# Processes beside the workers, of no use to a run: for Ray Data's datasets, and to ask a dashboard for the controller.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# What tells a start of workers that failed from a cluster without room for them.
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

# Of a worker: `get_train_context().preemption_context.preemption_info`; the public get_preemption_info is a barrier.
from ray.train.v2._internal.execution import context as train_context

# How a failure is answered: Ray's own policy counts all failures of a run, ours those in a row without a checkpoint.
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

# How many workers there are (`_count_possible_workers`), and requests to an autoscaler, which a Ray alone has not.
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy

# Where these are handed in: `_create_default_callbacks`, `_initialize_and_run_controller`.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

# What `fit` raises: `controller_failure`, `worker_failures`.
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

CHECKED = {"ray": "2.60", "jax": "0.10"}

NODE_ID_LABEL = ray._raylet.RAY_NODE_ID_KEY  # by which an actor is kept on the driver's node
# Of `ray.init`: no metrics and no task events, of a Ray without a dashboard that would show them.
SYSTEM_CONFIG = {"enable_metrics_collection": False, "task_events_report_interval_ms": 0}
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # a call that Ray's coordinator (GCS) answers, and nothing else does

__all__ = [
    "ALIVE",
    "CHECKED",
    "NODE_ID_LABEL",
    "SYSTEM_CONFIG",
    "ControllerError",
    "DataParallelTrainer",
    "DatasetsCallback",
    "DefaultFailurePolicy",
    "ElasticScalingPolicy",
    "FailureDecision",
    "FixedScalingPolicy",
    "PlacementGroupCleanerCallback",
    "TrainingFailedError",
    "WorkerGroupError",
    "WorkerGroupStartupFailedError",
    "WorkerGroupStartupTimeoutError",
    "cache_every_process",
    "is_ray",
    "temp_dir",
    "train_context",
]


def is_ray(address: str, seconds: float = 30) -> bool:
    """Whether what listens at HOST:PORT is Ray's coordinator: `ray.init` would try for two minutes.

    Any answer of its own counts, a refusal of this process (no token) too.
    """
    try:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            channel.unary_unary(ALIVE)(b"", timeout=seconds)
    except grpc.RpcError as e:
        status = grpc.StatusCode
        return e.code() not in (status.UNAVAILABLE, status.UNIMPLEMENTED, status.DEADLINE_EXCEEDED)
    return True


def cache_every_process() -> None:
    """Lets each process write what it compiles to JAX's compilation cache, where its key is its own.

    JAX lets the first process alone write: on GPU and TPU the key is the same for all. On CPU it is not, and the
    others would compile for minutes at every start (`compiler._cache_write`, `cache_key.get`). JAX 0.10 also hands over
    the callbacks to the host that a program has, and such a program is not to be kept.
    """
    from jax._src import compilation_cache, compiler, config

    def write(key, seconds, name, client, executable, host_callbacks=()):
        if not host_callbacks and seconds >= config.persistent_cache_min_compile_time_secs.value:
            compilation_cache.put_executable_and_time(key, name, executable, client, int(seconds))

    compiler._cache_write = write
