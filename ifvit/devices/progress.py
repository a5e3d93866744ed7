"""Counts a run's steps, for a watchdog that checks whether the run still moves."""

_count = 0


def made() -> None:
    """Counts a step, or a batch of validation, that is done."""
    global _count
    _count += 1


def count() -> int:
    return _count
