"""Trackers are told what metrics.jsonl is, once, and one that fails costs a line."""

import importlib.util
import json
import logging
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from etils import epath

from ifvit.errors import UserError
from ifvit.training import run_folder, trackers
from ifvit.training.metrics import Metrics
from ifvit.training.watch import PLAIN, watch

CONFIG = {"seed": 3, "learning_rate": 1e-3, "resnet_widths": [4, 8]}
ROWS = [(2, 1, "train", {"loss": 4.0}), (2, 1, "val", {"accuracy": 0.5})]
MORE = [(4, 2, "train", {"loss": 3.0}), (4, 2, "val", {"accuracy": 0.75})]


def tracked(folder: Path, step: int, rows: list, *names: str, finished: bool = True) -> None:
    """An attempt of a run, from a step on, that writes some rows."""
    metrics = Metrics(epath.Path(folder), step, 100, "dense_reg", names, CONFIG)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    metrics.keep(epath.Path(folder / "config.json"))
    for row in rows:
        metrics.write(*row)
    metrics.finished = finished
    metrics.close()


def interrupted(folder: Path, *names: str) -> None:
    """A run that dies after step 4 and goes on from its checkpoint of step 2, twice."""
    tracked(folder, 0, [*ROWS, MORE[0]], *names, finished=False)
    tracked(folder, 2, MORE[:1], *names, finished=False)
    tracked(folder, 2, MORE, *names)


def note(folder: Path, tracker: str) -> dict:
    return json.loads((folder / f"{tracker}_dense_reg.json").read_text())


# ---- what the flags say


def test_a_tracker_that_is_not_installed_is_a_sentence_before_the_run(command, prints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = command("train_dense", "--dataset_root", prints, "--preset", "smoke", "--tracker", "wandb", cwd=tmp_path)
    assert (said.code, said.out, list(tmp_path.iterdir())) == (2, "", [])
    assert said.err == (
        "Error: --tracker wandb: Weights & Biases is not installed; pip install 'ifvit[wandb]', or leave it out.\n"
    )


@pytest.mark.parametrize("words", [("--tracker", "tensorboard", "neptune"), ("--tracker=aim",)])
def test_a_tracker_that_nobody_knows_is_the_users_mistake(command, tmp_path, words):
    said = command("train_match", *words, cwd=tmp_path)
    assert said.code == 2 and "tensorboard" in said.err and said.err.count("\n") == 1


def test_trackers_are_given_at_once_or_one_by_one():
    from ifvit import cli, train_all, train_dense
    from tune.__main__ import Args

    for cls in (train_dense.Args, train_all.Args, Args):
        of = lambda *words, cls=cls: cli.parse(cls, "x", list(words)).tracker
        assert of() == ("tensorboard",)
        assert of("--tracker", "wandb", "--tracker", "mlflow", "tensorboard") == ("wandb", "mlflow", "tensorboard")
    assert watch(("tensorboard", "tensorboard")) == PLAIN


@pytest.mark.parametrize("text", ["5", "5:5", "7:3", "-1:3", "a:b", "1:2:3"])
def test_steps_that_make_no_range_are_the_users_mistake(text):
    with pytest.raises(UserError, match="no range START:STOP"):
        watch((), text)


def test_a_trace_after_the_end_is_said_before_the_first_step():
    assert watch((), "3:9").profile == (3, 9)
    watch((), "3:9").check(4)
    with pytest.raises(UserError, match="begins after the last step of this run, 3"):
        watch((), "3:9").check(3)


# ---- one that fails


def broken(where: str) -> MagicMock:
    """A module `wandb`, offline, of which one call raises."""
    module = MagicMock()
    module.setup.return_value.settings.mode = "offline"
    run = module.init.return_value
    run.id = "abc"
    {"init": module.init, "log": run.log, "finish": run.finish}[where].side_effect = OSError("the line is\n dead")
    return module


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_a_line_and_never_the_run(tmp_path, monkeypatch, caplog, where):
    monkeypatch.setitem(sys.modules, "wandb", broken(where))
    folder = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "ifvit"):
        tracked(folder, 0, ROWS + MORE, "wandb", "tensorboard")
    assert [r.getMessage() for r in caplog.records] == [
        "⚠ The tracker wandb has failed (OSError: the line is dead); the run goes on without it, metrics.jsonl has all "
        "rows."
    ]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert list((folder / "tensorboard").iterdir())


@pytest.mark.run
def test_a_run_that_ends_gives_its_trackers_the_configuration_the_curves_and_the_report(
    command, prints, tmp_path, monkeypatch
):
    module = broken("log")
    module.init.return_value.log.side_effect = None
    kept = []
    module.Artifact.return_value.add_file.side_effect = lambda file: kept.append((Path(file).name, Path(file).stat()))
    monkeypatch.setitem(sys.modules, "wandb", module)
    words = ("--dataset_root", prints, "--preset", "smoke", "--set", "num_epochs=1", "--tracker", "wandb")
    said = command("train_dense", *words, cwd=tmp_path)
    assert said.code == 0 and "tracker" not in said.out, said
    assert [name for name, _ in kept] == ["config.json", "curves.png", "report.html"]
    assert all(found.st_size for _, found in kept)


def test_a_tracker_that_hangs_holds_no_step_and_ends_with_a_line(tmp_path, monkeypatch, caplog):
    gone = threading.Event()
    monkeypatch.setitem(trackers.SERVICES, "wandb", lambda name, config, run_id: gone.wait())
    monkeypatch.setattr(trackers, "LAST", 0.1)
    with caplog.at_level(logging.WARNING, "ifvit"):
        tracked(tmp_path / "run", 0, ROWS, "wandb")
    gone.set()
    assert [r.getMessage() for r in caplog.records] == [
        "⚠ The tracker wandb has not taken everything 0.1 s after the end; the run goes on without it, metrics.jsonl "
        "has all rows."
    ]


def test_a_run_that_begins_anew_leaves_what_it_was_to_its_trackers_with_its_checkpoints(tmp_path):
    folder = epath.Path(tmp_path)
    (tmp_path / "wandb_dense_reg.json").write_text('{"id": "abc"}')
    (tmp_path / "wandb_matcher.json").write_text('{"id": "def"}')
    run_folder.move_away(folder, "dense_reg")
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.json")} == {
        "before_1/wandb_dense_reg.json",
        "wandb_matcher.json",
    }


# ---- the libraries themselves, offline

installed = lambda name: pytest.mark.skipif(
    importlib.util.find_spec(name) is None, reason=f"{name} is not installed (pip install '.[{name}]')"
)


@installed("mlflow")
def test_mlflow_has_every_row_once_the_configuration_and_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    interrupted(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "ifvit"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == note(tmp_path / "run", "mlflow")["id"] and run.info.status == "FINISHED"
    history = {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics
    }
    assert history == {"train/loss": [(2, 4.0), (4, 3.0)], "val/accuracy": [(2, 0.5), (4, 0.75)]}
    assert run.data.params == {k: str(v) for k, v in CONFIG.items()}
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["config.json"]

    tracked(tmp_path / "run", 0, ROWS, "mlflow", finished=False)  # from the start: another run
    new = client.get_run(note(tmp_path / "run", "mlflow")["id"])
    assert new.info.run_id != run.info.run_id and new.info.status == "KILLED"


def records(file: Path) -> list:
    """Of a file that W&B writes offline: LevelDB's log of protocol buffers, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record begins in a block's last bytes
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


@installed("wandb")
def test_wandb_has_every_row_once_the_configuration_and_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    import wandb

    interrupted(tmp_path / "run", "wandb")
    wandb.teardown()  # its own process has written all
    run_id = note(tmp_path / "run", "wandb")["id"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    assert {f.name for f in files} == {f"run-{run_id}.wandb"}
    told = [r for file in files for r in records(file)]
    rows = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        for r in told
        if r.WhichOneof("record_type") == "history"
    ]
    assert [{k: v for k, v in row.items() if k[0] != "_"} for row in rows] == [
        {"step": step, "epoch": epoch, **{f"{split}/{k}": v for k, v in values.items()}}
        for step, epoch, split, values in ROWS + MORE
    ]
    config = {u.key: json.loads(u.value_json) for r in told for u in r.run.config.update}
    assert CONFIG.items() <= config.items()
    assert {r.run.run_id for r in told if r.HasField("run")} == {run_id}
    kept = [r.artifact for r in told if r.HasField("artifact")] + [r.request.log_artifact.artifact for r in told]
    assert {e.path for a in kept for e in a.manifest.contents} == {"config.json"}
