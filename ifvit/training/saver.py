"""Writes the checkpoints of a run while it trains."""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from etils import epath

from ifvit import checkpoint
from ifvit.checkpoint.places import duplicate, remove
from ifvit.config import Config
from ifvit.devices.processes import exchange
from ifvit.errors import UserError
from ifvit.training.policy import Saved, doomed, ranked
from ifvit.training.run_folder import candidates, set_aside, write_beside

log = logging.getLogger("ifvit")

OWNER = "owner"  # a file in a run's folder that names the attempt which may write there: the newest one


TAKEN_OVER = "another run has begun to write here"


class TakenOver(Exception):
    """Another run was started on this run's folder."""


def take(folder: epath.Path) -> str:
    """Lets a new attempt write to a run's folder, and none from before, and returns the new one's name.

    What an earlier attempt is writing gets no name any more.
    """
    owner = uuid.uuid4().hex

    def write(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(owner, encoding="utf-8")

    write_beside(folder / OWNER, write)
    return owner


class Saver:
    """Writes a run's checkpoints in the background and keeps those that `config` asks for.

    When a write fails, one line says so; the older checkpoints stay, the run goes on, and the next save tries again.
    Every process calls the same methods in the same order.
    """

    def __init__(
        self,
        folder: epath.Path,
        module: str,
        config: Config,
        steps_per_epoch: int,
        higher_is_better: bool,
        whole: Callable[[], None] = lambda: None,
    ):
        self.whole = whole  # the writing thread calls this when a checkpoint is whole
        self.folder, self.module, self.config = folder, module, config
        self.higher_is_better = higher_is_better
        self.blocked = 0.0  # seconds that training has waited for saving since the caller last set it to 0
        self.last: str | None = None  # name of the newest checkpoint that is whole
        self.taken_over = False  # another run writes to this folder now
        self._owner = take(folder)
        self._thread = ThreadPoolExecutor(1)
        self._pending: tuple[str, Future] | None = None
        self._saved = list(_already_there(folder, module, steps_per_epoch))
        checkpoint.discard_unfinished(folder, f"{module}_*")  # a run that died may have left them
        self._check_best()

    def _is_owner(self) -> bool:
        with contextlib.suppress(OSError):  # the folder is gone or cannot be read: then the write itself fails
            return (self.folder / OWNER).read_text(encoding="utf-8") == self._owner
        return True

    def _still_ours(self) -> bool:
        """Whether no other run was started on this folder after this one. The first process looks for all."""
        ours = jax.process_index() > 0 or self._is_owner()
        return exchange("owner", "" if ours else "another", checkpoint.BARRIER_MS)[0] == ""

    def _check_owner(self) -> None:
        """The one that has begun meanwhile may have deleted parts of what was being written."""
        if not self._is_owner():  # no TakenOver, of which the other processes would not know: the next save tells all
            raise RuntimeError(TAKEN_OVER)

    def start(
        self, saved: Saved, state: dict, metadata: dict, aligner: dict | None, template: dict | None = None
    ) -> None:
        """Copies `state` and begins to write it. First it waits until the checkpoint before is written."""
        clock = time.perf_counter()
        self.settle()
        state = checkpoint.snapshot(state)
        self._pending = saved.name, self._thread.submit(self._write, saved, state, metadata, aligner, template)
        self.blocked += time.perf_counter() - clock

    def settle(self) -> bool:
        """Waits until nothing is being written. False when the last write failed, which the log then says."""
        if self._pending is None:
            return False
        (name, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as e:  # a disk has many ways to fail, and none of them is a reason to stop training
            # Set here and not in the thread, so that every process knows it at the same step.
            self.taken_over = isinstance(e, TakenOver)
            log.warning(
                "⚠ Checkpoint %s could not be written (%s); training goes on, and the next save tries again.",
                self.folder / name,
                checkpoint.reason(e),
            )
            return False
        self.last = name
        return True

    def close(self) -> None:
        self.settle()
        self._thread.shutdown()

    def _write(self, saved: Saved, state: dict, metadata: dict, *beside: dict | None) -> None:
        if not self._still_ours():
            raise TakenOver(TAKEN_OVER)
        checkpoint.discard_unfinished(self.folder, f"{self.module}_*")  # a write that failed may have left them
        checkpoint.save(self.folder / saved.name, self.module, state, metadata, *beside, before_named=self._check_owner)
        self.whole()
        self._saved = [s for s in self._saved if s.name != saved.name] + [saved]
        if jax.process_index() == 0:
            try:
                self._copy_best()
                for name in doomed(self._saved, self.module, self.config, self.higher_is_better):
                    self._remove(name)
            except OSError as e:  # the checkpoint itself is whole
                log.warning(
                    "⚠ The checkpoints in %s could not be put in order (%s); the next save tries again.",
                    self.folder,
                    e.strerror,
                )
                checkpoint.discard_unfinished(self.folder, f"{self.module}_best")

    def _check_best(self) -> None:
        """Sets a damaged `NAME_best` aside at the start: it would stay for ever where no later epoch is better."""
        there = self.folder / f"{self.module}_best"
        if jax.process_index() == 0 and checkpoint.has_name(there):
            try:
                checkpoint.load(there)
            except checkpoint.Damaged as e:
                log.warning("⚠ %s It is set aside as %s.", e, set_aside(there))

    def _copy_best(self) -> None:
        """Makes `NAME_best` a copy of the best epoch's checkpoint.

        The copy has files of its own, so that damage to one checkpoint does not damage the other.
        """
        best = ranked(self._saved, self.higher_is_better)[:1]
        there = self.folder / f"{self.module}_best"
        before = _value_of(there)
        if (
            not best
            or before is not None
            and ranked([Saved("", -1, 0, before), *best], self.higher_is_better)[0].step < 0
        ):
            return
        duplicate(self.folder / best[0].name, there)

    def _remove(self, name: str) -> None:
        self._saved = [s for s in self._saved if s.name != name]
        remove(self.folder / name)


def _already_there(folder: epath.Path, module: str, steps_per_epoch: int) -> Iterator[Saved]:
    for path in candidates(folder, module, steps_per_epoch):
        if not path.name.endswith(checkpoint.OLD) and checkpoint.complete(path):
            metadata = checkpoint.read_metadata(path)
            whole = metadata["step"] % steps_per_epoch == 0
            yield Saved(path.name, metadata["step"], metadata["epoch"] if whole else None, metadata.get("value"))


def _value_of(folder: epath.Path) -> float | None:
    try:
        return checkpoint.read_metadata(folder)["value"]
    except UserError:
        return None
