"""A test bed: several hosts of a Ray cluster on this machine, and what befalls them; Linux, as root.

    python tests/testbed.py --hosts 2 -- python -m ifvit.train_all --preset smoke --dense_checkpoint_dir /DIR …

brings the hosts up, submits the words after `--` as a job, shows its log, ends with its exit code and takes
everything down. Tests drive `Testbed` itself.

A host is a network namespace with an address, cores, Ray processes and a folder of its own: the same port is free on
each, a cable can be pulled, and all that lives on one can be killed. The cables end in one more namespace, a switch, so
that nothing is said outside of the bed. Files, users and process ids are shared: /DIR is what a shared disk is
elsewhere.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMP = Path("/tmp")  # not TMPDIR: a socket's path has at most 107 characters, and Ray's part of it has 70
HOSTS_FILES = Path("/etc/netns")  # `ip netns exec NAME` puts what lies in NAME/ here over the files of /etc
SWITCH = "switch"
NAME = re.compile(rf"(bed(\d+)x\d+)-(?:\d+|{SWITCH})")  # a namespace's: bed, process that made it
ENDED = "SUCCEEDED", "FAILED", "STOPPED"
PATIENCE = 60  # seconds that nothing here needs, but for jobs
QUESTION = """if True:
    import sys, urllib.request
    method, url, token = sys.argv[1:]
    request = urllib.request.Request(url, method=method, headers={"Authorization": f"Bearer {token}"})
    print(urllib.request.urlopen(request, timeout=30).read().decode())
"""

_numbers = itertools.count()
_up: set[str] = set()  # names of the beds of this process


class Testbed:
    """Hosts 0 to `hosts` - 1, the first with Ray's head; up inside `with`.

    cpus: Ray's num_cpus of a host, which is bound to as many cores if there are enough for all.
    folder: where Ray's logs go in the end, host0/, host1/ and so on; they are removed if None.
    env: environment of Ray, and so of every driver and worker, over this process's and `self.env` below.
    """

    __test__ = False  # its name is like that of a class of tests

    def __init__(self, hosts: int = 2, cpus: int = 1, folder: Path | None = None, env: dict[str, str] | None = None):
        self.hosts, self.cpus, self.folder = hosts, cpus, folder
        self.name = f"bed{os.getpid()}x{next(_numbers)}"
        self.temp = TEMP / self.name  # a host's: temp/0, temp/1, …; its processes start there
        self.addresses = [f"10.77.0.{i + 1}" for i in range(hosts)]
        self.token = uuid.uuid4().hex
        self._jobs = itertools.count()
        cores = sorted(os.sched_getaffinity(0))
        self._cores = (
            [cores[i * cpus : (i + 1) * cpus] for i in range(hosts)] if hosts * cpus <= len(cores) else [cores] * hosts
        )
        outside = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and not k.lower().endswith("_proxy")}
        self.env = (
            outside
            | {
                "PATH": f"{Path(sys.executable).parent}:{outside['PATH']}",
                "PYTHONPATH": ":".join(filter(None, [str(ROOT), outside.get("PYTHONPATH")])),
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in conftest
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_MODE": "token",  # said here, else it hangs on ~/.ray/auth_token, which `ray.init()` writes
                "RAY_AUTH_TOKEN": self.token,
                # A host counts as dead 5 seconds after it was killed and 10 after it was cut off, not 14 and 29.
                "RAY_health_check_initial_delay_ms": "1000",
                "RAY_health_check_period_ms": "1000",
                "RAY_health_check_timeout_ms": "1000",
                "RAY_health_check_failure_threshold": "5",
            }
            | (env or {})
        )

    @staticmethod
    def available() -> str | None:
        """Why there can be no bed here; None where there can."""
        if not sys.platform.startswith("linux") or os.geteuid():
            return "network namespaces need Linux and root"
        if missing := [p for p in ("ip", "taskset") if not shutil.which(p)]:
            return f"no program {missing[0]}"
        bed = Testbed(hosts=1)
        try:
            bed.lay_cables()
            _ip("netns", "exec", bed.namespace(0), "true")
        except (OSError, RuntimeError) as e:
            return f"no network namespaces: {e}"
        finally:
            bed.down()
        return None

    # ---- up and down

    def __enter__(self) -> "Testbed":
        remove_dead()
        _up.add(self.name)
        try:
            self.lay_cables()
            for i in range(self.hosts):
                self.start_host(i)
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.down()

    def down(self) -> None:
        """Leaves nothing but the logs in `folder`."""
        for namespace in _namespaces(self.name):
            _kill(namespace)
        try:
            for i in range(self.hosts if self.folder else 0):
                for logs in sorted(self.temp.glob(f"{i}/session_2*/logs")):  # one for each time that the head started
                    shutil.copytree(logs, self.folder / f"host{i}", dirs_exist_ok=True)
        finally:
            _remove(self.name)
            _up.discard(self.name)

    def lay_cables(self) -> None:
        """The hosts without Ray."""
        switch = self.namespace(SWITCH)
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "name", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        self.temp.mkdir(mode=0o700)
        for i, address in enumerate(self.addresses):
            host, port = self.namespace(i), f"host{i}"
            _ip("netns", "add", host)
            # The machine's name is what gloo connects to; on 127.0.0.1 it would find nobody but itself.
            (HOSTS_FILES / host).mkdir(parents=True)
            (HOSTS_FILES / host / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
            (self.temp / str(i)).mkdir()
            _ip("link", "add", "name", "eth0", "netns", host, "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", switch, "link", "set", port, "master", "bridge0")
            _ip("-n", host, "link", "set", "lo", "up")
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")

    # ---- hosts

    def start_host(self, i: int) -> None:
        """Ray on host i, its cable plugged in; whatever still runs there is killed. Returns when it is a living node.

        Host 0 comes back as another cluster: the others have to be started after it.
        """
        self.kill_host(i)
        self.mend(i)
        # The address that it had before: a head that finds it here and among the processes, which are those of all
        # hosts, does not start beside itself.
        (self.temp / str(i) / "ray_current_cluster").unlink(missing_ok=True)
        head = f"{self.addresses[0]}:6379"
        role = (
            ["--address", head]
            if i
            else ["--head", "--port", "6379", "--include-dashboard", "true", "--dashboard-host", self.addresses[0]]
        )
        said = self.run(
            i,
            [
                "ray",
                "start",
                *role,
                "--node-ip-address",
                self.addresses[i],
                "--num-cpus",
                str(self.cpus),
                "--object-store-memory",
                "150000000",
                "--temp-dir",
                str(self.temp / str(i)),
            ],
        )
        if said.returncode:
            raise RuntimeError(f"host {i} did not start\n{said.stdout}\n{said.stderr}")

        def there() -> bool:
            with contextlib.suppress(RuntimeError):  # the head's web server comes up a moment later
                return self.alive().count(self.addresses[i]) == 1  # 2: who died there has not yet been missed
            return False

        until(there, f"host {i} among the living")

    def kill_host(self, i: int) -> None:
        """SIGKILL to all that runs on host i. Its kernel lives, and closes their connections.

        A machine that loses its power does not do that: `cut` it before.
        """
        _kill(self.namespace(i))

    def stop_host(self, i: int) -> None:
        """SIGTERM to all that runs on host i, as when it is shut down; SIGKILL to what is left after ten seconds."""
        for pid in _pids(self.namespace(i)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            until(lambda: not _pids(self.namespace(i)), "", patience=10)
        self.kill_host(i)

    def cut(self, i: int) -> None:
        """Pulls host i's cable out of the switch: it keeps its address, and what is sent to it or by it is lost."""
        _ip("-n", self.namespace(SWITCH), "link", "set", f"host{i}", "down")

    def mend(self, i: int) -> None:
        _ip("-n", self.namespace(SWITCH), "link", "set", f"host{i}", "up")

    def alive(self) -> list[str]:
        """Addresses of the nodes that the head thinks are alive; RuntimeError if it does not answer."""
        return sorted(self._nodes())

    def _nodes(self) -> dict[str, str]:
        """The living nodes: address -> Ray's id."""
        nodes = self._ask("GET", "/api/v0/nodes")["data"]["result"]["result"]
        return {node["node_ip"]: node["node_id"] for node in nodes if node["state"] == "ALIVE"}

    def drain(self, i: int, seconds: float) -> None:
        """Tells Ray that host i will be taken away in so many seconds, as clouds do; it is still there then."""
        said = self.run(
            0,
            [
                "ray",
                "drain-node",
                "--address",
                f"{self.addresses[0]}:6379",
                "--node-id",
                self._nodes()[self.addresses[i]],
                "--reason",
                "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message",
                "the test bed takes it",
                "--deadline-remaining-seconds",
                str(int(seconds)),
            ],
        )
        if said.returncode:
            raise RuntimeError(f"host {i} could not be drained\n{said.stdout}\n{said.stderr}")

    def hosts_alive(self) -> int:
        return len(self.alive())

    def processes(self, i: int, pattern: str = "") -> list[int]:
        """Those on host i whose command line the pattern is found in; actors are named `ray::CLASS`."""
        found = []
        for pid in _pids(self.namespace(i)):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found += [pid] if re.search(pattern, line) else []
        return found

    def command(self, i: int, words: list) -> list[str]:
        """The words that run `words` on host i, for who wants to start a process with `self.env` without waiting."""
        cores = ",".join(map(str, self._cores[i]))
        return ["ip", "netns", "exec", self.namespace(i), "taskset", "--cpu-list", cores, *map(str, words)]

    def run(self, i: int, words: list, timeout: float = PATIENCE, **env) -> subprocess.CompletedProcess:
        """Runs a command on host i, in its folder, where its temporary files go too. Ctrl-C does not reach it."""
        folder = self.temp / str(i)
        return subprocess.run(
            self.command(i, words),
            cwd=folder,
            env=self.env | {"TMPDIR": str(folder)} | env,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,
        )

    # ---- jobs

    def submit(
        self, words: list, env: dict[str, str] | None = None, working_dir: Path | None = None, wait: bool = False
    ) -> str:
        """`ray job submit`, said on host 0, where the driver runs too; the job's id, after its end with `wait`.

        Without a working_dir, which is sent to all hosts, a process starts in its host's folder: paths are absolute.
        """
        job = f"{self.name}-{next(self._jobs)}"
        where = ["--working-dir", working_dir] if working_dir else []
        said = self.run(
            0,
            [
                "ray",
                "job",
                "submit",
                "--address",
                f"http://{self.addresses[0]}:8265",
                "--no-wait",
                "--submission-id",
                job,
                "--runtime-env-json",
                json.dumps({"env_vars": env or {}}),
                *where,
                "--",
                *words,
            ],
        )
        if said.returncode:
            raise RuntimeError(f"the job was not taken\n{said.stdout}\n{said.stderr}")
        if wait:
            self.wait(job)
        return job

    def status(self, job: str) -> str:
        """PENDING, RUNNING, or one of ENDED."""
        return self._ask("GET", f"/api/jobs/{job}")["status"]

    def exit_code(self, job: str) -> int | None:
        """The driver's; None while it runs, and where it was stopped or never ran."""
        return self._ask("GET", f"/api/jobs/{job}")["driver_exit_code"]

    def logs(self, job: str) -> str:
        """What the job has said so far; from its file, which is there when the head is not."""
        files = self.temp.glob(f"0/session_2*/logs/job-driver-{job}.log")
        return "".join(f.read_bytes().decode(errors="replace") for f in files)

    def wait(self, job: str, timeout: float = 600) -> str:
        """Its status when it has ended."""
        try:
            until(lambda: self.status(job) in ENDED, f"end of the job {job}", timeout, every=0.5)
        except TimeoutError as e:
            raise TimeoutError(f"{e}\n{self.logs(job)[-4000:]}") from None
        return self.status(job)

    def stop(self, job: str) -> None:
        """Asks for SIGTERM to its driver, and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S, 3 seconds; `wait` for the end."""
        self._ask("POST", f"/api/jobs/{job}/stop")

    def _ask(self, method: str, path: str):
        """The answer of Ray's web server. A bare Python asks in 50 ms, with `import ray` it would be a second."""
        url = f"http://{self.addresses[0]}:8265{path}"
        said = self.run(0, [sys.executable, "-IS", "-c", QUESTION, method, url, self.token])
        if said.returncode:
            raise RuntimeError(f"no answer to {method} {path}: {said.stderr.strip().splitlines()[-1]}")
        return json.loads(said.stdout)

    def namespace(self, which: int | str) -> str:
        return f"{self.name}-{which}"


# ---- namespaces, of this bed and of others


def _ip(*words: str) -> str:
    """What `ip WORDS` prints; RuntimeError with what it complains of."""
    said = subprocess.run(["ip", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if said.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {said.stderr.strip()}")
    return said.stdout


def _namespaces(bed: str) -> list[str]:
    return [n for n in _ip("netns", "list").split() if (found := NAME.fullmatch(n)) and found[1] == bed]


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", namespace).split()]


def lives(pid: int | str) -> bool:
    """Whether a process is there, and not dead and waiting for its parent, which may take init some seconds."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def _kill(namespace: str) -> None:
    def none_left() -> bool:
        pids = _pids(namespace)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    until(none_left, f"end of the processes in {namespace}", every=0.05)  # more than once: one may be forking just now


def _remove(name: str) -> None:
    """All that bears the name of a bed."""
    for namespace in _namespaces(name):
        _kill(namespace)
        _ip("netns", "del", namespace)
    for folder in HOSTS_FILES.glob(f"{name}-*"):
        shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # not there, or somebody else's files are
        HOSTS_FILES.rmdir()
    shutil.rmtree(TEMP / name, ignore_errors=True)


def remove_dead() -> None:
    """Beds whose process is gone, or was another one of our number."""
    names = [*_ip("netns", "list").split(), *(p.name for p in HOSTS_FILES.glob("*"))]
    for found in filter(None, map(NAME.fullmatch, names)):
        mine = int(found[2]) == os.getpid()
        if (mine and found[1] not in _up) or not lives(found[2]):
            _remove(found[1])


def until(holds: Callable[[], bool], what: str, patience: float = PATIENCE, every: float = 0.2) -> None:
    """Returns when `holds`; TimeoutError, which tells `what` was waited for, after `patience` seconds."""
    end = time.monotonic() + patience
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {patience:.0f} s for {what}")
        time.sleep(every)


# ---- the command


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a command as a Ray job on several hosts made on this machine.")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of each host (default: 1)")
    parser.add_argument("--logs", type=Path, help="folder for Ray's logs; they are removed without it")
    parser.add_argument("words", nargs="+", metavar="-- WORD", help="the command")
    args = parser.parse_args()
    if reason := Testbed.available():
        parser.error(reason)

    def leave(number, _):
        for n in (signal.SIGINT, signal.SIGTERM):  # a second one would leave things behind
            signal.signal(n, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for n in (signal.SIGINT, signal.SIGTERM):
        signal.signal(n, leave)
    with Testbed(args.hosts, args.cpus, args.logs) as bed:
        print(f"{args.hosts} hosts: {', '.join(bed.addresses)}", flush=True)
        job, shown, status = bed.submit(args.words), 0, ""
        while status not in ENDED:
            time.sleep(1)
            status = bed.status(job)  # before the log: it is whole when the job has ended
            log = bed.logs(job)
            print(log[shown:], end="", flush=True)
            shown = len(log)
        code = bed.exit_code(job)
        print(f"{status}, exit code {code}", flush=True)
    return 1 if code is None else code % 256


if __name__ == "__main__":
    sys.exit(main())
