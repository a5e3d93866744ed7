"""Reads a checkpoint into memory or onto devices. Every leaf is checked against its digest first."""

import logging
import os
import re
from dataclasses import dataclass

import numpy as np
from etils import epath

from ifvit import legacy
from ifvit.checkpoint.metadata import check_module, read_metadata, sound
from ifvit.checkpoint.packed import PRETRAINED, packaged
from ifvit.checkpoint.places import is_pickle, locate
from ifvit.checkpoint.reading import read_leaves
from ifvit.checkpoint.tree import leaves, nested
from ifvit.errors import CheckpointNotFound, UserError
from ifvit.paths import resolve

NETWORK = ("state/params", "state/batch_stats", "aligner", "template")  # the parts that a trained network needs to run
TEMPLATE = {"mean", "centres", "projection", "bias"}  # leaves of `models.template.Template`
RETIRED = re.compile("(^|/)(head|arcface)_single(/|$)")  # leaves of a Module 2 from before templates were Module 1's

log = logging.getLogger("ifvit")


@dataclass(frozen=True)
class Checkpoint:
    path: epath.Path
    state: dict  # nested dictionaries of arrays: numpy's, or JAX's on the devices asked for
    metadata: dict
    aligner: dict | None
    template: dict | None = None  # of Module 1: what its templates of one print are made by (`models.template`)

    @property
    def trees(self) -> dict[str, dict]:
        """`state`, and of `aligner` and `template` what it has."""
        trees = {"state": self.state, "aligner": self.aligner, "template": self.template}
        return {name: tree for name, tree in trees.items() if tree is not None}

    @property
    def module(self) -> str:
        """`dense_reg` or `matcher`."""
        return self.metadata["module"]


def load(path: str | os.PathLike, module: str | None = None, parts: tuple[str, ...] = ("",)) -> Checkpoint:
    """The checkpoint, or an existing `.pkl` or packed file, as numpy arrays on this host. Every leaf is checked.

    `path` may be `pretrained`, the weights of the package, which have no optimiser's state and no step.
    `parts`: only leaves whose names begin so are read, e.g. NETWORK. UserError when the checkpoint is missing,
    half-written, damaged, of another module than `module`, or not a checkpoint of IFViT.
    """
    folder = locate(path)
    if is_pickle(folder):
        found = from_legacy(folder)
        check_module(folder, found.metadata, module)
        return found
    metadata = read_metadata(folder)
    check_module(folder, metadata, module)
    return _as_checkpoint(
        folder, metadata, read_leaves(folder, metadata, {n: None for n in metadata["digests"] if n.startswith(parts)})
    )


def or_packaged(path: str | os.PathLike | None, default: str) -> str:
    """The path that was given. Left out, it is `default`, or PRETRAINED where nothing lies there and weights came with
    the package; that is said."""
    if path is not None:
        return os.fspath(path)
    try:
        locate(default)
    except CheckpointNotFound:
        if packaged().is_file():
            log.warning(
                "⚠ No checkpoint is given, and none lies at %s: the packaged weights are used, a Module 1 that was "
                "trained on generated prints alone.",
                resolve(default),
            )
            return PRETRAINED
    return default


def restore(folder: epath.Path, metadata: dict, shardings: dict) -> Checkpoint:
    """The checkpoint with `state` as JAX arrays, which `shardings` (a tree like it) places, and `aligner` on the host.

    Every process calls it, and reads only what its devices need. It raises the UserErrors of `load`, and the same class
    on every process.
    """
    wanted = {n: None for n in metadata["digests"] if not RETIRED.search(n)} | leaves({"state": shardings})
    return _as_checkpoint(folder, metadata, read_leaves(folder, metadata, wanted))


def _as_checkpoint(folder: epath.Path, metadata: dict, flat: dict) -> Checkpoint:
    trees = nested(flat)
    state = {"params": {}, "batch_stats": {}, "opt_state": {}} | trees.get("state", {})
    return Checkpoint(folder, state, metadata, trees.get("aligner"), trees.get("template"))


def from_legacy(file: epath.Path) -> Checkpoint:
    """A pickle of the legacy format as a checkpoint. UserError where anything in it is refused.

    The metadata have `foreign` where it is not of this project's networks: it can only seed Module 2.
    """
    found = legacy.read(file)
    state = {"params": {}, "batch_stats": {}, "opt_state": {}, "step": np.int32(0)} | found.state
    beside = {name: tree for name in ("aligner", "template") if (tree := state.pop(name, None)) is not None}
    if not (isinstance(beside.get("template"), dict) and beside["template"].keys() == TEMPLATE):
        beside.pop("template", None)  # other code's, whatever it is
    for name, part in (state | beside).items():
        if name == "step" and not (np.ndim(part) == 0 and np.asarray(part).dtype.kind in "iuf" and np.isfinite(part)):
            raise UserError(f"{file} has a step that is no number; save one, and not one for each device.")
        if name in ("params", "batch_stats", "opt_state", *beside) and not isinstance(part, dict):
            raise UserError(f"{file} has an array as its {name}, where named arrays belong; save the tree of them.")
    params = state["params"]
    names = {*params, *(m for p in params.values() if isinstance(p, dict) for m in p)}
    module = "matcher" if any(n.endswith("_transformer_global") for n in names) else "dense_reg"
    told = sound(found.metadata)
    ours = "resnet_widths" in told["config"] and "module" in told
    names = leaves({"state": state} | beside)
    metadata = {"module": module} | told | {"step": int(state["step"]), "digests": dict.fromkeys(names)}
    if found.timestamp:
        metadata["timestamp"] = found.timestamp
    told = metadata if ours else metadata | {"foreign": True}
    return Checkpoint(file, state, told, beside.get("aligner"), beside.get("template"))
