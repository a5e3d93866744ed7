"""What a run is asked to show beside its files: trackers, and a trace of some of its steps."""

import importlib.util
import re
import sys
from dataclasses import dataclass

from ifvit.errors import UserError

TENSORBOARD = ("tensorboard",)
LIBRARIES = {"wandb": "Weights & Biases", "mlflow": "MLflow"}  # what is installed on request: module -> its name


@dataclass(frozen=True)
class Watch:
    """No key of the configuration: a run's bits do not depend on it."""

    trackers: tuple[str, ...] = TENSORBOARD
    profile: tuple[int, int] | None = None  # the steps after the first number, to the second

    def check(self, steps: int) -> None:
        """UserError for a trace of steps that a run of so many does not have."""
        if self.profile and self.profile[0] >= steps:
            raise UserError(
                f"--profile {self.profile[0]}:{self.profile[1]} begins after the last step of this run, {steps}; give "
                "earlier steps."
            )


PLAIN = Watch()


def watch(trackers: tuple[str, ...], profile: str = "") -> Watch:
    """Of the flags `--tracker` and `--profile`; UserError where a tracker is not installed, or no steps are named."""
    for name in trackers:
        if name in LIBRARIES and not _is_installed(name):
            raise UserError(
                f"--tracker {name}: {LIBRARIES[name]} is not installed; pip install 'ifvit[{name}]', or leave it out."
            )
    return Watch(tuple(dict.fromkeys(trackers)), _steps(profile) if profile else None)


def _steps(text: str) -> tuple[int, int]:
    numbers = re.fullmatch(r"(\d+):(\d+)", text)
    if not numbers or not int(numbers[1]) < int(numbers[2]):
        raise UserError(
            f"--profile {text} is no range START:STOP; give two whole numbers, the second the greater, e.g. 20:25 for "
            "the five steps after step 20."
        )
    return int(numbers[1]), int(numbers[2])


def _is_installed(module: str) -> bool:
    return sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None
