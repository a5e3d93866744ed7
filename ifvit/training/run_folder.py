"""A run's folder: finds the checkpoints that a run can go on from, and moves others out of the way."""

import logging
import math
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from ifvit import checkpoint
from ifvit.checkpoint.places import written_here
from ifvit.errors import UserError
from ifvit.training.trackers import notes

log = logging.getLogger("ifvit")


def candidates(folder: epath.Path, module: str, steps_per_epoch: int, beyond: int = -1) -> list[epath.Path]:
    """The checkpoints that a run can go on from, of steps after `beyond`, the furthest first.

    One that was just being replaced (`OLD`) counts under its own name.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        step = step_of_name(path.name.removesuffix(checkpoint.OLD), module, steps_per_epoch)
        if step is not None and step > beyond and checkpoint.has_name(path):
            found.append((step, not path.name.endswith(checkpoint.OLD), path))
    return [path for *_, path in sorted(found, key=lambda f: f[:2], reverse=True)]


def step_of_name(name: str, module: str, steps_per_epoch: int) -> float | None:
    """The step of a checkpoint of this name; infinite for the final one. None where no run goes on from such a name."""
    match = re.fullmatch(rf"{module}_(?:ckpt|epoch_(\d+)|step_(\d+))", name)
    if not match:
        return None
    epoch, step = match.groups()
    return int(epoch) * steps_per_epoch if epoch else int(step) if step else math.inf


def set_aside(path: epath.Path) -> epath.Path:
    """Renames a bad checkpoint to `NAME.damaged`, or `.damaged.2` and so on. It is never deleted."""
    name = path.name.removesuffix(checkpoint.OLD) + ".damaged"
    n = 1
    while (aside := path.with_name(name if n == 1 else f"{name}.{n}")).exists():
        n += 1
    if jax.process_index() == 0:
        path.rename(aside)
    return aside


def move_away(folder: epath.Path, module: str, steps_per_epoch: int = 1, beyond: int = -1) -> None:
    """Moves the checkpoints after step `beyond` to `before_N`, for a run that begins anew or from an earlier step.

    What the run was to its trackers goes with them.
    """
    best = folder / f"{module}_best"
    old = candidates(folder, module, steps_per_epoch, beyond)
    old += [best] if checkpoint.has_name(best) and (beyond < 0 or _step_of(best) > beyond) else []
    old += [note for name in notes(module) if (note := folder / name).is_file()]
    n = 1
    while (aside := folder / f"before_{n}").exists():
        n += 1
    if old and jax.process_index() == 0:
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)


def _step_of(folder: epath.Path) -> int:
    try:
        return checkpoint.read_metadata(folder)["step"]
    except UserError:
        return -1


def write_beside(file: epath.Path, write: Callable[[Path], None]) -> None:
    """Writes a file beside the checkpoints, on the first process. When that fails it warns, and the run goes on."""
    if jax.process_index() == 0:
        try:
            with written_here(file) as here:
                write(here)
        except OSError as e:
            log.warning("⚠ %s could not be written (%s).", file, e.strerror)


def writable(folder: epath.Path) -> str | None:
    """Why checkpoints cannot be written to a folder; None where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as e:
        return e.strerror
    return None
