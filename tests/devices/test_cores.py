"""The cores that a job was given, not those of its node."""

import os

import pytest

from ifvit.devices import cores as module
from ifvit.devices.cores import cores


@pytest.fixture
def node(monkeypatch, tmp_path):
    """A node of 64 cores, all of them allowed, without groups: node(FILE=CONTENT, …) writes control groups' files."""
    for name in module.GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "process_cpu_count", lambda: len(os.sched_getaffinity(0)), raising=False)
    monkeypatch.setattr(module, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(module, "OF_THIS_PROCESS", tmp_path / "self")
    (tmp_path / "cgroup").mkdir()

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "self").write_text(own)
        for name, content in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(content)

    return write


def test_without_limits_all_cores_are_there(node):
    assert cores() == 64


def test_a_job_bound_to_three_cores_has_three(node, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 7, 9})
    assert cores() == 3


@pytest.mark.parametrize(
    "own, files, count",
    [
        ("0::/job\n", {"job/cpu.max": "250000 100000\n"}, 3),  # 2.5 cores, rounded up
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),  # of a group above
        ("0::/not/seen\n", {"cpu.max": "50000 100000\n"}, 1),  # within a container
        ("0::/job\n", {"job/cpu.max": "max 100000\n"}, 64),
        (
            "4:cpu,cpuacct:/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "200000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("4:cpu,cpuacct:/docker/1\n", {"cpu/cpu.cfs_quota_us": "600000", "cpu/cpu.cfs_period_us": "100000"}, 6),
        (
            "4:cpu,cpuacct:/job\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "-1", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            64,
        ),
        ("7:memory:/job\n", {"memory/job/cpu.max": "100000 100000"}, 64),
    ],
)
def test_a_containers_quota_counts_rounded_up(node, own, files, count):
    node(own, files)
    assert cores() == count


@pytest.mark.parametrize("variable", module.GIVEN)
def test_a_job_that_nothing_binds_has_what_it_was_given(node, monkeypatch, variable):
    monkeypatch.setenv(variable, "6")
    assert cores() == 6
    for useless in ("", "0", "many", "100"):
        monkeypatch.setenv(variable, useless)
        assert cores() == 64


def test_prints_are_generated_by_as_many_processes_as_the_job_has_cores(node, monkeypatch, tmp_path):
    from ifvit.config import DenseConfig, preset
    from ifvit.data import gather, synthetic

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("IFVIT_CACHE", str(tmp_path / "cache"))

    class Asked(Exception):
        pass

    def pool(workers, *_):
        raise Asked(workers)

    monkeypatch.setattr(synthetic, "ProcessPoolExecutor", pool)
    with pytest.raises(Asked, match="^2$"):
        gather.generated(preset("smoke", DenseConfig))


def test_a_ray_of_this_machine_alone_gets_the_jobs_cores(node, monkeypatch):
    import ray

    from cluster.session import session
    from tune.sweep import session_options

    told = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **how: told.update(how))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    with session(**session_options()):
        assert told["num_cpus"] == 3
