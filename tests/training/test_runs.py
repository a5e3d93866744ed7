"""A run is the same every time, wherever it was stopped; and it stops when it must."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from xla import flags

from cluster.host import Host
from ifvit import checkpoint, train_dense
from ifvit.config import DenseConfig, preset
from ifvit.data.gather import gather
from ifvit.training.metrics import TIMES, read_rows

SMOKE = ("--preset", "smoke")
LONG = (*SMOKE, "--num_epochs", 10, "--set", "save_every=5")  # 20 steps


def rows(folder, *splits: str) -> list[dict]:
    """Rows of a run's metrics.jsonl without what tells of time."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read if not splits or row["split"] in splits]


def same(command, a, b) -> bool:
    """Whether `python -m ifvit.checkpoint diff A B` finds every leaf equal to the bit."""
    said = command("checkpoint", "diff", a, b, cwd=a)
    assert said.code in (0, 1), said
    return said.code == 0


@pytest.fixture(scope="module")
def long(command, prints, tmp_path_factory):
    """The folder of ten epochs of Module 1, not interrupted."""
    cwd = tmp_path_factory.mktemp("long")
    said = command("train_dense", "--dataset_root", prints, *LONG, cwd=cwd)
    assert said.code == 0, said
    return cwd / "checkpoints/dense_reg"


# ---- the same again


def test_the_same_command_in_another_process_gives_the_same_metrics(process, command, module1, prints, tmp_path):
    said = process(
        "-m",
        "ifvit.train_dense",
        "--dataset_root",
        prints,
        "--checkpoint_dir",
        "./checkpoints/dense_reg",
        *SMOKE,
        cwd=tmp_path,
    )
    assert said.code == 0, said
    again = rows(tmp_path / "checkpoints/dense_reg")
    assert again == rows(module1.folder)
    assert [(r["epoch"], r["split"]) for r in again] == [(1, "train"), (1, "val"), (2, "train"), (2, "val")]
    assert again[0]["loss"] != again[2]["loss"]  # there is something to compare
    assert same(command, tmp_path / "checkpoints/dense_reg/dense_reg_ckpt", module1.path)


def test_the_same_matcher_again_gives_the_same_metrics(command, module1, module2, prints, tmp_path):
    shutil.copytree(module1.folder, tmp_path / "checkpoints/dense_reg")
    said = command(
        "train_match",
        "--dataset_root",
        prints,
        "--checkpoint_dir",
        "./checkpoints/matcher",
        "--num_classes",
        100,
        *SMOKE,
        cwd=tmp_path,
    )
    assert said.code == 0, said
    again = rows(tmp_path / "checkpoints/matcher")
    assert again == rows(module2.folder)
    assert {r["split"] for r in again} == {"train", "val"} and "eer" in again[-1]
    assert same(command, tmp_path / "checkpoints/matcher/matcher_ckpt", module2.path)
    fusion = [
        checkpoint.read_metadata(p)["fusion"] for p in (tmp_path / "checkpoints/matcher/matcher_ckpt", module2.path)
    ]
    assert fusion[0] == fusion[1]


# ---- stopped and gone on with


@pytest.mark.process
def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_parameters(command, long, prints, tmp_path):
    words = ["-m", "ifvit.train_dense", "--dataset_root", str(prints), *map(str, LONG)]
    folder = tmp_path / "checkpoints/dense_reg"
    running = subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    patience = time.monotonic() + 300
    while not (folder / "metrics.jsonl").is_file() or not rows(folder, "val"):  # an epoch of ten is done
        assert running.poll() is None and time.monotonic() < patience, running.communicate()
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 130, err
    step = int(re.search(r"Stopped at step (\d+) of 20", err)[1])
    assert 2 <= step < 20
    assert str(folder / f"dense_reg_step_{step}") in err and "The same command goes on" in err
    assert "Traceback" not in err
    assert not (folder / "dense_reg_ckpt").exists()
    assert int(checkpoint.load(folder / f"dense_reg_step_{step}").state["step"]) == step

    said = command("train_dense", "--dataset_root", prints, *LONG, cwd=tmp_path)
    assert said.code == 0, said
    assert f"step {step} of 20" in said.out
    assert same(command, folder / "dense_reg_ckpt", long / "dense_reg_ckpt")
    assert rows(folder, "val") == rows(long, "val")
    assert [r["step"] for r in rows(folder)] == sorted(r["step"] for r in rows(folder))


@pytest.mark.slow
def test_save_every_5_of_10_epochs(long):
    folders = {p.name for p in long.iterdir() if p.is_dir()} - {"tensorboard"}
    assert folders == {"dense_reg_epoch_5", "dense_reg_epoch_10", "dense_reg_best", "dense_reg_ckpt"}


def test_sigterm_within_an_epoch_saves_and_is_gone_on_from(command, module1, module2, prints, tmp_path, monkeypatch):
    words = ("train_match", "--dataset_root", prints, "--pretrained_ckpt", module1.path, "--num_classes", 100, *SMOKE)
    folder = tmp_path / "checkpoints/matcher"
    from ifvit.training import loop

    batches, before = [], signal.getsignal(signal.SIGTERM)

    def put_batch(*args, real=loop.put_batch):
        if "canvas0" in args[0] and args[0]["canvas0"].shape[0] == 4:
            batches.append(1)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", put_batch)  # the loop's own, that of validation is elsewhere
        said = command(*words, cwd=tmp_path)
    assert said.code == 75, said
    assert "Stopped at step 3 of 4" in said.err and "matcher_step_3" in said.err
    assert (folder / "matcher_step_3").is_dir() and not (folder / "matcher_ckpt").exists()
    assert signal.getsignal(signal.SIGTERM) == before

    said = command(*words, cwd=tmp_path)
    assert said.code == 0, said
    assert "matcher_step_3, step 3 of 4" in said.out
    assert same(command, folder / "matcher_ckpt", module2.path)
    assert rows(folder, "val") == rows(module2.folder, "val")


def test_a_run_goes_on_from_a_checkpoint_that_is_named(command, module1, prints, tmp_path):
    said = command(
        "train_dense", "--dataset_root", prints, "--resume", module1.folder / "dense_reg_epoch_1", *SMOKE, cwd=tmp_path
    )
    assert said.code == 0, said
    assert "dense_reg_epoch_1, step 2 of 4" in said.out
    assert same(command, tmp_path / "checkpoints/dense_reg/dense_reg_ckpt", module1.path)


def test_a_half_written_checkpoint_is_set_aside_and_not_gone_on_from(command, module1, prints, tmp_path):
    folder = tmp_path / "checkpoints/dense_reg"
    shutil.copytree(module1.folder, folder)
    shutil.rmtree(folder / "dense_reg_ckpt/metadata")
    (folder / "dense_reg_epoch_2").rename(folder / "dense_reg_epoch_2.orbax-checkpoint-tmp")
    said = command(
        "train_dense", "--dataset_root", prints, "--checkpoint_dir", "./checkpoints/dense_reg", *SMOKE, cwd=tmp_path
    )
    assert said.code == 0, said
    assert f"Going on from {folder / 'dense_reg_epoch_1'}, step 2 of 4" in said.out
    assert "dense_reg_ckpt.damaged" in said.out and (folder / "dense_reg_ckpt.damaged/state").is_dir()
    assert not list(folder.glob("*orbax-checkpoint-tmp*"))
    assert same(command, folder / "dense_reg_ckpt", module1.path)


def test_a_run_goes_on_sharded_to_the_same_parameters_but_for_rounding(process, module1, prints, tmp_path):
    for name, parallel in (("whole", 1), ("sharded", 2)):
        said = process(
            "-m",
            "ifvit.train_dense",
            "--dataset_root",
            prints,
            "--checkpoint_dir",
            name,
            "--resume",
            module1.folder / "dense_reg_epoch_1",
            *SMOKE,
            "--set",
            f"model_parallel={parallel}",
            cwd=tmp_path,
            XLA_FLAGS=flags(devices=2),
        )
        assert said.code == 0, said
    found = checkpoint.load(tmp_path / "sharded/dense_reg_ckpt")
    sharded = found.metadata["shardings"]
    assert "model" in sharded["state/params/loftr_transformer/layer_0/q_proj/kernel"]
    assert "model" in sharded["state/opt_state/1/0/mu/loftr_transformer/layer_0/q_proj/kernel"]
    assert [attempt["mesh"]["model"] for attempt in found.metadata["history"]] == [1, 2]
    # One device sums the batch of four in another order, which BatchNorm magnifies in the gradients of two steps.
    assert rows(tmp_path / "sharded", "train")[-1]["loss"] == pytest.approx(
        rows(module1.folder, "train")[-1]["loss"], rel=1e-5
    )
    whole = checkpoint.leaves(checkpoint.load(tmp_path / "whole/dense_reg_ckpt").state)
    for name, leaf in checkpoint.leaves(found.state).items():
        assert np.abs(leaf - whole[name]).max() <= 1e-4 * max(1e-3, np.abs(whole[name]).max()), name


def test_never_trains_anew_and_leaves_the_run_before_whole(command, module1, prints, tmp_path):
    folder = tmp_path / "checkpoints/dense_reg"
    shutil.copytree(module1.folder, folder)
    said = command(
        "train_dense",
        "--dataset_root",
        prints,
        "--checkpoint_dir",
        "./checkpoints/dense_reg",
        *SMOKE,
        "--resume",
        "never",
        "--seed",
        1,
        cwd=tmp_path,
    )
    assert said.code == 0, said
    assert not same(command, folder / "dense_reg_ckpt", module1.path)
    for name in ("dense_reg_ckpt", "dense_reg_best", "dense_reg_epoch_1"):
        assert same(command, folder / "before_1" / name, module1.folder / name)


class Again(Host):
    """A process that stands in for one of the same command which has died."""

    def __init__(self, *begun):
        super().__init__()
        self.noted = set(begun)

    def has_begun(self, what):
        return what in self.noted

    def begun(self, what):
        self.noted.add(what)


@pytest.mark.slow
def test_never_is_once_for_all_processes_of_a_command(module1, prints, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(module1.folder, folder)
    shutil.rmtree(folder / "dense_reg_ckpt")
    shutil.rmtree(folder / "dense_reg_epoch_2")
    config = preset("smoke", DenseConfig).replace(dataset_root=(str(prints),), checkpoint_dir=str(folder))
    host = Again()
    run = lambda: train_dense.run(config, "never", host)
    run()
    assert host.noted == {str(folder / "dense_reg")} and (folder / "before_1/dense_reg_epoch_1").is_dir()
    shutil.rmtree(folder / "dense_reg_ckpt")
    capsys.readouterr()
    run()
    assert "Going on from" in capsys.readouterr().out and not (folder / "before_2").exists()


@pytest.mark.slow
def test_a_run_from_an_earlier_checkpoint_leaves_those_after_it_whole_and_goes_on_from_its_own(
    command, module1, prints, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(module1.folder, folder)
    config = preset("smoke", DenseConfig).replace(dataset_root=(str(prints),), checkpoint_dir=str(folder), num_epochs=2)
    host, earlier = Again(), str(folder / "dense_reg_epoch_1")
    train_dense.run(config, earlier, host)
    assert {"dense_reg_epoch_2", "dense_reg_ckpt"} <= {p.name for p in (folder / "before_1").iterdir()}
    assert same(command, folder / "dense_reg_ckpt", module1.path)
    for gone, goes_on in (("dense_reg_ckpt", "dense_reg_epoch_2"), ("dense_reg_epoch_2", "dense_reg_epoch_1")):
        shutil.rmtree(folder / gone)
        shutil.rmtree(folder / "dense_reg_ckpt", ignore_errors=True)
        capsys.readouterr()
        train_dense.run(config, earlier, host)
        assert f"Going on from {folder / goes_on}" in capsys.readouterr().out
        assert not (folder / "before_2").exists() and same(command, folder / "dense_reg_ckpt", module1.path)
    shutil.rmtree(folder / "dense_reg_ckpt")
    shutil.rmtree(earlier)  # which `keep_last` no longer keeps
    capsys.readouterr()
    train_dense.run(config, earlier, host)
    assert f"Going on from {folder / 'dense_reg_epoch_2'}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_seconds_of_a_row_hold_the_checkpoint_that_it_counts(prints, tmp_path, monkeypatch):
    """Goodput takes the one from the other."""
    snapshot = checkpoint.snapshot
    monkeypatch.setattr(checkpoint, "snapshot", lambda state: time.sleep(2) or snapshot(state))
    train_dense.run(
        preset("smoke", DenseConfig).replace(dataset_root=(str(prints),), checkpoint_dir=str(tmp_path)), "never", Host()
    )
    read = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert [row["checkpoint_seconds"] >= 2 for row in read] == [False, True]
    for row in read:
        assert row["seconds"] >= row["checkpoint_seconds"] + row["input_seconds"] + row["compile_seconds"]


def test_what_an_attempt_without_a_checkpoint_had_done_is_said(command, module1, prints, tmp_path):
    folder = tmp_path / "checkpoints/dense_reg"
    folder.mkdir(parents=True)
    shutil.copy(module1.folder / "metrics.jsonl", folder)
    said = command(
        "train_dense", "--dataset_root", prints, "--checkpoint_dir", "./checkpoints/dense_reg", *SMOKE, cwd=tmp_path
    )
    assert said.code == 0 and re.search(r"Lost: 4 steps \(\d+ s of training\); there is no checkpoint", said.out), said


@pytest.mark.slow
def test_patience_ends_a_run_that_does_not_get_better_wherever_it_was_stopped(command, long, prints, tmp_path):
    often = [word if word != "save_every=5" else "save_every=1" for word in LONG]
    words = ("train_dense", "--dataset_root", prints, *often, "--set", "patience=1")
    said = command(*words, cwd=tmp_path)
    assert said.code == 0, said
    validations = [r["accuracy"] for r in rows(long, "val")]
    worse = next(i for i in range(1, 10) if validations[i] <= max(validations[:i]))
    assert f"accuracy has not been better for 1 epochs; the run ends after epoch {worse + 1}" in said.out
    folder = tmp_path / "checkpoints/dense_reg"
    final = checkpoint.load(folder / "dense_reg_ckpt")
    assert final.metadata["finished"] and final.metadata["epoch"] == worse + 1

    # The run has stopped just before the final checkpoint, or an epoch before.
    for also_gone in ((), (f"dense_reg_epoch_{worse + 1}",)):
        (folder / "dense_reg_ckpt").rename(tmp_path / f"before{len(also_gone)}")
        for name in also_gone:
            shutil.rmtree(folder / name)
        assert command(*words, cwd=tmp_path).code == 0
        assert same(command, folder / "dense_reg_ckpt", tmp_path / "before0")
    assert f"is finished ({worse + 1} epochs)" in command(*words, cwd=tmp_path).out


def test_a_finished_run_says_so_and_is_left_alone(command, module1, prints):
    before = checkpoint.read_metadata(module1.path)["timestamp"], rows(module1.folder)
    for name in ("curves.png", "report.html"):  # as where it was killed between its last checkpoint and them
        (module1.folder / name).unlink()
    said = command(
        "train_dense", "--dataset_root", prints, "--checkpoint_dir", "./checkpoints/dense_reg", *SMOKE, cwd=module1.cwd
    )
    assert said.code == 0 and (module1.folder / "curves.png").exists()
    page = (module1.folder / "report.html").read_text()
    assert "data:image/png;base64" in page and f"batch_size: {preset('smoke', DenseConfig).batch_size}" in page
    assert "is finished (2 epochs)" in said.out and "--resume never" in said.out
    assert (checkpoint.read_metadata(module1.path)["timestamp"], rows(module1.folder)) == before


@pytest.mark.parametrize(
    "words, told",
    [
        (["--set", "rotation=10"], ["rotation = 60.0", "10.0"]),
        (["--num_epochs", 3], ["num_epochs = 2", "3"]),
        (["--set", "rotation=10", "--batch_size", 2], ["rotation", "batch_size"]),
    ],
)
def test_a_changed_configuration_names_the_field(command, module1, prints, words, told):
    said = command(
        "train_dense",
        "--dataset_root",
        prints,
        "--checkpoint_dir",
        "./checkpoints/dense_reg",
        *SMOKE,
        *words,
        cwd=module1.cwd,
    )
    assert said.code == 2 and said.err.startswith("Error: ")
    assert all(words in said.err for words in [*told, "--resume never"]), said.err


def test_other_prints_are_a_mistake_to_go_on_with(command, module1):
    said = command(
        "train_dense",
        "--dataset_root",
        "synthetic",
        "--checkpoint_dir",
        "./checkpoints/dense_reg",
        *SMOKE,
        cwd=module1.cwd,
    )
    assert said.code == 2 and "other prints" in said.err, said


# ---- what is held out


def test_the_held_out_fingers_depend_on_a_seed_of_their_own(prints, cache):
    def held_out(**changes) -> set:
        config = preset("smoke", DenseConfig).replace(dataset_root=(str(prints),), **changes)
        return {p.identity for p in gather(config, Host())[2].prints}

    assert held_out(seed=1) == held_out(seed=2) == held_out()
    assert len({frozenset(held_out(data_seed=n)) for n in range(4)}) > 1


@pytest.mark.parametrize(
    "words, warned",
    [
        ([], False),
        (["--seed", 7], False),
        (["--set", "data_seed=1"], True),
        (["--set", "held_out=0.2"], False),
        (["--set", "held_out=0.5"], True),
    ],
)
def test_it_is_said_where_module_1_has_seen_fingers_that_module_2_holds_out(started, module1, prints, words, warned):
    said, task, _ = started(
        "train_match",
        "--dataset_root",
        prints,
        "--pretrained_ckpt",
        module1.path,
        *SMOKE,
        *words,
        cwd=module1.cwd,
        create=False,
    )
    assert said.code == 0 and task, said
    assert (f"⚠ Module 1 in {module1.path} held out other fingers" in said.out) == warned


# ---- NaN


def test_nan_stops_the_run_and_names_the_step(command, prints, tmp_path, monkeypatch):
    import jax.numpy as jnp

    from ifvit.training import dense

    def dense_step(net, config):
        """Counts, and loses its way in step 3."""

        def step(state, batch, rate):
            return state._replace(step=state.step + 1), {"loss": jnp.where(state.step == 2, jnp.nan, 1.0)}

        return step

    monkeypatch.setattr(dense, "dense_step", dense_step)
    monkeypatch.setattr(dense, "dense_program", dense.dense_program.__wrapped__)  # others' programs are kept there
    said = command("train_dense", "--dataset_root", prints, *SMOKE, "--set", "pairs_per_epoch=16", cwd=tmp_path)
    assert said.code == 1, said
    assert "Error: loss is nan at step 3;" in said.err and "Traceback" not in said.err
    assert not list(tmp_path.rglob("dense_reg_*"))


# ---- the whole pipeline


def test_train_all_ends_with_the_table_and_the_paths(pipeline):
    out = pipeline.said.out
    assert re.search(r"registration: \d+\.\d%", out)
    tables = re.findall(r"database +EER.+ FMR100.+ FMR1000.+ ZeroFMR.+ AUC +genuine +impostor\n((?:.+%.+\n)+)", out)
    assert len(tables) == 2  # Module 1, Module 2
    for table in tables:
        assert [line.split()[0] for line in table.splitlines()] == ["synthetic", "macro"]
        assert all(len(re.findall(r"\d+\.\d\d%", line)) == 4 for line in table.splitlines())
    printed = re.findall(r"^[^:\n]+: (/\S+)$", out[out.rindex("impostor") :], re.M)
    paths = {os.path.relpath(p, pipeline.folder) for p in printed}
    assert {
        "dense_reg/dense_reg_ckpt",
        "matcher/matcher_ckpt",
        "dense_reg/curves.png",
        "matcher/curves.png",
        "matcher/evaluation",
    } <= paths
    assert all(os.path.exists(p) for p in printed)


@pytest.mark.parametrize("module", ["dense_reg", "matcher"])
def test_train_all_evaluates_both_modules(pipeline, module):
    folder = pipeline.folder / "matcher/evaluation" / module
    assert {"metrics.json", "scores.csv", "det.png", "histogram.png", "matches.png"} <= {
        p.name for p in folder.iterdir()
    }
    found = json.loads((folder / "metrics.json").read_text())["databases"]["synthetic"]
    # 3 held-out fingers of 2 impressions: a genuine pair each, and 3 pairs of first impressions
    assert (found["genuine"], found["impostor"]) == (3, 3)
    with (folder / "scores.csv").open() as file:
        scored = list(csv.DictReader(file))
    fingers = {row[side].split("_")[0] for row in scored for side in "ab"}
    assert len(fingers) == 3


def test_the_config_of_the_run_stands_beside_its_metrics(pipeline):
    for name, epochs in (("dense_reg", 2), ("matcher", 2)):
        config = json.loads((pipeline.folder / name / "config.json").read_text())
        assert config["num_epochs"] == epochs and config["image_size"] == 64
        assert list((pipeline.folder / name / "tensorboard").iterdir())
