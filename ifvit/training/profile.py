"""A trace of some of a run's steps, by JAX's profiler, for TensorBoard's and XProf's viewers."""

import logging
from pathlib import Path

import jax

log = logging.getLogger("ifvit")


class Profile:
    """Traces the steps after `steps[0]` to `steps[1]` into `folder`, in the first process. One that fails costs a line.

    A run that goes on from within them traces what is left; from after them, nothing.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, shown: str):
        first = jax.process_index() == 0
        self._steps, self._folder, self._shown = steps if first else None, folder, shown
        self._annotation: jax.profiler.StepTraceAnnotation | None = None
        self._from: int | None = None  # the step before the first that is traced, while a trace is taken

    def before(self, at: int) -> None:
        """The step after step `at` is about to be started."""
        if self._steps is None or not self._steps[0] <= at < self._steps[1]:
            return
        if self._from is None:
            self._begin(at)
        if self._from is not None:
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=at + 1)
            self._annotation.__enter__()

    def after(self, step: int, out: dict) -> None:
        """A step has been started; `out`, of it, is waited for at the end of a trace."""
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if self._from is not None and self._steps and step == self._steps[1]:
            jax.block_until_ready(out)
            self._end(step)

    def close(self) -> None:
        """Ends a trace that the run has not come to the end of."""
        if self._from is not None:
            self._end(None)

    def _begin(self, at: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would be slow, and many
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._from = at
        except (OSError, RuntimeError) as e:
            self._fail(e)

    def _end(self, step: int | None) -> None:
        begun, self._from, self._steps = self._from, None, None
        try:
            jax.profiler.stop_trace()
            what = f"steps {begun + 1} to {step}" if step else f"the steps from {begun + 1} on"
            print(f"The trace of {what} lies in {self._shown} (tensorboard --logdir, or xprof).", flush=True)
        except (OSError, RuntimeError) as e:
            self._fail(e)

    def _fail(self, e: Exception) -> None:
        self._steps = None
        log.warning("⚠ No trace could be written to %s (%s); the run goes on.", self._shown, str(e).splitlines()[0])
