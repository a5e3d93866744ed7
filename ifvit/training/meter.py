"""Every clock and every sum of a training run: they make the rows of metrics."""

import time
from collections.abc import Iterator

import jax
import numpy as np

from cluster.host import Host
from ifvit.config import Config
from ifvit.devices import progress
from ifvit.devices.peak import peak
from ifvit.errors import Failure
from ifvit.training.metrics import Metrics
from ifvit.training.pace import Pace
from ifvit.training.saver import Saver

ROW = 10  # steps between two rows of metrics
WAITS = ("input_seconds", "compile_seconds", "checkpoint_seconds")  # the part of a row's seconds outside steps


class Meter:
    """Adds up metrics and times of steps, writes a row every ROW steps, and notes what the run is asked.

    It fetches a step's metrics one step late, so that the device computes the next step meanwhile.
    """

    def __init__(self, metrics: Metrics, saver: Saver, host: Host, batch_size: int, steps_per_epoch: int, first: int):
        self.asked = 0  # `Host.asked` of any process; all processes get it in the same step
        self._metrics, self._saver, self._host = metrics, saver, host
        self._batch_size, self._steps_per_epoch, self._first = batch_size, steps_per_epoch, first
        self._several = jax.process_count() > 1
        self._pace = Pace(host.name)
        self._flops = self._peak = None  # of a step, and a second at most, of all devices; None: not known
        self._waiting: tuple[int, dict] | None = None  # the newest step, and its metrics on the device
        self._sums: dict[str, list[float]] = {}
        self._waits = {"input_seconds": 0.0, "compile_seconds": 0.0}
        self._written = first  # the step of the newest row
        self._row_began = self._epoch_began = time.perf_counter()
        self._epoch_waits = dict.fromkeys(WAITS, 0.0)

    def next_batch(self, batches: Iterator[dict]) -> dict:
        """The next batch of this process. Where there are several, the batch also tells what this one is asked."""
        began = time.perf_counter()
        batch = next(batches)
        self._waits["input_seconds"] += time.perf_counter() - began
        if self._several:
            batch["asked"] = np.full(self._batch_size // jax.process_count(), self._host.asked(), np.int32)
        self._step_began = time.perf_counter()
        return batch

    def count_flops(self, step: jax.stages.Compiled, config: Config) -> None:
        """What the compiled step costs, by XLA's own count, which is of one device and has each loop's body once."""
        flops = (step.cost_analysis() or {}).get("flops", 0.0)
        if flops > 0:  # else XLA cannot tell on this device
            self._flops = flops * config.accumulate * jax.device_count()
            most = peak(jax.devices()[0].device_kind, config.compute_dtype)
            self._peak = most and most * jax.device_count()

    def add(self, step: int, out: dict) -> None:
        """Takes the metrics of a step that has just been started. Failure for NaN or Inf in the step before it."""
        if step == self._first + 1:  # this step was compiled first, which does not count as time in steps
            jax.block_until_ready(out)
            self._waits["compile_seconds"] = time.perf_counter() - self._step_began
        self._collect()
        self._waiting = step, out
        if not self._several:
            self.asked = self._host.asked()

    def row_is_due(self, step: int) -> bool:
        return step - self._written >= ROW

    def write_row(self, step: int) -> None:
        """Writes a row of `train` metrics: means over the steps since the last row, and the times."""
        self._collect()
        seconds = time.perf_counter() - self._row_began
        rate = (step - self._written) * self._batch_size / seconds
        means = {k: float(np.mean(v)) for k, v in self._sums.items()}
        times = {"seconds": seconds, "pairs_per_second": rate, "checkpoint_seconds": self._saver.blocked, **self._waits}
        if self._flops:
            times["flops_per_second"] = self._flops * (step - self._written) / seconds
            times |= {"peak_share": times["flops_per_second"] / self._peak} if self._peak else {}
        self._metrics.write_steps(step, (step - 1) // self._steps_per_epoch + 1, means, times)
        self._metrics.progress(step - self._written, means["loss"], rate)
        self._epoch_waits = {k: v + times[k] for k, v in self._epoch_waits.items()}
        self._waits = dict.fromkeys(self._waits, 0.0)
        self._sums, self._row_began, self._written, self._saver.blocked = {}, time.perf_counter(), step, 0.0

    def compare_processes(self) -> dict[str, list]:
        """At an epoch's end, the seconds that each process spent in steps and in waiting; {} for a single process."""
        return self._pace.compare(self._epoch_waits, time.perf_counter() - self._epoch_began)

    def begin_epoch(self) -> None:
        """Starts the clocks of an epoch. Validation, which came before, does not count as time in steps.

        The checkpoint at the end of the last epoch counts with the next row, in `checkpoint_seconds`.
        """
        self._row_began = self._epoch_began = time.perf_counter() - self._saver.blocked
        self._epoch_waits = dict.fromkeys(WAITS, 0.0)

    def _collect(self) -> None:
        """Fetches the metrics of the step before, and what any process was asked. Failure for NaN or Inf."""
        if self._waiting is None:
            return
        (step, out), self._waiting = self._waiting, None
        out = jax.device_get(out)
        progress.made()
        self.asked = max(self.asked, int(out.pop("asked", 0)))
        for k, v in out.items():
            v = float(v)
            if not np.isfinite(v):
                raise Failure(
                    f"{k} is {v} at step {step}; nothing was saved after the last checkpoint. Lower the learning "
                    "rate (--set learning_rate=…), then run again."
                )
            self._sums.setdefault(k, []).append(v)
