"""How far a long piece of work is: a bar with the time left, or a line a minute where there is no terminal."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm import tqdm

QUIET = 10.0  # seconds: what is done by then shows nothing
log = logging.getLogger("ifvit")


class _Lines:
    """What tqdm's bar is on a terminal, as lines of the log."""

    def __init__(self, name: str, total: int, unit: str, every: float):
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.done, self.began = 0, time.monotonic()
        self.told = self.began

    def update(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= self.every and self.done < self.total:
            self.told = now
            rate = self.done / (now - self.began)
            left = tqdm.format_interval((self.total - self.done) / rate)
            log.info(
                "%s: %s of %s %ss, %.1f a second, %s left",
                self.name,
                f"{self.done:,}",
                f"{self.total:,}",
                self.unit,
                rate,
                left,
            )


@contextmanager
def bar(name: str, total: int, unit: str, every: float = 60.0) -> Iterator[tqdm | _Lines]:
    """An object with `update(count)`, to be told how many units more are done.

    Of several processes the first one shows it.
    """
    silent = jax.process_index() > 0
    if silent or sys.stderr.isatty():
        with tqdm(
            total=total,
            desc=name,
            unit=unit,
            file=sys.stderr,
            mininterval=1,
            delay=QUIET,
            dynamic_ncols=True,
            leave=False,
            disable=silent,
        ) as shown:
            yield shown
    else:
        yield _Lines(name, total, unit, every)
