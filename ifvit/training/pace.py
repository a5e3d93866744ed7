"""How fast each process of a run is: in a run of many, one that is slow makes all of them wait, and looks like them.

A step ends everywhere at the same time, so its duration says nothing of who was waited for. What a process alone
is answerable for is measured: the time it waits for its own batches, and the time its first device needs
for a piece of work that is the same on all.
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

SLOW = 1.5  # times the median of all processes
NOTEWORTHY = 0.1  # share of an epoch's time that one may wait for input before it is named


class Pace:
    """What this process needed in an epoch, set against the others at its end."""

    def __init__(self, name: str):
        self.name = name
        self.several = jax.process_count() > 1
        self._before: set[str] = set()  # who was slow in the epoch before

    def compare(self, waits: dict[str, float], seconds: float) -> dict[str, list]:
        """Per process what it spent of an epoch's seconds in steps and in `waits` (`input_seconds` …), and
        `probe_seconds`; the slow ones are named in the log. Nothing for a process alone."""
        if not self.several:
            return {}
        mine = waits | {"step_seconds": seconds - sum(waits.values()), "probe_seconds": probe()}
        said = [
            json.loads(s)
            for s in exchange("pace", json.dumps({"host": self.name} | {k: round(v, 6) for k, v in mine.items()}))
        ]
        if jax.process_index() == 0:
            found = slow(said, seconds)
            for host in self._before & found.keys():  # once may be anything
                log.warning("⚠ %s", found[host])
            self._before = found.keys() - self._before
        return {k: [s[k] for s in said] for k in said[0]}


def slow(said: list[dict], seconds: float) -> dict[str, str]:
    """The processes that are slower than the usual one by more than SLOW, or starve: name -> a sentence."""
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
    """Seconds of a fixed piece of work on this process's first device, the best of five."""
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
