"""Where a run's metrics go beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow."""

import functools
import json
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from ifvit.files import write_whole

log = logging.getLogger("ifvit")

LAST = 60  # seconds that a tracker gets at the end of a run for what it still has to send
PROJECT = "ifvit"  # of W&B, and MLflow's experiment, where the user's environment names none


@runtime_checkable
class Tracker(Protocol):
    """What a run's metrics are handed to."""

    def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
        """A row, in the order of the steps."""

    def keep(self, file: epath.Path) -> None:
        """A file of the run, to be kept as an artefact."""

    def close(self, finished: bool) -> None:
        """The run ends here, or is stopped."""


def note_name(tracker: str, run: str) -> str:
    """The file in a run's folder that tells which of a tracker's runs it is; both modules may have one folder."""
    return f"{tracker}_{run}.json"


def notes(run: str) -> tuple[str, ...]:
    """Of all trackers that have one."""
    return tuple(note_name(tracker, run) for tracker in SERVICES)


def open_trackers(
    names: tuple[str, ...], here: Path, folder: epath.Path, run: str, step: int, config: dict
) -> list[Tracker]:
    """Those of a run that goes on after `step`, 0: a new one; `here` is the local folder of what lies in `folder`."""
    opened: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            opened.append(Board(here, step))
        else:
            shown = "/".join(os.fspath(folder).rstrip("/").split("/")[-2:])
            begin = functools.partial(SERVICES[name], shown, config)
            opened.append(Service(name, begin, here / note_name(name, run), anew=step == 0))
    return opened


class Board:
    """TensorBoard's event file, without tensorboardX's own thread: that blocks for good when a write fails."""

    def __init__(self, folder: Path, step: int):
        self._folder, self._step = folder / "tensorboard", step
        self._events: EventsWriter | None = None

    def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
        if step <= self._step:  # it has the rows of a run that goes on
            return
        try:
            if self._events is None or not self._folder.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                self._events = EventsWriter(str(self._folder / "events"))
                self._events.write_event(
                    Event(wall_time=time.time(), step=self._step + 1, session_log=SessionLog(status=SessionLog.START))
                )  # drops what came after
            for name, value in values.items():
                self._events.write_event(
                    Event(wall_time=time.time(), step=step, summary=scalar(f"{split}/{name}", value))
                )
            self._events.flush()
        except OSError:
            self._events = None  # a new file at the next row; these values stand in metrics.jsonl

    def keep(self, file: epath.Path) -> None:
        """It shows numbers alone."""

    def close(self, finished: bool) -> None:
        """Every row is flushed."""


class Service:
    """A tracker of another library, in a thread of its own: no step waits for it, and what it raises costs a line.

    `note` is a file that holds the id of its run and, of each split, the step up to which it was told. A run that
    goes on after a crash makes some rows again, equal ones; the tracker is told those alone that it has not been told.
    """

    def __init__(self, name: str, begin: Callable[[str], Any], note: Path, anew: bool):
        self._name, self._begin, self._note, self._anew = name, begin, note, anew
        self._tracker: Any = None
        self._failed = False
        self._todo: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)
        self._thread.start()

    def write(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
        self._todo.put(functools.partial(self._write, step, epoch, split, values, time.time()))

    def keep(self, file: epath.Path) -> None:
        self._todo.put(functools.partial(self._keep, file))

    def close(self, finished: bool) -> None:
        self._todo.put(functools.partial(self._close, finished))
        self._thread.join(LAST)
        if self._thread.is_alive():
            self._say(f"has not taken everything {LAST} s after the end")

    def _run(self) -> None:
        try:
            told = {} if self._anew else _read(self._note)
            self._told: dict[str, int] = told.get("told", {})
            self._tracker = self._begin(told.get("id", ""))
            self._write_note()
            while self._tracker is not None:
                self._todo.get()()
        except Exception as e:  # whatever a library raises, it is the tracker's end and not the run's
            self._say(f"has failed ({type(e).__name__}: {' '.join(str(e).split())[:300]})")

    def _write(self, step: int, epoch: int, split: str, values: dict[str, float], when: float) -> None:
        if step > self._told.get(split, -1):
            self._tracker.write(step, epoch, {f"{split}/{k}": v for k, v in values.items()}, when)
            self._told[split] = step
            self._write_note()

    def _keep(self, file: epath.Path) -> None:
        if file.exists():  # what could not be written has been told
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder, file.name)
                copy.write_bytes(file.read_bytes())
                self._tracker.keep(copy)

    def _close(self, finished: bool) -> None:
        self._tracker.close(finished)
        self._tracker = None

    def _write_note(self) -> None:
        try:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._note, json.dumps({"id": self._tracker.id, "told": self._told}) + "\n")
        except OSError:
            pass  # a full disk, say; the note of the next row tells all

    def _say(self, what: str) -> None:
        if not self._failed:
            self._failed = True
            log.warning(
                "⚠ The tracker %s %s; the run goes on without it, metrics.jsonl has all rows.", self._name, what
            )


def _read(note: Path) -> dict:
    """A note; nothing where there is none, or no whole one."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class WeightsAndBiases:
    """A run of W&B: https://docs.wandb.ai; its variables WANDB_MODE, WANDB_PROJECT, WANDB_NAME … hold."""

    def __init__(self, name: str, config: dict, run_id: str):
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(console="off", silent=True, finish_timeout=LAST / 2)
        if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("it knows no API key; `wandb login` tells it one, WANDB_MODE=offline does without")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or name,
            id=run_id or None,
            resume="allow" if run_id else None,
            config=config,
            allow_val_change=True,  # of the keys that a run may change when it goes on
            reinit="create_new",  # both modules' runs, and trials, are runs of their own
            settings=settings,
        )
        # Not W&B's own count, which refuses a step that it has passed: validation's row has that of training's.
        self._run.define_metric("*", step_metric="step")
        self.id = self._run.id

    def write(self, step: int, epoch: int, values: dict[str, float], when: float) -> None:
        self._run.log({"step": step, "epoch": epoch, **values})

    def keep(self, file: Path) -> None:
        artifact = self._wandb.Artifact(f"{self.id}-{file.stem}", type=file.stem)
        artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow: https://mlflow.org/docs; its variables MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME … hold."""

    def __init__(self, name: str, config: dict, run_id: str):
        import mlflow
        from mlflow.entities import Metric, Param

        for library in ("mlflow", "alembic"):  # they tell of every table that is made
            logging.getLogger(library).setLevel(logging.WARNING)
        self._metric, self._client, self.id = Metric, mlflow.MlflowClient(), run_id
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
            return
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        self.id = self._client.create_run(experiment.experiment_id, run_name=name).info.run_id
        params = [Param(k, str(v)) for k, v in config.items()]
        for n in range(0, len(params), 100):  # it takes no more at once
            self._client.log_batch(self.id, params=params[n : n + 100])

    def write(self, step: int, epoch: int, values: dict[str, float], when: float) -> None:
        at = int(1000 * when)  # ms
        self._client.log_batch(self.id, metrics=[self._metric(k, v, at, step) for k, v in values.items()])

    def keep(self, file: Path) -> None:
        self._client.log_artifact(self.id, str(file))

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


SERVICES = {"wandb": WeightsAndBiases, "mlflow": MLflow}
