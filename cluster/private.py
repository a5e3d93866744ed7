"""Private names of Ray and JAX: what each is for, and on which versions that was checked.

There is no public substitute for these. `tests/cluster/test_private.py` tells whether they are there on the installed
versions. After an upgrade read the code behind each name before you change CHECKED. One more private name, which asks
jaxlib about XLA_FLAGS, is in xla_flags.py, because that module must not need Ray.
"""

import grpc
import ray

# Where Ray puts its sockets if nobody says otherwise, by RAY_TMPDIR and TMPDIR.
from ray._common.utils import get_default_ray_temp_dir as temp_dir

# These start processes that are of no use to a run: one for Ray Data's datasets, one that asks a dashboard whether the
# controller lives.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# The first: the workers could not be started. The second: the cluster had no room for them.
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

# For a worker's `get_train_context().preemption_context.preemption_info`. The public get_preemption_info is a barrier.
from ray.train.v2._internal.execution import context as train_context

# These answer a failure. Ray's own policy counts all failures of a run, ours those in a row without a checkpoint.
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

# These choose how many workers there are (`_count_possible_workers`), and ask an autoscaler for hosts. A Ray of this
# machine alone has no autoscaler.
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy

# It takes the classes above, in `_create_default_callbacks` and `_initialize_and_run_controller`.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

# What `fit` raises: `controller_failure`, `worker_failures`.
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

CHECKED = {"ray": ("2.60",), "jax": ("0.10", "0.12")}

NODE_ID_LABEL = ray._raylet.RAY_NODE_ID_KEY  # the label that keeps an actor on the driver's node
# For `ray.init`: a Ray without a dashboard needs no metrics and no task events.
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
    """Whether Ray's coordinator listens at HOST:PORT. `ray.init` would need two minutes to find out.

    Any answer of the coordinator counts, also that it refuses this process (which has no token).
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

    JAX lets only the first process write, because on GPU and TPU the key is the same for all. On CPU each process has a
    key of its own, and the others would compile for minutes at every start (`compiler._cache_write`, `cache_key.get`).
    JAX 0.10 also passes the callbacks to the host that a program has; such a program must not be kept.
    """
    from jax._src import compilation_cache, compiler, config

    def write(key, seconds, name, client, executable, host_callbacks=()):
        if not host_callbacks and seconds >= config.persistent_cache_min_compile_time_secs.value:
            compilation_cache.put_executable_and_time(key, name, executable, client, int(seconds))

    compiler._cache_write = write
