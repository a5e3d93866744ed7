"""LoFTR's coarse transformer, in and out of our parameter tree.

LoFTR (zju3dv/LoFTR, Apache-2.0) keeps it under `matcher.loftr_coarse.layers.{0..7}.`: 8 encoder
layers (4 self + cross pairs), 10 arrays each, 5,251,072 parameters. Ours has the same arrays under
`layer_{0..7}`; a torch Linear's weight is (out, in), a kernel of ours (in, out).
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ifvit.errors import UserError
from ifvit.foreign.torch_file import read_state_dict

_OURS = {
    "q_proj.weight": "q_proj/kernel",
    "k_proj.weight": "k_proj/kernel",
    "v_proj.weight": "v_proj/kernel",
    "merge.weight": "merge/kernel",
    "mlp.0.weight": "mlp_0/kernel",
    "mlp.2.weight": "mlp_2/kernel",
    "norm1.weight": "norm1/scale",
    "norm1.bias": "norm1/bias",
    "norm2.weight": "norm2/scale",
    "norm2.bias": "norm2/bias",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_KEY = re.compile(r"(?:matcher\.)?loftr_coarse\.(?:layers\.(0|[1-9]\d*)\.(.+)|.*)")


def load_loftr(path: str | Path, transformer_params: dict) -> dict:
    """The transformer's parameters with LoFTR's weights in every array.

    `transformer_params`: nested dict with str keys; its leaves need only a `shape`. Returned: the
    same tree with float32 numpy arrays.

    Raises UserError with every mismatch in its one message: an array that is missing, left over,
    not LoFTR's or of another shape, on either side; besides what `read_state_dict` raises.
    """
    source, foreign = _read(path)
    target = flatten_dict(transformer_params, sep="/")
    file_layers, target_layers = _layers(source), _layers(target)

    # A layer that one side lacks altogether is one mismatch, not ten.
    problems = [f"{key} is not one of LoFTR's arrays" for key in foreign]
    for side, present, absent in (("file", target, source), ("transformer", source, target)):
        missing_layers = _layers(present) - _layers(absent)
        problems += [f"{layer} is not in the {side}" for layer in sorted(missing_layers, key=_natural)]
        problems += [
            f"{name} is not in the {side}"
            for name in sorted(present.keys() - absent.keys(), key=_natural)
            if name.split("/")[0] not in missing_layers
        ]
    problems += [
        f"{name} is {source[name].shape} in the file and {tuple(target[name].shape)} in the transformer"
        for name in sorted(source.keys() & target.keys(), key=_natural)
        if source[name].shape != tuple(target[name].shape)
    ]
    if problems:
        remedy = "Give LoFTR's own weights, and the transformer LoFTR's sizes (width 256)."
        if len(file_layers) != len(target_layers) and len(file_layers) % 2 == 0:
            remedy = f"Give the transformer as many layers: --set transformer_layers={len(file_layers) // 2}."
        raise UserError(
            f"{path} does not fit the transformer: the file has {len(file_layers)} encoder layers, the transformer "
            f"{len(target_layers)}; {'; '.join(problems)}. {remedy}"
        )
    return unflatten_dict(source, sep="/")


def transformer_from_loftr(path: str | Path) -> dict:
    """The coarse transformer of a LoFTR checkpoint: `{"layer_0": {"q_proj": {"kernel": (in, out)}, ...}, ...}`.

    Arrays are float32. Keys of LoFTR's other parts (backbone, fine transformer) are left aside.

    Raises UserError: a `loftr_coarse` array of an unknown name, a layer that is not whole; besides
    what `read_state_dict` raises.
    """
    source, foreign = _read(path)
    whole = {f"layer_{layer}/{name}" for layer in range(len(_layers(source))) for name in _THEIRS}
    missing = sorted(whole - source.keys(), key=_natural)
    if foreign or missing:
        problems = [f"{key} is not one of LoFTR's arrays" for key in foreign] + [f"{key} is missing" for key in missing]
        raise UserError(f"{path} is not LoFTR's coarse transformer: {'; '.join(problems)}. Give LoFTR's own weights.")
    return unflatten_dict(source, sep="/")


def loftr_from_transformer(params: dict) -> dict[str, np.ndarray]:
    """LoFTR's state dict (`matcher.loftr_coarse.layers.0.q_proj.weight`, ...) of our transformer: float32.

    Raises UserError: the tree has an array that LoFTR has not.
    """
    state = {}
    for name, value in flatten_dict(params, sep="/").items():
        layer, _, ours = name.partition("/")
        if not re.fullmatch(r"layer_\d+", layer) or ours not in _THEIRS:
            raise UserError(f"{name} has no place in LoFTR's transformer. Export only a transformer of LoFTR's layers.")
        key = f"matcher.loftr_coarse.layers.{layer.removeprefix('layer_')}.{_THEIRS[ours]}"
        state[key] = _float32(value)
    return state


def _read(path: str | Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The file's coarse arrays by our names ("layer_0/q_proj/kernel"), and its coarse keys that have none."""
    state = read_state_dict(path)
    arrays, foreign = {}, []
    matched = [(key, found) for key in state if (found := _KEY.fullmatch(key))]
    if not matched:
        raise UserError(f"{path} holds no LoFTR coarse transformer. Give LoFTR's own weights, such as outdoor_ds.ckpt.")
    for key, found in matched:
        layer, theirs = found.groups()
        name = f"layer_{layer}/{_OURS.get(theirs)}"
        # A name that comes twice (with and without "matcher.") would silently hide one of the two.
        if theirs not in _OURS or name in arrays:
            foreign.append(key)
        else:
            arrays[name] = _float32(state[key])
    return arrays, foreign


def _float32(value: Any) -> np.ndarray:
    array = np.asarray(value, np.float32)
    return np.ascontiguousarray(array.T if array.ndim == 2 else array)


def _layers(flat: dict[str, Any]) -> set[str]:
    return {name.split("/")[0] for name in flat if name.startswith("layer_")}


def _natural(name: str) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
