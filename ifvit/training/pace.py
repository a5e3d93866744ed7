"""Finds the slow processes of a run. One slow process makes all others wait, and then all look equally slow.

A step ends on all processes at the same time, so its duration does not tell who was slow. Two times do, because they
depend on one process alone: how long it waits for its own batches, and how long its first device needs for a piece of
work that is the same everywhere.
"""

import json
import logging
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ifvit.devices.processes import exchange

log = logging.getLogger("ifvit")

SLOW = 1.5  # a process is slow that needs more than so many times the median of all
NOTEWORTHY = 0.1  # share of an epoch that a process may wait for input before it is named


class Pace:
    """Compares the times of the processes at the end of every epoch."""

    def __init__(self, name: str):
        self.name = name
        self.several = jax.process_count() > 1
        self._before: set[str] = set()  # the processes that were slow in the epoch before, and not yet named

    def compare(self, waits: dict[str, float], seconds: float) -> dict[str, list]:
        """The seconds that each process spent in steps, in `waits` (`input_seconds` …) and on the probe.

        `seconds`: duration of the epoch. It names slow processes in the log. {} for a single process.
        """
        if not self.several:
            return {}
        mine = waits | {"step_seconds": seconds - sum(waits.values()), "probe_seconds": probe()}
        said = [
            json.loads(s)
            for s in exchange("pace", json.dumps({"host": self.name} | {k: round(v, 6) for k, v in mine.items()}))
        ]
        if jax.process_index() == 0:
            found = slow(said, seconds)
            for host in self._before & found.keys():  # slow in one epoch alone may have any cause
                log.warning("⚠ %s", found[host])
            self._before = found.keys() - self._before
        return {k: [s[k] for s in said] for k in said[0]}


def slow(said: list[dict], seconds: float) -> dict[str, str]:
    """The processes that are much slower than the others (SLOW), or wait long for input: name -> a sentence."""
    usual = {k: statistics.median_low([s[k] for s in said]) for k in ("probe_seconds", "input_seconds")}
    found = {}
    for s in said:
        if s["probe_seconds"] > SLOW * usual["probe_seconds"]:
            found[s["host"]] = (
                f"{s['host']} is slow: its device takes {s['probe_seconds'] / usual['probe_seconds']:.1f} times as "
                "long as the others' for the same work, and every step waits for it."
            )
        elif s["input_seconds"] > max(SLOW * usual["input_seconds"], NOTEWORTHY * seconds):
            found[s["host"]] = (
                f"{s['host']} is slow: it waits for its prints for {s['input_seconds']:.1f} of the epoch's "
                f"{seconds:.1f} s, the others for {usual['input_seconds']:.1f} s."
            )
    return found


def probe() -> float:
    """The seconds that this process's first device needs for a fixed piece of work; the best of five."""
    size = 384 if jax.default_backend() == "cpu" else 4096
    times = []
    with jax.set_mesh(Mesh([jax.local_devices()[0]], ("alone",))):
        x = jnp.asarray(np.full((size, size), 1 / size, np.float32))
        jax.block_until_ready(_work(x))  # compiles
        for _ in range(5):
            clock = time.perf_counter()
            jax.block_until_ready(_work(x))
            times.append(time.perf_counter() - clock)
    return min(times)


@jax.jit
def _work(x):
    return jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ x), x)
