"""Several hosts on this machine: Ray sees them as such, they come and go, and nothing of them is left."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import testbed
from testbed import HOSTS_FILES, TEMP, Testbed, until

TASK_PER_NODE = """
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

@ray.remote
def address():
    import ifvit  # the repository is on every host's path
    return ray.util.get_node_ip_address()

ray.init(log_to_driver=False)
nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
print("addresses", *sorted(ray.get([address.options(scheduling_strategy=On(n, soft=False)).remote() for n in nodes])))
"""
# A bed without Ray, with a process on a host; then the maker dies.
DIES = """
import os, subprocess, sys
sys.path[:] = sys.argv[1:]
from testbed import Testbed
bed = Testbed()
bed.lay_cables()
subprocess.Popen(bed.command(1, ["sleep", "600"]), stdout=subprocess.DEVNULL)
while not (asleep := bed.processes(1, "^sleep")):
    pass
print(bed.name, *asleep, flush=True)
os.kill(os.getpid(), 9)
"""
# A port that nobody listens on: who is there says so, who is not says nothing.
REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=2)
except ConnectionRefusedError:
    print("there")
except OSError:
    print("away")
"""


@pytest.fixture(scope="module")
def possible():
    if reason := Testbed.available():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def bed(possible, tmp_path_factory):
    with Testbed(hosts=2, folder=tmp_path_factory.mktemp("logs")) as up:
        yield up


def left(name: str) -> list:
    """What there is of a bed."""
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            lines.append(file.read_text(errors="replace"))
    return [
        *(s for s in spaces if s.startswith(f"{name}-")),
        *HOSTS_FILES.glob(f"{name}-*"),
        *TEMP.glob(name),
        *(line for line in lines if name in line),
    ]


def test_two_hosts_are_alive_each_at_its_address(bed):
    assert bed.alive() == bed.addresses
    assert bed.hosts_alive() == len(set(bed.addresses)) == 2
    assert bed.processes(0, "gcs_server") and not bed.processes(1, "gcs_server")
    assert bed.processes(1, "raylet/raylet")


def test_a_job_runs_on_both(bed):
    job = bed.submit(["python", "-c", TASK_PER_NODE], wait=True)
    assert f"addresses {' '.join(bed.addresses)}" in bed.logs(job)
    assert (bed.status(job), bed.exit_code(job)) == ("SUCCEEDED", 0)


def test_a_job_has_its_environment_and_its_files_and_tells_its_exit_code(bed, tmp_path):
    (tmp_path / "code").write_text("3")
    job = bed.submit(["bash", "-c", "echo I am $WHO; exit $(cat code)"], env={"WHO": "the job"}, working_dir=tmp_path)
    assert bed.wait(job) == "FAILED"
    assert "I am the job" in bed.logs(job)
    assert bed.exit_code(job) == 3


def test_a_job_is_stopped(bed):
    def sleeping() -> bool:
        return bool(bed.processes(0, "^sleep 600"))

    job = bed.submit(["sleep", "600"])
    until(sleeping, "its process")
    bed.stop(job)
    assert bed.wait(job) == "STOPPED"
    assert bed.exit_code(job) is None
    until(lambda: not sleeping(), "the end of its process")  # a child that was forked just then ends with Ray's watcher


def test_a_cut_host_is_away_until_mended(bed):
    def host_1() -> str:
        return bed.run(0, [sys.executable, "-c", REACH, bed.addresses[1]]).stdout.strip()

    assert host_1() == "there"
    bed.cut(1)
    assert host_1() == "away"
    bed.mend(1)
    assert host_1() == "there"


def test_a_killed_host_comes_back(bed):
    bed.kill_host(1)
    assert not bed.processes(1) and bed.processes(0, "gcs_server")
    bed.start_host(1)
    assert bed.alive() == bed.addresses
    bed.stop_host(1)
    assert not bed.processes(1)
    bed.start_host(1)
    assert bed.alive() == bed.addresses


def test_nothing_is_left(bed):
    assert left(bed.name)
    bed.down()
    assert left(bed.name) == []
    assert list(bed.folder.glob("host0/job-driver-*.log")) and (bed.folder / "host1/raylet.out").is_file()


def test_a_bed_whose_process_died_is_removed_at_the_next_start(possible):
    words = [sys.executable, "-c", DIES, *sys.path]
    said = subprocess.run(words, text=True, stdout=subprocess.PIPE)
    name, asleep = said.stdout.split()
    assert said.returncode == -9 and len(left(name)) == 3 + 2 + 1  # namespaces, hosts files, its folder
    testbed.remove_dead()
    assert left(name) == [] and not testbed.lives(asleep)
