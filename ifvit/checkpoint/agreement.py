"""What the processes that write one checkpoint tell each other."""

from ifvit.checkpoint.metadata import reason
from ifvit.devices.processes import exchange

BARRIER_MS = 600_000  # that one process waits for the others' part of a checkpoint


def agree(what: str, failure: Exception | None) -> None:
    """Every process says how it went: raises `failure`, or OSError where another process has failed."""
    said = exchange(what, reason(failure) if failure else "", BARRIER_MS)
    if any(said) and not failure:
        raise OSError("; ".join(f"process {n}: {text}" for n, text in enumerate(said) if text))
    if failure:
        raise failure
