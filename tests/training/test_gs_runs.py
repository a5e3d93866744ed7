"""A run trains into a bucket as into a folder: to the same bits, whatever happens to it or to the store meanwhile.

The store is `fake_gcs.FakeGcs`, on this machine.
"""

import json
import re
import socket
import subprocess
import sys
import time

import pytest
import tensorstore
from fake_gcs import FakeGcs

from ifvit import checkpoint, gcs
from ifvit.training.metrics import TIMES

pytestmark = pytest.mark.slow

RUN = "gs://runs/dense_reg"
LONG = ("--preset", "smoke", "--num_epochs", 4, "--set", "save_every=2", "--set", "keep_last=1")


@pytest.fixture
def store(monkeypatch):
    with FakeGcs() as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "mine")
        retries = {"gcs_request_retries": {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}}
        monkeypatch.setattr(gcs, "RETRIES", retries)
        monkeypatch.setattr(gcs, "_CONTEXT", tensorstore.Context(retries))
        server.buckets["runs"] = {}
        server.page = 1000  # a run lists thousands
        yield server


@pytest.fixture(scope="module")
def long(command, prints, tmp_path_factory):
    """The folder of a run on the disk."""
    cwd = tmp_path_factory.mktemp("long")
    assert command("train_dense", "--dataset_root", prints, *LONG, cwd=cwd).code == 0
    return cwd / "checkpoints/dense_reg"


@pytest.fixture
def train(command, prints, tmp_path):
    return lambda *words: command(
        "train_dense", "--dataset_root", prints, "--checkpoint_dir", RUN, *LONG, *words, cwd=tmp_path
    )


@pytest.fixture
def begun(prints, tmp_path, store):
    """The run in a process of its own."""
    words = ["-m", "ifvit.train_dense", "--dataset_root", prints, "--checkpoint_dir", RUN, *LONG]
    running = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    yield running
    running.kill()
    running.communicate()


def until(running, condition) -> None:
    patience = time.monotonic() + 200
    while not condition():
        assert running.poll() is None and time.monotonic() < patience, running.communicate()
        time.sleep(0.002)


def rows(folder) -> list[dict]:
    """Of validation: those of training begin anew where a run was stopped."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read if row["split"] == "val"]


def names(store) -> set[str]:
    """What lies directly in the run's folder."""
    return {n.removeprefix("dense_reg/").split("/")[0] for n in store.buckets["runs"] if n.startswith("dense_reg/")}


def assert_same(store, folder) -> None:
    """The run in the store has come to what the one in the folder has."""
    for name in ("dense_reg_ckpt", "dense_reg_best"):
        assert (
            checkpoint.read_metadata(checkpoint.as_path(f"{RUN}/{name}"))["digests"]
            == checkpoint.read_metadata(checkpoint.as_path(folder / name))["digests"]
        )
        checkpoint.load(f"{RUN}/{name}")
    here = {p.name for p in folder.iterdir()}
    assert names(store) == here, names(store) ^ here
    assert rows(gcs.GcsPath(RUN)) == rows(folder)


# ---- undisturbed


def test_a_run_leaves_in_a_bucket_what_it_leaves_in_a_folder(store, train, long, tmp_path):
    said = train()
    assert said.code == 0, said
    assert f"Module 1 checkpoint: {RUN}/dense_reg_ckpt" in said.out and "⚠" not in said.out + said.err
    assert_same(store, long)
    objects = store.buckets["runs"]
    assert json.loads(objects["dense_reg/config.json"])["checkpoint_dir"] == RUN
    assert objects["dense_reg/curves.png"].startswith(b"\x89PNG")
    assert b"data:image/png;base64" in objects["dense_reg/report.html"]
    assert len([n for n in objects if n.startswith("dense_reg/tensorboard/events")]) == 1
    assert len(objects["dense_reg/attempts.jsonl"].splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert "nothing to do" in train().out


def test_the_whole_pipeline_trains_and_evaluates_into_a_bucket(store, command, pipeline, tmp_path):
    said = command(
        "train_all",
        "--dense_checkpoint_dir",
        "gs://runs/a",
        "--matcher_checkpoint_dir",
        "gs://runs/b",
        "--num_classes",
        100,
        "--preset",
        "smoke",
        cwd=tmp_path,
    )
    assert said.code == 0, said
    for ours, theirs in (
        ("gs://runs/a/dense_reg_ckpt", pipeline.module1),
        ("gs://runs/b/matcher_ckpt", pipeline.module2),
    ):
        assert checkpoint.difference(checkpoint.load(ours).state, checkpoint.load(theirs).state) == {}
    written = {
        str(p.relative_to(pipeline.folder / "matcher")) for p in (pipeline.folder / "matcher/evaluation").rglob("*.*")
    }
    assert written and written <= {n.removeprefix("b/") for n in store.buckets["runs"]}
    assert "rates, scores, DET, histogram, matches: gs://runs/b/evaluation" in said.out
    assert not list(tmp_path.iterdir())


def test_prints_in_a_bucket_are_copied_into_the_cache_and_trained_on(store, command, prints, long, tmp_path):
    store.upload(prints, "runs", "prints")
    words = ("train_dense", "--checkpoint_dir", tmp_path / "run", *LONG, "--dataset_root")
    assert command(*words, "gs://runs/prints", cwd=tmp_path).code == 0
    assert (
        checkpoint.difference(
            checkpoint.load(tmp_path / "run/dense_reg_ckpt").state, checkpoint.load(long / "dense_reg_ckpt").state
        )
        == {}
    )
    store.asked.clear()
    assert "nothing to do" in command(*words, "gs://runs/prints", cwd=tmp_path).out
    assert store.asked and not [place for place in store.asked if ".png" in place]
    said = command(*words, "gs://runs/nowhere", cwd=tmp_path)
    assert (
        said.code == 2
        and said.err == "Error: There is nothing at gs://runs/nowhere. Check the URL of --dataset_root.\n"
    )


# ---- killed, interrupted, damaged


@pytest.mark.parametrize(
    "when",
    [
        "a checkpoint is half there",
        "a checkpoint is whole",
        "one goes",
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(store, begun, train, long, when):
    sign = {
        "a checkpoint is half there": "+runs/dense_reg/dense_reg_epoch_2/state/_METADATA",
        "a checkpoint is whole": "+runs/dense_reg/dense_reg_epoch_2/metadata/metadata",
        "one goes": "-runs/dense_reg/dense_reg_epoch_1/metadata/metadata",
    }[when]
    until(begun, lambda: sign in store.changed)
    begun.kill()
    begun.wait()
    assert checkpoint.has_name(gcs.GcsPath(f"{RUN}/dense_reg_epoch_2")) == (when != "a checkpoint is half there")
    said = train()
    assert said.code == 0, said
    assert "Going on from" in said.out and "damaged" not in said.out
    assert_same(store, long)


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bits(store, begun, train, long):
    until(begun, lambda: b'"val"' in store.buckets["runs"].get("dense_reg/metrics.jsonl", b""))
    begun.send_signal(2)
    out, err = begun.communicate(timeout=200)
    assert begun.returncode == 130 and "Traceback" not in err, (out, err)
    step = re.search(r"Stopped at step (\d+) of 8; saved gs://runs/dense_reg/dense_reg_step_\1", err)[1]
    said = train()
    assert said.code == 0 and f"Going on from {RUN}/dense_reg_step_{step}, step {step} of 8" in said.out
    assert_same(store, long)


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(store, train, long):
    assert train().code == 0
    objects = store.buckets["runs"]
    chunk = max((n for n in objects if "/dense_reg_ckpt/state/" in n and "/c/" in n), key=lambda n: len(objects[n]))
    objects[chunk] = objects[chunk][:-40] + bytes([objects[chunk][-40] ^ 1]) + objects[chunk][-39:]
    said = train()
    assert said.code == 0 and f"It is set aside as {RUN}/dense_reg_ckpt.damaged" in said.out, said
    assert f"Going on from {RUN}/dense_reg_epoch_4" in said.out
    assert names(store) - {p.name for p in long.iterdir()} == {"dense_reg_ckpt.damaged"}


def test_a_run_that_begins_anew_leaves_the_one_before_whole(store, train, long):
    assert train().code == 0
    assert train("--resume", "never").code == 0
    for folder in (RUN, f"{RUN}/before_1"):
        assert (
            checkpoint.difference(
                checkpoint.load(f"{folder}/dense_reg_ckpt").state, checkpoint.load(long / "dense_reg_ckpt").state
            )
            == {}
        )
    assert names(store) - {p.name for p in long.iterdir()} == {"before_1"}
    assert len(store.buckets["runs"]["dense_reg/attempts.jsonl"].splitlines()) == 1


# ---- a store that refuses


def test_a_store_that_refuses_checkpoints_for_a_while_does_not_end_the_run(store, train, long):
    store.read_only = {"dense_reg_epoch_1/state": (503, "Come back later.")}
    said = train()
    assert said.code == 0, said
    told = [line for line in said.out.splitlines() if "⚠" in line]
    assert len(told) == 1 and re.search(
        r"Checkpoint \S+epoch_1 could not be written \(.*Come back later.\); training goes on, and "
        "the next save tries again",
        told[0],
    ), told
    assert not [n for n in names(store) if "epoch_1" in n]
    assert (
        checkpoint.difference(
            checkpoint.load(f"{RUN}/dense_reg_ckpt").state, checkpoint.load(long / "dense_reg_ckpt").state
        )
        == {}
    )


def test_metrics_that_are_refused_for_a_while_are_there_at_the_end(store, begun, long):
    store.read_only = {"metrics.jsonl": (403, "No."), "tensorboard": (403, "No.")}
    until(begun, lambda: "+runs/dense_reg/dense_reg_epoch_2/metadata/metadata" in store.changed)
    store.mend()
    out, err = begun.communicate(timeout=200)
    assert begun.returncode == 0, (out, err)
    assert [line for line in out.splitlines() if "⚠" in line and "could not be written (No.)" in line]
    assert_same(store, long)


def test_a_bucket_that_cannot_be_written_is_told_before_anything_is_trained(store, train):
    store.read_only = {"runs/": (403, "me@here has no storage.objects.create access.")}
    said = train()
    assert said.code == 2 and not store.changed
    assert re.fullmatch(
        rf"Error: Cannot write checkpoints to {RUN} \(me@here has no storage.objects.create access.\); give another "
        r"directory.\n",
        said.err,
    ), said.err


# ---- two processes, each with its own part


WORKER = """
import asyncio, sys
import jax
from orbax.checkpoint._src.path import async_path
rank, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ifvit import checkpoint

params = {"w": np.arange(48, dtype=np.float32).reshape(4, 12), "b": np.float32([1, 2, 3])}
whole = {"params": params, "step": np.int32(5)}
plain = async_path.mkdir


async def mkdir(*args, **options):
    await asyncio.sleep(rank / 2)  # the disk of the second one is slow
    return await plain(*args, **options)


async_path.mkdir = mkdir
across = Mesh(np.array(jax.devices()).reshape(2, 2).T, ("data", "model"))  # who share parameters sit in both processes
where = {"params": {"w": NamedSharding(across, P(None, "model")), "b": NamedSharding(across, P())},
         "step": NamedSharding(across, P())}
state = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), whole, where)
for _ in range(2):  # the second replaces the first
    checkpoint.save(path, "dense_reg", state, {"epoch": 1, "config": {}}, aligner={"w": np.float32([4])})
folder = checkpoint.locate(path)
found = checkpoint.restore(folder, checkpoint.read_metadata(folder), where).state["params"]["w"]
assert all(np.array_equal(np.asarray(s.data), whole["params"]["w"][s.index]) for s in found.addressable_shards)
print("done")
"""


@pytest.mark.process
def test_two_processes_write_their_own_parts_to_a_bucket(store):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, f"{RUN}/dense_reg_ckpt"],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    said = [p.communicate(timeout=200) for p in both]
    assert all("done" in out for out, _ in said), "\n".join(err for _, err in said)
    found = checkpoint.load(f"{RUN}/dense_reg_ckpt")
    assert found.state["params"]["w"].tolist() == [list(range(12 * i, 12 * i + 12)) for i in range(4)]
    assert found.state["params"]["b"].tolist() == [1, 2, 3] and found.aligner["w"].tolist() == [4]
    assert names(store) == {"dense_reg_ckpt"}
