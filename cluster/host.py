"""What a run sees of the process it is in: whether it is asked to stop, and where it reports to."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

# What a process may be asked, the strongest last. SAVE: to save, because its host will go soon. The others: to save and
# stop, with this exit code.
SAVE, PREEMPTED, INTERRUPTED = 1, 75, 130
HUNG = 70  # exit code of a process that ended itself because nothing moved any more


class ClusterError(Exception):
    """The user asked for something that cannot be had. The text is one sentence with its remedy."""


class Host:
    """A run's only process; it notes signals while `stoppable`. `worker.Worker` is one of several processes."""

    name = ""  # names host and process, where there are several
    rank = 0
    first_here = True  # whether it is the first process on its host

    def __init__(self):
        self._asked = 0

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """A block in which SIGINT and SIGTERM are only noted. A second SIGINT stops at once."""
        main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
        before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM) if main}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _note(self, number, frame):
        if self._asked == INTERRUPTED and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = INTERRUPTED if number == signal.SIGINT else PREEMPTED

    def asked(self) -> int:
        """What this process is asked: 0 (nothing), SAVE (once for each notice), PREEMPTED or INTERRUPTED."""
        return self._asked

    def watched(self, progress: Callable[[], int]) -> contextlib.AbstractContextManager:
        """A block in which `progress()` has to grow. A single process is not watched: it waits for no other."""
        return contextlib.nullcontext()

    def has_begun(self, what: str) -> bool:
        """Whether `begun` was called with `what` since the command was started, by this process or one it replaces."""
        return False

    def begun(self, what: str) -> None:
        """Notes that the command need not begin `what` again when its processes are started again."""

    def report(self, values: dict) -> None:
        """Sends the metrics of an epoch to whoever looks after the run."""

    def saved(self) -> None:
        """Notes that a checkpoint is whole, so that the work up to it cannot be lost."""


@contextlib.contextmanager
def watchdog(progress: Callable[[], int], seconds: float, name: str) -> Iterator[None]:
    """Ends the process with exit code HUNG when `progress()` has not grown for `seconds`; 0: never.

    It begins to watch at the first growth, because compiling before that may take any time. Ending the process is the
    only way out of a collective that another process never joins.
    """
    over = threading.Event()

    def watch():
        seen, since, begun = progress(), time.monotonic(), False
        while not over.wait(min(1.0, seconds / 4)):
            if (now := progress()) != seen:
                seen, since, begun = now, time.monotonic(), True
            elif begun and time.monotonic() - since > seconds:
                print(
                    f"⚠ {name or 'This process'} has not moved for {seconds:g} s (a collective that hangs?); it ends "
                    "itself, and the run goes on from the newest checkpoint.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(HUNG)

    thread = threading.Thread(target=watch, daemon=True, name="watchdog")
    if seconds:
        thread.start()
    try:
        yield
    finally:
        over.set()
