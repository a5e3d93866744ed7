"""A job on two hosts of a test bed, and one fault; tests/faults/hosts.py has the others, at length."""

import json
from dataclasses import replace

import pytest
from faults import checkpoint
from faults.hosts import Run, Training, disturbed, state, worker
from testbed import Testbed, until

from ifvit.gallery.store import Gallery
from ifvit.training.metrics import read_rows
from tune import record

WHY_NOT = Testbed.available()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no test bed: {WHY_NOT}")
# `never` counts once: a worker that is killed does not begin anew.
SHORT = Training(epochs=5, pairs=40, hang_timeout=120, resume="never")


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with Testbed(hosts=2, folder=tmp_path_factory.mktemp("ray")) as bed:
        yield bed


@pytest.fixture(autouse=True)
def both_hosts(bed):
    """On a machine that is too busy Ray may take a host for dead, which then ends: it is started again."""
    for i in (0, 1):
        if not bed.processes(i, "raylet"):
            bed.start_host(i)


@pytest.fixture(scope="module")
def plain(bed, tmp_path_factory):
    """A job that nothing disturbs."""
    run = Run(bed, SHORT, tmp_path_factory.mktemp("plain") / "run")
    run.end()
    return run


def test_a_submitted_job_trains_on_both_hosts_to_the_end(plain, bed):
    assert "Ray: 2 workers, each with 1 CPU" in plain.said and plain.said.count("2 × cpu in 2 processes") == 1
    assert "TrainingReport" not in plain.said  # Ray's own words of each epoch
    hosts = next(r["host"] for r in read_rows(plain.folder / "metrics.jsonl") if r["split"] == "hosts")
    assert sorted(h.split()[1].rstrip(",") for h in hosts) == sorted(bed.addresses)
    found = checkpoint.load(plain.folder / "dense_reg_ckpt")
    assert found.metadata["finished"] and found.metadata["history"][0]["processes"] == 2


def test_after_kill_9_of_a_worker_the_run_ends_with_the_same_bits(plain, bed, tmp_path):
    _, said = disturbed(bed, SHORT, worker, tmp_path / "run")
    assert "step" in said  # what was lost stands in the log
    assert len(read_rows(tmp_path / "run/attempts.jsonl")) == 2
    assert state(tmp_path / "run") == state(plain.folder)


def test_a_finished_run_says_so_and_a_mistake_in_a_job_is_a_sentence_and_exit_code_2(plain, bed):
    words = replace(SHORT, resume="auto").words(plain.folder, "2")
    again = bed.submit(words, wait=True)
    assert bed.exit_code(again) == 0 and "is finished (5 epochs); nothing to do" in bed.logs(again)
    wrong = bed.submit([*words, "--set", "learning_rat=1"], wait=True)
    assert bed.exit_code(wrong) == 2
    assert "Error: DenseConfig has no key 'learning_rat'; did you mean 'learning_rate'?" in bed.logs(wrong)
    assert "Traceback" not in bed.logs(wrong)


def test_a_search_of_both_modules_by_job_submission_ends_in_an_evaluated_matcher(bed, tmp_path):
    job = bed.submit(
        [
            "python",
            "-m",
            "ifvit.train_all",
            "--tune",
            "2",
            "--preset",
            "smoke",
            "--dataset_root",
            "synthetic",
            "--sweep_dir",
            tmp_path / "sweep",
            "--dense_checkpoint_dir",
            tmp_path / "dense",
            "--matcher_checkpoint_dir",
            tmp_path / "matcher",
        ],
        wait=True,
    )
    said = bed.logs(job)
    assert bed.exit_code(job) == 0 and "Module 2, fused score" in said, said[-3000:]
    assert [len(record.read_all(tmp_path / "sweep" / name)) for name in ("dense", "match")] == [2, 2]
    for name, found in json.loads((tmp_path / "sweep/best.json").read_text()).items():
        ours = tmp_path / {"dense_reg": "dense", "matcher": "matcher"}[name] / f"{name}_ckpt"
        assert (
            checkpoint.read_metadata(ours)["digests"] == checkpoint.read_metadata(checkpoint.as_path(found))["digests"]
        )


def test_a_trial_may_take_both_hosts(bed, tmp_path):
    job = bed.submit(
        [
            "python",
            "-m",
            "tune",
            "--module",
            "dense",
            "--num_samples",
            "1",
            "--trial_workers",
            "2",
            "--preset",
            "smoke",
            "--dataset_root",
            "synthetic",
            "--sweep_dir",
            tmp_path,
        ],
        wait=True,
    )
    assert bed.exit_code(job) == 0, bed.logs(job)[-3000:]
    found = checkpoint.load(tmp_path / "dense/trials/000/dense_reg_ckpt")
    assert found.metadata["finished"] and found.metadata["history"][0]["processes"] == 2


def test_what_a_host_was_enrolling_is_enrolled_by_the_others_when_it_is_lost(bed, prints, tmp_path):
    gallery, many = tmp_path / "gallery", tmp_path / "many"
    for n in range(12):  # work for longer than the second host's worker takes to start
        for file in prints.rglob("*.png"):
            copy = many / f"{file.parent.name}_{n}" / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes() + bytes([n]))
    words = ["python", "-m", "ifvit.enroll", many, "--gallery", gallery, "--checkpoint", "pretrained"]
    job = bed.submit([*words, "--batch_size", "1", "--runtime", "ray", "--devices", "cpu"])
    working = []

    def works_or_ended() -> bool:
        working.extend(bed.processes(1, "ray::_call"))  # between two pieces it has another name
        return bool(working) or bed.status(job) in ("SUCCEEDED", "FAILED", "STOPPED")

    until(works_or_ended, "work on the second host", patience=240)
    assert working, bed.logs(job)
    bed.kill_host(1)
    assert bed.wait(job) == "SUCCEEDED", bed.logs(job)
    said = bed.logs(job)
    assert "Ray: 2 workers, each with 1 CPU" in said and "Traceback" not in said, said
    names = [entry.name for entry in Gallery.open(gallery).entries()]
    assert sorted(names) == sorted(str(file) for file in many.rglob("*.png"))
