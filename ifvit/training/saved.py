"""The training state as a checkpoint holds it, and back."""

from flax import serialization

from ifvit.training.state import TrainState
from ifvit.training.task import Task


def saved_tree(state: TrainState, task: Task) -> dict:
    """The state as a checkpoint holds it: nested dictionaries of arrays, or of what stands for them (shapes …)."""
    return {
        "params": task.to_saved(state.params),
        "batch_stats": state.batch_stats,
        "opt_state": _without_empty(serialization.to_state_dict(state.opt_state)),
        "step": state.step,
    }


def restored_state(abstract: TrainState, saved: dict, task: Task) -> TrainState:
    """The inverse of `saved_tree`."""
    opt_state = serialization.from_state_dict(
        abstract.opt_state, _with_empty(saved["opt_state"], serialization.to_state_dict(abstract.opt_state))
    )
    return TrainState(task.from_saved(saved["params"]), saved["batch_stats"], opt_state, saved["step"])


def _without_empty(tree: dict) -> dict:
    """The tree without empty parts: optax has states without leaves, and a checkpoint holds leaves only."""
    clean = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in clean.items() if not (isinstance(v, dict) and not v)}


def _with_empty(saved: dict, target: dict) -> dict:
    return {k: _with_empty(saved.get(k, {}), v) if isinstance(v, dict) else saved[k] for k, v in target.items()}
