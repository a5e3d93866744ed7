"""Whole sweeps in processes of their own: killed and resumed, with population-based training, without their metric."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ifvit import checkpoint
from tune import record

pytestmark = pytest.mark.process


@pytest.mark.slow
def test_a_sweep_of_both_modules_killed_at_a_random_moment_loses_no_trial_and_ends_in_an_evaluated_matcher(tmp_path):
    words = [sys.executable, "-m", "ifvit.train_all", "--tune", "5", "--preset", "smoke"]
    first = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    trials = tmp_path / "checkpoints/sweep/dense/trials"
    until = time.monotonic() + 300
    while len(list(trials.glob("*/ended.json"))) < 2 and time.monotonic() < until and first.poll() is None:
        time.sleep(0.2)
    time.sleep(np.random.default_rng().random() * 8)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {p: p.read_text() for p in trials.glob("*/ended.json")}
    assert len(before) >= 2

    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert {p: p.read_text() for p in before} == before  # not one was run again
    for name, ckpt in (("dense", "dense_reg"), ("match", "matcher")):
        records = record.read_all(tmp_path / "checkpoints/sweep" / name)
        assert len(records) == 5 and all(r.end for r in records)
        finished = [r for r in records if r.end["how"] == "finished"]
        metric, higher = {"dense": ("accuracy", True), "match": ("eer", False)}[name]
        best = record.order(records, metric, higher)[0]
        assert best in finished and f"best: trial {best.number}, {metric}" in again.stdout
        ours = checkpoint.load(tmp_path / "checkpoints" / ckpt / f"{ckpt}_ckpt")
        theirs = checkpoint.load(record.folder_of(tmp_path / "checkpoints/sweep" / name, best.number) / f"{ckpt}_ckpt")
        assert ours.metadata["digests"] == theirs.metadata["digests"]
        assert {k: ours.metadata["config"][k] for k in best.values} == json.loads(json.dumps(best.values))
    assert (
        "Module 2, fused score" in again.stdout
        and (tmp_path / "checkpoints/matcher/evaluation/matcher/metrics.json").exists()
    )
    rest = subprocess.run(
        [sys.executable, "-m", "ifvit.train_dense", "--config", "checkpoints/sweep/best.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert rest.returncode == 0 and "is finished" in rest.stdout, rest


@pytest.mark.slow
def test_a_trial_that_exploits_another_goes_on_from_its_parameters(tmp_path):
    words = [
        "--module",
        "dense",
        "--scheduler",
        "pbt",
        "--preset",
        "smoke",
        "--num_samples",
        "4",
        "--search",
        "learning_rate",
        "noise",
        "--set",
        "num_epochs=4",
        "--seed",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tune", *words], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    out = tmp_path / "checkpoints/sweep/dense"
    clones = [
        (n, line)
        for n in range(4)
        for line in map(json.loads, (record.folder_of(out, n) / "values.jsonl").read_text().splitlines())
        if line.get("clone_of")
    ]
    assert clones
    digests = lambda path: {
        k: v for k, v in checkpoint.read_metadata(checkpoint.as_path(path))["digests"].items() if "/params/" in k
    }
    for number, line in clones:
        mine, epoch = record.folder_of(out, number), line["from_epoch"]
        last = [other["from_epoch"] for n, other in clones if n == number]
        theirs = Path(line["clone_of"])
        cloned_since = [o for n, o in clones if record.folder_of(out, n) == theirs.parent and o["from_epoch"] >= epoch]
        if last.count(epoch) > 1 or cloned_since:
            continue
        assert digests(mine / f"dense_reg_epoch_{epoch}") == digests(theirs)
        after = "ckpt" if epoch == 3 else f"epoch_{epoch + 1}"
        if (epoch + 1) not in last:
            # It was trained with settings of its own.
            assert digests(mine / f"dense_reg_{after}") != digests(theirs.with_name(f"dense_reg_{after}"))
            config = checkpoint.read_metadata(checkpoint.as_path(mine / f"dense_reg_{after}"))["config"]
            assert {k: config[k] for k in line["values"]} == line["values"]


def test_a_metric_that_no_trial_reports_ends_the_sweep_and_is_told_with_those_there_are(tmp_path):
    said = subprocess.run(
        [
            sys.executable,
            "-m",
            "tune",
            "--module",
            "dense",
            "--num_samples",
            "6",
            "--preset",
            "smoke",
            "--search",
            "noise",
            "--metric",
            "acuracy",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert said.returncode == 1, said
    assert "No trial reports the metric 'acuracy'" in said.stderr and "it reports accuracy" in said.stderr
    assert "Traceback" not in said.stderr
