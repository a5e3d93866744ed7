"""The private names of Ray and JAX that cluster/private.py uses are there, and work, on the installed versions."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import ray

from cluster import private, xla_flags

INSTALLED = f"ray {ray.__version__}, jax {jax.__version__}"


def test_what_is_private_was_checked_on_the_installed_versions():
    for package, checked in private.CHECKED.items():
        version = {"ray": ray.__version__, "jax": jax.__version__}[package]
        assert version.startswith(tuple(f"{v}." for v in checked)), f"checked on {package} {checked}: {INSTALLED}"


@pytest.mark.parametrize(
    "owner, name, parameters",
    [
        (private.DataParallelTrainer, "_create_default_callbacks", ["self"]),
        (private.DataParallelTrainer, "_initialize_and_run_controller", ["self", "controller_init_kwargs"]),
        (private.DefaultFailurePolicy, "make_decision", ["self", "training_failed_error"]),
        (private.ElasticScalingPolicy, "_count_possible_workers", None),
        (private.FixedScalingPolicy, "_send_resource_request", ["self"]),
        (private.FixedScalingPolicy, "_maybe_send_resource_request", ["self"]),
        (private.FixedScalingPolicy, "_cancel_resource_request", ["self"]),
        (private.train_context, "get_train_context", []),
    ],
)
def test_a_method_is_there_with_its_parameters(owner, name, parameters):
    found = getattr(owner, name, None)
    assert callable(found), f"{name} is gone from {owner} in {INSTALLED}"
    if parameters is not None:
        assert [p.lstrip("*") for p in inspect.signature(found).parameters] == parameters, INSTALLED


def test_failures_say_what_of_them_is_whose():
    error = private.WorkerGroupError("dead", {3: ValueError("why")})
    assert isinstance(error, private.TrainingFailedError) and list(error.worker_failures) == [3]
    cause = private.WorkerGroupStartupTimeoutError(4)
    assert private.ControllerError(cause).controller_failure is cause and cause.num_workers == 4
    assert isinstance(private.WorkerGroupStartupFailedError("why"), Exception)
    assert {"RETRY", "RAISE"} <= set(private.FailureDecision.__members__)


def test_a_context_of_a_worker_has_a_place_for_notices():
    source = Path(private.train_context.__file__).read_text()
    assert "preemption_context" in source, INSTALLED


def test_rays_folder_is_by_its_variables(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/a")
    assert private.temp_dir() == "/a/ray"


def test_jaxs_cache_is_written_by_the_function_that_is_replaced(monkeypatch):
    from jax._src import compilation_cache, compiler, config

    before = compiler._cache_write
    monkeypatch.setattr(compiler, "_cache_write", before)  # and put back
    private.cache_every_process()
    assert list(inspect.signature(compiler._cache_write).parameters) == [
        "key",
        "seconds",
        "name",
        "client",
        "executable",
        "host_callbacks",
    ]
    # JAX 0.10 hands over the callbacks to the host too, and newer ones do not.
    assert len(inspect.signature(before).parameters) == (6 if jax.__version__.startswith("0.10.") else 5), INSTALLED
    assert (
        callable(compilation_cache.put_executable_and_time) and config.persistent_cache_min_compile_time_secs.value >= 0
    )


@pytest.mark.parametrize("flags, ends_well", [("", True), ("--xla_no_such_flag=1", False)])
def test_jaxlib_reads_xla_flags_where_it_is_asked_to(flags, ends_well):
    said = subprocess.run(
        [sys.executable, "-c", xla_flags.READ], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert (said.returncode == 0) == ends_well, (INSTALLED, said)
