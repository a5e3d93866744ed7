"""How a job gets its processes: where they go, which devices they see, what is tried again, and what errors say."""

import contextlib
import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, ScalingConfig

from cluster import backend, launch, on_ray, placement, session, worker
from cluster.host import HUNG, INTERRUPTED, PREEMPTED, SAVE, ClusterError, Host
from cluster.job import Job, Request
from cluster.placement import Placement
from cluster.private import (
    ControllerError,
    FailureDecision,
    WorkerGroupError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from cluster.worker import Desk, Ended, Worker

# ---- where a run goes


@pytest.mark.parametrize("text, workers", [("", None), ("3", (3, 3)), ("1:4", (1, 4)), ("2:2", (2, 2))])
def test_a_number_of_workers_or_a_range(text, workers):
    assert Request(num_workers=text).workers() == workers


@pytest.mark.parametrize("text", ["0", "-1", "4:1", "two", "1:", "1:2:3", "1.5"])
def test_what_is_no_number_of_workers_is_a_mistake(text):
    with pytest.raises(ClusterError, match="neither a number from 1 on nor a range"):
        Request(num_workers=text).workers()


@pytest.mark.parametrize(
    "flag, value",
    [
        ("workers_per_host", -1),
        ("wait_for_hosts", float("nan")),
        ("max_failures", -1),
        ("hang_timeout", -0.5),
        ("coordinator_port", 65536),
    ],
)
def test_what_is_out_of_range_is_a_mistake(flag, value):
    with pytest.raises(ClusterError, match=f"--{flag} is {value}; give a number from 0 on"):
        Request(**{flag: value})


@pytest.mark.parametrize(
    "runtime, workers, address, ray_runs_it",
    [
        ("auto", "", None, False),
        ("auto", "1", None, False),
        ("auto", "2", None, True),
        ("auto", "1:2", None, True),
        ("auto", "", "10.0.0.1:6379", True),
        ("ray", "", None, True),
        ("local", "", "10.0.0.1:6379", False),
    ],
)
def test_ray_runs_it_in_a_job_or_with_several_workers_or_if_asked(monkeypatch, runtime, workers, address, ray_runs_it):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert Request(runtime=runtime, num_workers=workers).on_ray() == ray_runs_it


def test_local_and_several_workers_exclude_each_other():
    with pytest.raises(ClusterError, match="--runtime local is one process"):
        Request(runtime="local", num_workers="2").on_ray()


def test_without_ray_local_works_and_more_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    job = Job(lambda host: (0, f"{type(host).__name__} {host.rank}"), "here")
    assert launch.launch(lambda platform: job, Request()) == (0, "Host 0")
    with pytest.raises(ClusterError, match="Ray is not installed, and this run needs it; pip install"):
        launch.launch(lambda platform: job, Request(num_workers="2"))


def test_a_local_run_imports_no_ray(process, tmp_path):
    code = (
        "import sys; import ifvit.train_all; from cluster.launch import launch, Job, Request; "
        "launch(lambda p: Job(lambda h: (0, ''), 'x'), Request()); "
    )
    said = process("-c", code + "print([m for m in sys.modules if m.split('.')[0] == 'ray'])", cwd=tmp_path)
    assert said.out.strip() == "[]", said


def test_an_address_where_nobody_answers_is_said():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, and not listening
        address = f"127.0.0.1:{s.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"Nobody answers at RAY_ADDRESS={address}"):
            session._answers(address, seconds=0)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Version mismatch:\n  Ray: 2.60.0\n  Ray: 2.9.0"),
        ray.exceptions.AuthenticationError("Version mismatch: Ray: 2.60.0 Ray: 2.9.0"),
    ],
)
def test_a_cluster_that_refuses_this_process_is_said(monkeypatch, error):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(session, "_answers", lambda address: None)
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(error))
    with (
        pytest.raises(ClusterError, match="refuses this process: Version mismatch: Ray: 2.60.0 Ray: 2.9.0"),
        session.session(),
    ):
        raise AssertionError("it is not connected")


def test_sigterm_while_ray_starts_or_stops(monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "shutdown", lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(ray, "init", lambda **_: None)
    with session.session():
        pass  # its end is the run's, whatever comes then
    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(15))  # as its handler does
    with pytest.raises(SystemExit) as e, session.session():
        raise AssertionError("it is not connected")
    assert e.value.code == 75 and "the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_where_nothing_trains_ends_a_session_with_75(monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)))  # as it does
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as e, session.session():
        signal.raise_signal(signal.SIGTERM)
    assert e.value.code == 75 and "the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


# ---- where workers go


@pytest.mark.parametrize(
    "platform, request_, alone, strategy",
    [
        ("CPU", Request(), False, "SPREAD"),
        ("GPU", Request(workers_per_host=1), False, "SPREAD"),
        ("GPU", Request(workers_per_host=4), False, "PACK"),
        ("CPU", Request(), True, "PACK"),
        ("TPU", Request(), False, "PACK"),
    ],
)
def test_a_large_host_does_not_get_two_workers_where_each_host_is_to_have_one(platform, request_, alone, strategy):
    place = Placement(platform, {"CPU": 1.0, platform: 2.0}, (2, 2), True)
    assert on_ray._strategy(place, request_, alone) == strategy


def node(**resources):
    labels = resources.pop("labels", {})
    return {"Alive": True, "Resources": {"CPU": 8.0} | resources, "Labels": labels}


@pytest.fixture
def cluster_of(monkeypatch):
    monkeypatch.setattr(placement, "placement_group", lambda bundles, strategy: None)

    def set_nodes(*nodes):
        monkeypatch.setattr(ray, "nodes", lambda: list(nodes))

    return set_nodes


def test_a_worker_a_host_with_all_its_accelerators(cluster_of):
    cluster_of(node(), node(GPU=4.0), node(GPU=4.0))  # the first is the head
    place = placement.placement(Request(), alone=False)
    assert (place.platform, place.resources, place.workers) == ("GPU", {"CPU": 1.0, "GPU": 4.0}, (2, 2))


def test_several_workers_a_host_share_its_accelerators(cluster_of):
    cluster_of(node(GPU=8.0), node(GPU=8.0))
    place = placement.placement(Request(num_workers="4", workers_per_host=2), alone=False)
    assert (place.resources["GPU"], place.workers) == (4.0, (4, 4))


def test_hosts_without_accelerators_give_all_their_cores(cluster_of):
    cluster_of(node(CPU=0.0), node(CPU=2.0), node(CPU=4.0))
    place = placement.placement(Request(), alone=False)
    assert (place.platform, place.resources, place.workers) == ("CPU", {"CPU": 2.0}, (2, 2))


def test_on_this_machine_alone_the_workers_share_it(cluster_of):
    cluster_of(node(CPU=4.0))
    assert placement.placement(Request(num_workers="2"), alone=True).resources == {"CPU": 2.0}


def test_a_tpu_slice_is_known_by_its_labels(cluster_of):
    labels = {"ray.io/tpu-topology": "4x4", "ray.io/tpu-pod-type": "v6e-16"}
    cluster_of(node(), *[node(TPU=4.0, labels=labels)] * 4)
    place = placement.placement(Request(), alone=False)
    assert (place.platform, place.workers, place.topology, place.accelerator) == ("TPU", (4, 4), "4x4", "TPU-V6E")
    # Ray accepts these for a slice.
    ScalingConfig(
        num_workers=4,
        use_tpu=True,
        resources_per_worker=place.resources,
        topology=place.topology,
        accelerator_type=place.accelerator,
    )


def test_what_a_cluster_cannot_fit_is_said_with_what_is_asked_and_what_there_is(cluster_of):
    cluster_of(node(GPU=4.0), node(GPU=4.0))
    with pytest.raises(ClusterError) as e:
        placement.placement(Request(num_workers="3", wait_for_hosts=0), alone=False)
    assert (
        "asks for 3 workers, 1 a host, each with at least one GPU and one CPU, and there are 2 × 8 CPU, 4 GPU"
        in str(e.value)
    )


def test_hosts_that_are_still_to_come_are_waited_for(monkeypatch):
    seen, called = iter([[node()], [node(), node(GPU=8.0)], [node(), node(GPU=8.0), node(GPU=8.0)]]), []
    monkeypatch.setattr(ray, "nodes", lambda: next(seen))
    monkeypatch.setattr(
        placement, "placement_group", lambda bundles, strategy: called.append((bundles, strategy)) or "group"
    )
    monkeypatch.setattr(placement, "remove_placement_group", called.append)
    assert placement.placement(Request(num_workers="2", devices="gpu"), alone=False).workers == (2, 2)
    # an autoscaler was asked for two hosts, not for one that has two; and then no longer
    assert called == [([{"CPU": 1, "GPU": 1}] * 2, "STRICT_SPREAD"), "group"]


def test_a_host_whose_cores_are_nobodys_is_none(cluster_of):
    cluster_of(node(CPU=0.0, GPU=4.0), node(GPU=2.0))
    place = placement.placement(Request(), alone=False)
    assert (place.resources, place.workers) == ({"CPU": 1.0, "GPU": 2.0}, (1, 1))


@pytest.mark.parametrize("asked, devices, workers", [("1:4", 2.0, (1, 2)), ("2:3", 8.0, (2, 3)), ("1:2", 2.0, (1, 2))])
def test_a_range_on_this_machine_alone_takes_what_it_has(cluster_of, asked, devices, workers):
    cluster_of(node(CPU=devices))
    place = placement.placement(Request(num_workers=asked), alone=True)
    assert place.workers == workers and place.resources == {"CPU": devices // workers[1]}


def test_fewer_workers_than_divide_the_batch_are_no_cluster_for_it(cluster_of, monkeypatch):
    monkeypatch.setattr(on_ray, "session", lambda cores: contextlib.nullcontext(False))
    job = lambda platform: Job(None, "job", (16,))
    cluster_of(*[node()] * 3)
    with pytest.raises(ClusterError, match="asks for 4 workers, 1 a host, .* there are 3 × 8 CPU"):
        on_ray.run(job, Request(num_workers="3:4", wait_for_hosts=0))
    cluster_of(*[node()] * 4)
    monkeypatch.setattr(on_ray, "run_connected", lambda job, request, place, alone, host: place.workers)
    assert on_ray.run(job, Request(num_workers="3:4", wait_for_hosts=0)) == (4, 4)


def test_devices_that_are_named_are_waited_for_where_the_cluster_has_others(cluster_of):
    cluster_of(node(GPU=4.0), node(GPU=4.0))
    assert placement.placement(Request(devices="cpu"), alone=False).resources == {"CPU": 8.0}
    with pytest.raises(ClusterError, match="each with at least one TPU and one CPU, and there are 2 × 8 CPU"):
        placement.placement(Request(devices="tpu", wait_for_hosts=0), alone=False)


@pytest.mark.parametrize(
    "gpus, workers, batches, fits",
    [(1, 4, (16,), True), (1, 3, (16,), False), (4, 4, (16,), True), (8, 4, (16,), False), (1, 4, (16, 6), False)],
)
def test_workers_have_to_divide_every_batch(gpus, workers, batches, fits):
    assert Placement("GPU", {"GPU": float(gpus)}, (1, 8), False).fits(workers, batches) == fits


SIXTEEN = Job(None, "job", (16,), item="pairs", another_batch="a --batch_size that is a multiple")


def test_as_many_workers_as_divide_the_batch_or_a_mistake_where_another_number_was_asked():
    cores = Placement("CPU", {"CPU": 1.0}, (3, 3), False)
    assert cores.fitting(SIXTEEN).workers == (2, 2)
    with pytest.raises(
        ClusterError, match="Batches of 16 pairs do not divide among 3 workers; .*or a --batch_size that is a multiple"
    ):
        Placement("CPU", {"CPU": 1.0}, (3, 3), True).fitting(SIXTEEN)
    assert Placement("CPU", {"CPU": 1.0}, (1, 7), True).fitting(SIXTEEN).workers == (1, 4)


def test_a_range_takes_the_most_that_divide_the_batch(monkeypatch):
    policy = on_ray.ScalingPolicy(
        ScalingConfig(num_workers=(1, 8)), Placement("CPU", {"CPU": 1.0}, (1, 8), True), (16,)
    )
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": str(n), "Alive": n < 8} for n in range(20)])
    there = lambda hosts: policy._count_possible_workers({str(n): {"CPU": 1.0} for n in range(hosts)})
    monkeypatch.setattr(on_ray.ElasticScalingPolicy, "_count_possible_workers", lambda self, hosts: len(hosts))
    assert [there(n) for n in range(9)] == [0, 1, 2, 2, 4, 4, 4, 4, 8]
    assert there(20) == 8  # twelve of them are gone


# ---- what is tried again


@pytest.fixture
def policy(monkeypatch):
    desk = Desk()
    handle = SimpleNamespace(furthest=SimpleNamespace(remote=desk.furthest))
    monkeypatch.setattr(ray, "get", lambda value: value)
    return on_ray.FailurePolicy(FailureConfig(max_failures=-1), handle, 2), desk


def died(error=None):
    return WorkerGroupError("a worker has died", {0: error or RuntimeError("gone")})


def test_failures_are_tried_again_until_nothing_has_got_on(policy):
    policy, _ = policy
    decide = lambda: policy.make_decision(died())
    assert [decide(), decide(), decide()] == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]


def test_failures_between_new_checkpoints_are_tried_again_for_ever(policy):
    policy, desk = policy
    for _ in range(20):
        assert policy.make_decision(died()) == FailureDecision.RETRY
        desk.got_on()


def test_a_jobs_own_end_is_not_tried_again(policy):
    assert policy[0].make_decision(died(Ended(2, "a mistake"))) == FailureDecision.RAISE


def test_a_start_of_jaxs_processes_that_failed_is_tried_again(policy):
    error = ControllerError(RayTaskError("_start", "timed out", TimeoutError()))
    assert policy[0].make_decision(error) == FailureDecision.RETRY


def test_workers_that_do_not_start_are_not_tried_for_ever_and_room_is_waited_for(policy, monkeypatch, capsys):
    policy, _ = policy
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0, "memory": 5e9})
    full = ControllerError(WorkerGroupStartupTimeoutError(4))
    assert [policy.make_decision(full) for _ in range(9)] == [FailureDecision.RETRY] * 9
    assert capsys.readouterr().out.count("no room for 4 workers at present (free: 1 CPU)") == 9
    dead = ControllerError(WorkerGroupStartupFailedError("the worker died"))
    assert [policy.make_decision(dead) for _ in range(3)] == [FailureDecision.RETRY] * 2 + [FailureDecision.RAISE]
    assert "could not be started: the worker died" in capsys.readouterr().out


# ---- JAX's processes


def test_a_difference_of_versions_names_hosts_and_package():
    same = {"python": "3.11", "jax": "0.10.2"}
    assert backend._difference(["a", "b"], [same, same]) == ""
    said = backend._difference(["10.0.0.1", "10.0.0.2"], [same, same | {"jax": "0.9.0"}])
    assert said == "jax is 0.9.0 on 10.0.0.2 and 0.10.2 on 10.0.0.1; install the same version on every host."


def test_versions_are_those_installed():
    import jax

    assert backend._versions(("jax", "no-such-package"))["jax"] == jax.__version__
    assert backend._versions(("no-such-package",))["no-such-package"] == "none installed"


def test_a_port_that_is_taken_is_said(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        assert f"Port {port} of 10.0.0.1 cannot be had for JAX's coordinator" in backend._coordinator(port)[2]
    address, port, why = backend._coordinator(0)
    assert address == "10.0.0.1" and port > 0 and why == ""


def test_workers_of_several_tpu_slices_are_told_their_slice(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda value: value)
    started = []
    member = lambda rank: SimpleNamespace(
        metadata=SimpleNamespace(node_ip=f"10.0.0.{rank}"),
        distributed_context=SimpleNamespace(local_rank=0, local_world_size=1),
        execute_async=lambda fn, *args: started.append(args),
    )
    group = type(
        "Group",
        (),
        {
            "get_workers": lambda self: [member(rank) for rank in range(4)],
            "__len__": lambda self: 4,
            "execute": lambda self, fn, *args: [{"jax": "1"}] * 4,
            "execute_single": lambda self, rank, fn, *args: ("10.0.0.0", 7, ""),
            "get_worker_group_context": lambda self: SimpleNamespace(num_slices=2),
        },
    )()
    backend.JaxBackend().on_start(group, backend.JaxBackendConfig("TPU"))
    environments = [args[5] for args in started]
    assert [e["MEGASCALE_SLICE_ID"] for e in environments] == ["0", "0", "1", "1"]
    assert {e["MEGASCALE_NUM_SLICES"] for e in environments} == {"2"}
    assert [args[1:4] for args in started] == [("10.0.0.0:7", 4, rank) for rank in range(4)]


def look(folder: Path, host) -> tuple[int, str]:
    """A job that notes what its process sees."""
    import jax

    seen = {
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "processes": jax.process_count(),
        "process": jax.process_index(),
        "devices": jax.device_count(),
        "cores": sorted(os.sched_getaffinity(0)),
        "first": host.first_here,
        "name": host.name,
        "flag": os.environ.get("IFVIT_TEST"),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }
    (folder / f"{host.rank}.json").write_text(json.dumps(seen))
    return 0, ""


def look_then_err(folder: Path, host) -> tuple[int, str]:
    look(folder, host)
    return (2, "a mistake, and its remedy.") if host.rank == 1 else (0, "")


def with_gpus(monkeypatch, gpus):
    """Ray believes what it is told of a machine's GPUs; tests' own modules are found by its workers."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", functools.partial(ray.init, num_gpus=gpus, num_cpus=2, object_store_memory=10**8))


@pytest.mark.process
def test_two_one_gpu_workers_of_a_host_see_different_gpus(monkeypatch, tmp_path):
    with_gpus(monkeypatch, 2)
    monkeypatch.setenv("IFVIT_TEST", "passed on")
    job = Job(functools.partial(look, tmp_path), "look", (4,), variables=("IFVIT_",))
    assert launch.launch(lambda platform: job, Request(num_workers="2", devices="gpu")) == (0, "")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(s["gpus"] for s in seen) == ["0", "1"]
    assert [(s["processes"], s["process"], s["devices"]) for s in seen] == [(2, 0, 2), (2, 1, 2)]
    assert sorted(s["first"] for s in seen) == [False, True]
    assert [s["flag"] for s in seen] == ["passed on"] * 2
    assert [s["niceness"] for s in seen] == [os.getpriority(os.PRIO_PROCESS, 0)] * 2  # this process's, not Ray's 15
    assert all(f"process {rank}" in s["name"] for rank, s in enumerate(seen))


@pytest.mark.process
def test_cpu_workers_of_a_host_share_its_cores_and_a_mistake_on_one_ends_all(monkeypatch, tmp_path, capfd):
    with_gpus(monkeypatch, 0)
    job = Job(functools.partial(look_then_err, tmp_path), "err", (4,))
    code, message = launch.launch(lambda platform: job, Request(num_workers="2"))
    assert (code, message) == (2, "a mistake, and its remedy.")
    # On a machine that is too busy Ray may print a traceback of its own, too.
    said = "".join(capfd.readouterr())
    assert "Ended" not in said and "and its remedy" not in said, said
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    if len(os.sched_getaffinity(0)) > 1:
        assert not set(seen[0]["cores"]) & set(seen[1]["cores"])
    assert {s["gpus"] for s in seen} <= {None, ""}


# ---- the process itself


def test_signals_are_noted_while_it_can_be_stopped_and_no_longer(monkeypatch):
    host, before = Host(), signal.getsignal(signal.SIGTERM)
    with host.stoppable():
        assert host.asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert host.asked() == PREEMPTED
        os.kill(os.getpid(), signal.SIGINT)
        assert host.asked() == INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_thread_that_may_set_no_handlers_can_still_be_asked():
    host, asked = Host(), []

    def run():
        with host.stoppable():
            asked.append(host.asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [0]


def watched(body: str) -> subprocess.CompletedProcess:
    code = textwrap.dedent("""
        import time
        from cluster.host import watchdog
        steps = 0
        with watchdog(lambda: steps, 0.5, "host 7"):
        """) + textwrap.indent(textwrap.dedent(body), "    ")
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.process
def test_a_process_that_does_not_move_any_more_ends_itself():
    said = watched("steps += 1\ntime.sleep(30)")
    assert said.returncode == HUNG and "⚠ host 7 has not moved for 0.5 s" in said.stderr


@pytest.mark.process
def test_a_process_that_compiles_its_first_step_or_moves_on_is_left_alone():
    assert watched("time.sleep(2)").returncode == 0
    assert watched("for _ in range(8):\n    steps += 1\n    time.sleep(0.2)").returncode == 0


@pytest.fixture
def one_worker(monkeypatch):
    """A worker of Ray, without Ray: its context, and what the driver's desk says."""
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 2, get_local_rank=lambda: 0)
    inner = SimpleNamespace(preemption_context=SimpleNamespace(preemption_info=None))
    desk = Desk()
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(worker.train_context, "get_train_context", lambda: inner)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)  # and False again at the end, which ends its thread
    monkeypatch.setattr(worker, "LOOK", 0.01)
    handle = SimpleNamespace(
        asked=SimpleNamespace(remote=desk.asked),
        got_on=SimpleNamespace(remote=desk.got_on),
        begun=SimpleNamespace(remote=desk.begun),
        has_begun=SimpleNamespace(remote=desk.has_begun),
    )
    return Worker(Request(), handle), inner, desk


def until(holds) -> None:
    for _ in range(1000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


def test_a_notice_of_preemption_is_told_once(one_worker):
    worker, inner, _ = one_worker
    assert worker.asked() == 0
    inner.preemption_context.preemption_info = "node 3 goes at noon"
    until(lambda: worker._notices == 1)
    assert [worker.asked(), worker.asked()] == [SAVE, 0]
    inner.preemption_context.preemption_info = "node 4 goes too"
    until(lambda: worker._notices == 2)
    assert worker.asked() == SAVE


def test_what_a_worker_has_begun_those_that_stand_in_for_it_know(one_worker):
    worker, _, desk = one_worker
    assert not worker.has_begun("/run")
    worker.begun("/run")
    assert worker.has_begun("/run") and not worker.has_begun("/other") and desk.has_begun("/run")


def test_what_the_driver_is_told_reaches_the_workers(one_worker):
    worker, _, desk = one_worker
    desk.ask(PREEMPTED)
    until(lambda: worker.asked() == PREEMPTED)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may lower a niceness")
@pytest.mark.process
@pytest.mark.parametrize("chosen, niceness", [({}, {0}), ({"RAY_worker_niceness": "15"}, {15})])
def test_a_worker_that_ray_has_put_behind_all_others_is_as_important_as_they_are_unless_that_was_chosen(
    chosen, niceness
):
    code = """if True:
        import os, threading
        from cluster.cores import as_important_as_others
        os.nice(15 - os.nice(0))
        waiting = threading.Event()
        threading.Thread(target=waiting.wait, daemon=True).start()
        as_important_as_others()
        print({os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir("/proc/self/task")})
    """
    env = {k: v for k, v in os.environ.items() if k != "RAY_worker_niceness"} | chosen
    said = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert said.stdout.strip() == str(niceness), said


@pytest.mark.process
def test_processes_that_claim_cores_get_different_ones_and_give_them_back_when_they_die(monkeypatch, tmp_path):
    code = (
        "import os, sys; from cluster.cores import claim; "
        "print(claim(1), len(os.sched_getaffinity(0)), flush=True); sys.stdin.read()"
    )
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    cores = len(os.sched_getaffinity(0))
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", code], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    processes = [start() for _ in range(cores)]
    said = [p.stdout.readline().strip() for p in processes]
    assert len(set(said)) == cores and all(s.endswith("} 1") for s in said)
    late = start()
    assert late.stdout.readline().strip() == f"set() {cores}"  # nothing is left, nothing is pinned
    processes[0].kill()
    processes[0].wait()
    again = start()
    assert again.stdout.readline().strip() == said[0]
    for p in (*processes, late, again):
        p.kill()
        p.wait()
