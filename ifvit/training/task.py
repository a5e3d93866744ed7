"""All that the training loop knows of a module."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ifvit.config import Config
from ifvit.training.state import TrainState


@dataclass
class Task:
    """All that differs between the two modules for the loop."""

    name: str  # `dense_reg` or `matcher`; the files' names begin so
    config: Config
    steps_per_epoch: int
    data_digest: str
    init: Callable[[int], TrainState]  # (seed) -> state; it is pure, and also evaluated for its shapes alone
    step: Callable  # (state, batch, rate, *constants) -> (state, metrics)
    rates: np.ndarray  # (steps,) the learning rate of each step
    constants: tuple  # the configuration's scalars, Module 1's frozen parameters
    batches: Callable[[int, int], Iterator[dict]]  # (first step, last step) -> host batches
    validate: Callable[[TrainState, int], dict[str, float]]  # (state, epoch) -> metrics
    metric: str  # the validation metric that chooses the best checkpoint
    higher_is_better: bool
    metadata: dict  # more metadata for checkpoints, e.g. `num_classes`
    to_saved: Callable[[dict], dict] = lambda tree: tree  # params -> params in the checkpoint
    from_saved: Callable[[dict], dict] = lambda tree: tree
    aligner: dict | None = None
    finish: Callable[[TrainState], dict] = lambda state: {}  # metadata of the final checkpoint only
    # (state, finished) -> what Module 1 makes templates of prints by, of a checkpoint that has it
    template: Callable[[TrainState, bool], dict | None] = lambda state, finished: None
    of_epoch: Callable[[], dict] = lambda: {}  # metadata of an epoch's checkpoint, by the validation before it
    seed_from: Callable[[dict, dict], tuple] = lambda params, stats: (params, stats)  # puts loaded weights in
