"""What machines and their environment variables do to a run: a sentence with the remedy, or it works."""

import contextlib
import logging
import os
import socket
import sys
from concurrent import futures
from pathlib import Path

import grpc
import jax
import pytest
import ray
from jax.errors import JaxRuntimeError

from cluster import address, backend, jax_errors, placement, places, private, proxies, session, xla_flags
from cluster.host import ClusterError
from cluster.job import Job, Request
from ifvit import cli, commands


@pytest.fixture
def proxy(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):  # so that they are put back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


# ---- the devices that JAX is told to use


@pytest.mark.parametrize("platforms, name", [("cuda", "ifvit.train_dense"), ("nonsense", "ifvit.train_all")])
def test_a_platform_that_is_not_there_is_named_with_the_variable(process, tmp_path, platforms, name):
    said = process("-m", name, "--dataset_root", "synthetic", cwd=tmp_path, JAX_PLATFORMS=platforms)
    assert said.code == 2 and said.err.startswith(
        f"Error: JAX_PLATFORMS={platforms} gives JAX no device on this machine"
    ), said
    assert "unset JAX_PLATFORMS or set it to cpu" in said.err and "Traceback" not in said.out + said.err


@pytest.mark.parametrize(
    "error, told",
    [
        (
            RuntimeError(
                "Unable to initialize backend 'cuda': FAILED_PRECONDITION: No visible GPU devices. "
                "(set JAX_PLATFORMS='' to …)"
            ),
            "gives JAX no device on this machine (FAILED_PRECONDITION: No visible GPU devices; "
            "CUDA_VISIBLE_DEVICES is empty); unset",
        ),
        (
            RuntimeError(
                "Backend 'cuda' failed to initialize: Outdated cuDNN installation found.\nInstalled version: 8907"
            ),
            "(Outdated cuDNN installation found. Installed version: 8907; CUDA_VISIBLE_DEVICES is empty); "
            "unset JAX_PLATFORMS",
        ),
        (
            RuntimeError(
                "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 77."
            ),
            "Another process has the TPU. End it",
        ),
        (
            JaxRuntimeError("INTERNAL: Failed to open /p.so: /p.so: cannot open shared object file"),
            "unset JAX_PLATFORMS or set it to cpu",
        ),
    ],
)
def test_what_jax_says_of_devices_is_told_with_a_remedy(monkeypatch, error, told):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, message = cli.outcome(raising(error))
    assert code == 2 and told in message and "(set JAX_PLATFORMS=''" not in message, message


def raising(error: BaseException):
    def call():
        raise error

    return call


def test_a_plugin_that_cannot_be_loaded_is_a_line_and_the_run_goes_on(process, tmp_path):
    plugin = tmp_path / "jax_plugins/torn"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text("def initialize(): raise RuntimeError('Outdated cuDNN found\\nInstalled: 1')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    code = "from ifvit import cli; cli.prepare_output(); import jax; print(len(jax.devices('cpu')))"
    said = process("-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert said.out.endswith("\n1\n") and "Traceback" not in said.out + said.err, said
    assert "⚠" in said.out and "Outdated cuDNN found Installed: 1" in said.out, said


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--xla_no_such_flag=1", "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1"),
        ("--xla_force_host_platform_device_count=two", "Couldn't interpret value two"),
        ("no_such_file", 'Could not open file "no_such_file"'),
    ],
)
def test_flags_that_would_end_xla_are_told_before_they_do(monkeypatch, command, tmp_path, flags, told):
    monkeypatch.setenv("XLA_FLAGS", flags)
    said = command("checkpoint", "inspect", tmp_path, cwd=tmp_path)
    assert (
        said.code == 2 and f"XLA refuses XLA_FLAGS={flags} ({told}" in said.err and "unset the variable" in said.err
    ), said


def test_flags_that_xla_knows_are_none_of_our_business(monkeypatch):
    for flags in ("", "  ", "--xla_force_host_platform_device_count=2 --xla_cpu_enable_fast_math=false"):
        monkeypatch.setenv("XLA_FLAGS", flags)
        assert xla_flags.unfit() == ""


@pytest.mark.parametrize(
    "words", ["ifvit.evaluate --checkpoint nowhere --dataset_root nowhere", "tune", "ifvit.train_dense --preset smoke"]
)
def test_a_jaxlib_that_does_not_fit_jax_is_said_by_every_command(process, tmp_path, words):
    (tmp_path / "sitecustomize.py").write_text("import jaxlib.version\njaxlib.version.__version__ = '0.4.30'")
    said = process("-m", *words.split(), cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert said.code == 1 and said.err.startswith("Error: JAX cannot be imported (jaxlib is version 0.4.30, but"), said
    assert "in a fresh environment" in said.err and said.err.count("\n") == 1


def test_a_variable_that_jax_refuses_at_its_import_is_named(process, tmp_path):
    said = process("-m", "ifvit.train_dense", "--preset", "smoke", cwd=tmp_path, JAX_ENABLE_X64="perhaps")
    assert said.code == 1 and said.err.startswith("Error: JAX_ENABLE_X64=perhaps is nothing that JAX knows"), said


def test_a_worker_whose_jax_does_not_start_says_on_which_host(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    assert backend._unfit() == ""
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=2")
    assert backend._unfit().startswith("On host 10.0.0.7: XLA refuses XLA_FLAGS=--xla_no_such_flag=2")
    monkeypatch.setitem(sys.modules, "jax", None)  # the import fails
    assert backend._unfit().startswith("On host 10.0.0.7: JAX cannot be imported")


def test_rays_workers_have_the_devices_that_jax_platforms_names(monkeypatch):
    cpu, gpu = {"Resources": {"CPU": 8.0}}, {"Resources": {"CPU": 8.0, "GPU": 2.0}}
    for platforms, nodes, alone, kind in [
        ("", [cpu], True, "CPU"),
        ("", [cpu, gpu], False, "GPU"),
        ("cpu", [gpu], True, "CPU"),
        ("cpu", [cpu, gpu], False, "GPU"),  # of the driver's own host, which has none
        ("cuda", [cpu], True, "GPU"),
        ("cuda,cpu", [cpu], True, "CPU"),
        ("cpu,cuda", [gpu], True, "CPU"),
    ]:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert placement.kind_of_devices(nodes, alone) == kind, platforms
    monkeypatch.setenv("JAX_PLATFORMS", "metal")
    with pytest.raises(
        ClusterError, match="JAX_PLATFORMS=metal names metal, which Ray's workers cannot have; unset it, or set"
    ):
        placement.kind_of_devices([cpu], True)


def test_devices_that_jax_platforms_asks_for_and_no_host_has_are_told_with_the_variable(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}, "Labels": {}}])
    with pytest.raises(ClusterError, match="JAX_PLATFORMS=cuda asks for them: unset it, or start more hosts"):
        placement.placement(Request(num_workers="1"), alone=True)
    assert placement.placement(Request(devices="cpu"), alone=True).platform == "CPU"  # the flag wins


def test_a_worker_that_may_not_use_its_gpu_names_the_variable(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    code, message = cli.outcome(lambda: commands.check_backend("GPU", "host 7"))
    assert code == 2 and "host 7 has a GPU from Ray, and there JAX_PLATFORMS=cpu forbids it; unset that" in message


# ---- RAY_ADDRESS


@pytest.mark.parametrize(
    "given, means",
    [
        (None, "local"),
        ("", "local"),
        ("  ", "local"),
        ("local", "local"),
        (" auto\n", "auto"),
        ("10.0.0.1:6379 ", "10.0.0.1:6379"),
        ("head.cluster:6379", "head.cluster:6379"),
        ("[fd00::1]:6379", "[fd00::1]:6379"),
    ],
)
def test_an_address_as_people_set_it(monkeypatch, given, means):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert address.ray_address() == means
    assert Request().on_ray() == bool((given or "").strip())


@pytest.mark.parametrize(
    "given, why",
    [
        ("http://127.0.0.1:8265", "the address of Ray's dashboard"),
        ("https://head", "the address of Ray's dashboard"),
        ("ray://head:10001", "an address of Ray Client"),
        ("tcp://head:6379", "no address of a Ray cluster"),
        ("10.0.0.1", "has no port"),
        ("head", "has no port"),
        (":6379", "is not HOST:PORT"),
        ("head:port", "is not HOST:PORT"),
        ("head:70000", "is not HOST:PORT"),
        ("head:0", "is not HOST:PORT"),
        ("fd00::1:6379", "is not HOST:PORT"),
        ("a:1,b:1", "is not HOST:PORT"),
    ],
)
def test_what_is_no_address_is_said_at_once_with_every_remedy(monkeypatch, command, tmp_path, given, why):
    monkeypatch.setenv("RAY_ADDRESS", given)
    said = command("train_dense", "--dataset_root", "synthetic", cwd=tmp_path)
    assert said.code == 2 and said.err.startswith(f"Error: RAY_ADDRESS={given} ") and why in said.err, said
    assert "unset it, give HOST:6379 (what `ray start --head` prints), or --runtime local.\n" in said.err
    assert Request(runtime="local").on_ray() is False  # which is not kept from running


@pytest.mark.parametrize(
    "given, address, alone",
    [("  ", "local", True), ("local", "local", True), (" 10.0.0.1:6379\n", "10.0.0.1:6379", False)],
)
def test_ray_is_told_the_address_without_its_blanks_and_the_host_goes_past_proxies(proxy, given, address, alone):
    proxy.setenv("RAY_ADDRESS", given)
    proxy.setenv("http_proxy", "http://proxy:3128")
    seen = {}
    proxy.setattr(ray, "init", lambda **how: seen.update(how))
    proxy.setattr(ray, "shutdown", lambda: None)
    proxy.setattr(session, "_answers", lambda address: None)
    with session.session() as is_alone:
        assert (seen["address"], is_alone) == (address, alone)
        assert os.environ["RAY_ADDRESS"] == ("" if alone else address)
    assert ("10.0.0.1" in os.environ["no_proxy"].split(",")) != alone
    assert "localhost" in os.environ["no_grpc_proxy"]  # noqa: SIM112 (gRPC reads it so)


def test_auto_where_no_ray_runs(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", raising_with(ConnectionError("Could not find any running Ray instance.")))
    with (
        pytest.raises(ClusterError, match="RAY_ADDRESS=auto, and no Ray runs on this machine; start one"),
        session.session(),
    ):
        raise AssertionError("it is not connected")


def raising_with(error: BaseException):
    def call(*_, **__):
        raise error

    return call


@contextlib.contextmanager
def answering(method: str):
    """A gRPC server of this machine with one method; its HOST:PORT."""

    class Methods(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(lambda request, _: b"") if details.method == method else None

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[Methods()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_what_answers_and_is_not_rays_coordinator_is_told_before_ray_tries_for_minutes():
    with answering(private.ALIVE) as there:
        session._answers(there, seconds=0)
    with (
        answering("/ray.rpc.RayletDriver/Init") as there,
        pytest.raises(ClusterError, match=f"answers at RAY_ADDRESS={there} is not Ray's"),
    ):
        session._answers(there, seconds=0)


# ---- folders for sockets, shared memory


def long_folder(base: Path) -> Path:
    folder = base / ("d" * 90)
    folder.mkdir()
    return folder


def test_a_long_tmpdir_gives_way_to_a_short_folder_of_this_user_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder(tmp_path)))
    folder = Path(places.of_ray()["_temp_dir"])
    assert len(str(folder / places.SOCKET)) <= 107 and places.takes_sockets(folder)
    assert str(os.getuid()) in str(folder.parent) and folder.parent.stat().st_mode & 0o077 == 0
    assert f"Ray's sockets go to {folder}: " in capsys.readouterr().out


def test_a_tmpdir_that_is_not_there_or_is_no_folder_gives_way_too(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for tmpdir in (tmp_path / "nowhere", tmp_path / "file", "", "here"):
        monkeypatch.setenv("RAY_TMPDIR", str(tmpdir))
        assert "_temp_dir" in places.of_ray(), tmpdir
    assert not (tmp_path / "nowhere").exists()


def test_rays_own_folder_is_kept_where_it_will_do(monkeypatch, capsys):
    with short_folder() as folder:
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        assert "_temp_dir" not in places.of_ray() and capsys.readouterr().out == ""
        assert [p.name for p in folder.iterdir()] == ["ray"]
        assert not list((folder / "ray").iterdir())  # the probe is gone


@contextlib.contextmanager
def short_folder():
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:
        yield Path(folder)


def test_where_no_folder_will_do_the_remedy_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder(tmp_path)))
    monkeypatch.setattr(places, "_others", lambda: iter(()))
    with pytest.raises(
        ClusterError, match="Ray can have no sockets in .* set RAY_TMPDIR to a directory with a short name"
    ):
        places.of_ray()


def test_a_folder_that_somebody_else_has_made_is_not_taken(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4711)  # and what is made now is this test's user's
    made = [p for p in (Path("/tmp/ray-4711"), Path("/var/tmp/ray-4711")) if not p.exists()]
    try:
        assert list(places._others()) == []
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def test_little_or_no_shared_memory_puts_rays_objects_on_the_disk(monkeypatch):
    with short_folder() as folder:
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        monkeypatch.setattr(places, "_free_shared_memory", lambda: 10**9)
        assert places.of_ray() == {}
        monkeypatch.setattr(places, "_free_shared_memory", lambda: 64 * 2**20)  # a container's
        assert places.of_ray() == {"_plasma_directory": str(folder / "ray"), "object_store_memory": places.OBJECTS}


# ---- proxies


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy"])
def test_the_hosts_of_a_run_are_reached_without_the_proxy_which_stays_for_the_rest(proxy, name):
    proxy.setenv(name, "http://proxy:3128")
    proxy.setenv("NO_PROXY", ".corp, 10.0.0.9")
    proxies.reach_directly(["10.0.0.1", "10.0.0.2"])
    for variable in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        assert os.environ[variable] == ".corp,10.0.0.9,localhost,127.0.0.1,::1,10.0.0.1,10.0.0.2"
    assert os.environ[name] == "http://proxy:3128"
    proxies.reach_directly(["10.0.0.1"])
    assert os.environ["no_proxy"].count("10.0.0.1,") == 1


def test_what_is_excepted_for_all_stays_so(proxy):
    proxy.setenv("https_proxy", "http://proxy:3128")
    proxy.setenv("no_proxy", "*")
    proxies.reach_directly(["10.0.0.1"])
    assert os.environ["no_proxy"] == "*"
    assert "10.0.0.1" in os.environ["no_grpc_proxy"].split(",")  # noqa: SIM112 (gRPC reads it so)


def test_without_a_proxy_the_environment_stays_as_it_is(proxy):
    before = dict(os.environ)
    proxies.reach_directly(["10.0.0.1"])
    assert os.environ == before


def test_grpc_goes_past_a_dead_proxy_to_a_host_of_the_run(proxy):
    """To this machine's own address: the loopback is not what workers have."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{s.getsockname()[1]}"
    with answering("/a/b") as there:
        proxy.setenv("http_proxy", dead)
        call = lambda: grpc.insecure_channel(there).unary_unary("/a/b")(b"", timeout=5)
        with pytest.raises(grpc.RpcError):
            call()
        proxies.reach_directly([])
        assert call() == b""


# ---- what XLA says


@pytest.mark.parametrize(
    "said, told",
    [
        (
            "FAILED_PRECONDITION: DNN library initialization failed. Look at the errors above for more details.",
            "install the extra `cuda`",
        ),
        ("INTERNAL: cuSolver internal error", "nvidia-smi"),
        ("INTERNAL: Failed to initialize BLAS support", "another process has the GPU's memory"),
        (
            "UNKNOWN: CUDNN_STATUS_NOT_INITIALIZED\nin external/xla/xla/stream_executor/cuda/cuda_dnn.cc",
            "in a fresh environment",
        ),
        (
            "INTERNAL: cudaErrorInsufficientDriver : CUDA driver version is insufficient for CUDA runtime version",
            "Update the driver",
        ),
        ("INTERNAL: CUDA error: CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "Update the driver"),
        (
            "INTERNAL: failed to create context: CUDA_ERROR_DEVICE_UNAVAILABLE: "
            "all CUDA-capable devices are busy or unavailable",
            "Another process has the GPU",
        ),
        (
            "INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
            "has failed in the midst of its work",
        ),
        ("UNIMPLEMENTED: no kernel image is available for execution on the device", "JAX_PLATFORMS=cpu"),
        (
            "INTERNAL: NCCL operation ncclCommInitRank(&comm, nranks, id, rank) failed: unhandled system error",
            "NCCL_DEBUG=INFO",
        ),
        ("INTERNAL: Core halted unexpectedly", "The TPU has failed"),
        (
            "DEADLINE_EXCEEDED: Barrier timed out. Barrier_id: PjRT_Client_Connect. "
            "Timed out task names:\n/job:jax_worker/task:1",
            "Another process of the run",
        ),
        (
            "UNAVAILABLE: failed to connect to all addresses; "
            "last error: UNKNOWN: ipv4:10.0.0.1:4711: Connection refused",
            "every port has to be open",
        ),
        ("ABORTED: connect with a different incarnation", "The other hosts' logs say why"),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", "--set accumulate=4"),
    ],
)
def test_an_error_of_the_runtime_is_a_sentence_with_its_remedy(said, told):
    code, message = cli.outcome(raising(JaxRuntimeError(said)))
    assert code == 1 and told in message and said.splitlines()[0].rstrip(".") in message and "\n" not in message


@pytest.mark.parametrize(
    "error",
    [
        JaxRuntimeError("INTERNAL: Generated function failed: CpuCallback error: KeyError"),
        JaxRuntimeError("INVALID_ARGUMENT: shapes differ"),
        JaxRuntimeError("INTERNAL: RET_CHECK failure (xla/service/hlo_verifier.cc:77)"),
        RuntimeError("FAILED_PRECONDITION: DNN library of ours"),
        AssertionError(),
        AssertionError("Unable"),
        ValueError("UNAVAILABLE: it is"),
    ],
)
def test_an_error_that_is_not_known_stays_what_it_is(error):
    with pytest.raises(type(error)) as raised:
        cli.outcome(raising(error))
    assert raised.value is error


def test_what_another_start_may_mend_is_left_to_who_starts_again_and_the_rest_is_not():
    gone = JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
    with pytest.raises(JaxRuntimeError):
        cli.outcome(raising(gone), tried_again=True)
    assert (
        cli.outcome(
            raising(JaxRuntimeError("FAILED_PRECONDITION: DNN library initialization failed.")), tried_again=True
        )[0]
        == 1
    )


def test_a_run_that_is_given_up_says_what_can_be_done_about_its_workers_errors():
    from cluster import on_ray

    error = private.WorkerGroupError(
        "dead", {1: JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: unhandled cuda error")}
    )
    assert "NCCL_DEBUG=INFO tells why" in on_ray._remedy(error) and "JAX says" not in on_ray._remedy(error)
    assert on_ray._remedy(private.WorkerGroupError("dead", {0: ValueError("anything")})) == ""


def test_jaxs_log_keeps_what_is_no_traceback():
    record = logging.LogRecord("jax", logging.WARNING, "", 1, "a warning of %s", ("JAX",), None)
    assert jax_errors.in_one_line(record) and record.getMessage() == "a warning of JAX"
    assert jax.__version__  # its log is the one that the filter hangs on
    cli.prepare_output()
    assert jax_errors.in_one_line in logging.getLogger("jax._src.xla_bridge").filters


# ---- waiting for hosts


def test_hosts_that_do_not_come_are_asked_for_once_and_the_claim_is_given_back(monkeypatch):
    called = []
    monkeypatch.setattr(placement, "placement_group", lambda bundles, strategy: called.append(bundles) or "group")
    monkeypatch.setattr(placement, "remove_placement_group", called.append)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": False}])
    with pytest.raises(ClusterError, match="none; remedy"):
        placement.wait_for_hosts(
            lambda nodes: placement.Missing([{"CPU": 2}] * 3, "none; remedy") if not nodes else 1, 0.6
        )
    assert called == [[{"CPU": 2}] * 3, "group"]


def test_what_a_caller_calls_its_items_and_its_remedy_is_told():
    job = Job(None, "job", (15,), item="parcels", another_batch="fewer parcels")
    with pytest.raises(
        ClusterError,
        match="Batches of 15 parcels do not divide among 4 workers; use another --num_workers, or fewer parcels.",
    ):
        placement.Placement("CPU", {"CPU": 1.0}, (4, 4), True).fitting(job)
