"""LoFTR's coarse transformer, in and out of our parameter tree.

    python -m ifvit.loftr export CKPT OUT.safetensors    Module 1's transformer under LoFTR's names

LoFTR (zju3dv/LoFTR, Apache-2.0) keeps it under `matcher.loftr_coarse.layers.{0..7}.`: 8 encoder
layers (4 self + cross pairs), 10 arrays each, 5,251,072 parameters. Ours has the same arrays under
`layer_{0..7}`; a torch Linear's weight is (out, in), a kernel of ours (in, out).

What wraps a model (DataParallel, torch.compile, Lightning, an average of the weights) puts names before
LoFTR's; whatever stands before `loftr_coarse.` is one transformer of the file.
"""

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ifvit.errors import UserError
from ifvit.foreign.torch_file import read_arrays

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
_KEY = re.compile(r"(?:(.*)\.)?loftr_coarse\.(.+)")
_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,2})\.(.+)")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def load_loftr(path: str | os.PathLike, transformer_params: dict) -> dict:
    """The transformer's parameters with LoFTR's weights in every array.

    `transformer_params`: nested dict with str keys; its leaves need only a `shape`. Returned: the
    same tree with float32 numpy arrays. Where the file has more layers than the transformer, the first
    ones are taken, and it is said. `path` as for `transformer_from_loftr`.

    Raises UserError with every mismatch in its one message: an array that is missing, left over,
    not LoFTR's or of another shape, on either side; besides what `transformer_from_loftr` raises.
    """
    from flax.traverse_util import flatten_dict, unflatten_dict

    source, problems = _read(path)
    target = flatten_dict(transformer_params, sep="/")
    file_layers, target_layers = _layers(source), _layers(target)
    kept = sorted(file_layers, key=_natural)[: len(target_layers)]
    if target_layers == set(kept) < file_layers:
        left = [name for name in source if name.split("/")[0] not in target_layers]
        problems += _holes(source)
        source = {name: array for name, array in source.items() if name not in left}

    # A layer that one side lacks altogether is one mismatch, not ten.
    for side, present, absent in (("file", target, source), ("transformer", source, target)):
        missing_layers = _layers(present) - _layers(absent)
        problems += [f"{layer} is not in the {side}" for layer in sorted(missing_layers, key=_natural)]
        problems += [
            f"{name} is not in the {side}"
            for name in sorted(present.keys() - absent.keys(), key=_natural)
            if name.split("/")[0] not in missing_layers and f"{name} is missing" not in problems
        ]
    problems += [
        f"{name} is {source[name].shape} in the file and {tuple(target[name].shape)} in the transformer"
        for name in sorted(source.keys() & target.keys(), key=_natural)
        if source[name].shape != tuple(target[name].shape)
    ]
    if problems:
        remedy = "Give LoFTR's own weights, and the transformer LoFTR's sizes (width 256)."
        if len(file_layers) < len(target_layers) and len(file_layers) % 2 == 0:
            remedy = f"Give the transformer as many layers: --set transformer_layers={len(file_layers) // 2}."
        raise UserError(
            f"{path} does not fit the transformer: the file has {len(file_layers)} encoder layers, the transformer "
            f"{len(target_layers)}; {'; '.join(problems)}. {remedy}"
        )
    if len(file_layers) > len(target_layers):
        print(
            f"⚠ {path} has {len(file_layers)} encoder layers and the transformer {len(target_layers)}: the first "
            f"{len(target_layers)} were taken. --set transformer_layers={len(file_layers) // 2} takes all.",
            flush=True,
        )
    return unflatten_dict(source, sep="/")


def transformer_from_loftr(path: str | os.PathLike) -> dict:
    """The coarse transformer of a LoFTR checkpoint: `{"layer_0": {"q_proj": {"kernel": (in, out)}, ...}, ...}`.

    Arrays are float32. LoFTR's other parts (backbone, fine transformer) and whatever else lies in the file
    are left aside. Of several transformers in a file `path#NAME` takes the one that stands under NAME.

    Raises UserError: no such transformer or several, a `loftr_coarse` array of an unknown name or a type
    that is no float's, a layer that is not whole; besides what `read_arrays` raises.
    """
    from flax.traverse_util import unflatten_dict

    source, problems = _read(path)
    problems += _holes(source)
    if problems:
        raise UserError(f"{path} is not LoFTR's coarse transformer: {'; '.join(problems)}. Give LoFTR's own weights.")
    return unflatten_dict(source, sep="/")


def loftr_from_transformer(params: dict) -> dict[str, np.ndarray]:
    """LoFTR's state dict (`matcher.loftr_coarse.layers.0.q_proj.weight`, ...) of our transformer: float32.

    Raises UserError: the tree has an array that LoFTR has not.
    """
    from flax.traverse_util import flatten_dict

    state = {}
    for name, value in flatten_dict(params, sep="/").items():
        layer, _, ours = name.partition("/")
        if not re.fullmatch(r"layer_\d+", layer) or ours not in _THEIRS:
            raise UserError(f"{name} has no place in LoFTR's transformer. Export only a transformer of LoFTR's layers.")
        key = f"matcher.loftr_coarse.layers.{layer.removeprefix('layer_')}.{_THEIRS[ours]}"
        state[key] = _float32(value)
    return state


def _read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], list[str]]:
    """The file's coarse arrays by our names ("layer_0/q_proj/kernel"), and what is wrong with its coarse keys."""
    file, choice = _choice(path)
    found: dict[str, dict[str, np.ndarray]] = {}  # of each transformer the arrays by LoFTR's names, with wrappers
    for key, array in read_arrays(file, lambda name: bool(_KEY.fullmatch(name))).items():
        before, name = _KEY.fullmatch(key).groups()
        found.setdefault(f"{before}.loftr_coarse" if before else "loftr_coarse", {})[name] = array
    named = {where: _by_our_names(where, arrays) for where, arrays in found.items()}
    named = {where: (arrays, wrong) for where, (arrays, wrong) in named.items() if arrays}  # not an optimiser's
    if not named:
        raise UserError(f"{file} holds no LoFTR coarse transformer. Give LoFTR's own weights, such as outdoor_ds.ckpt.")
    if choice is not None:
        chosen = [where for where in named if choice in (where, where.removesuffix(".loftr_coarse"))]
    else:
        chosen = list(named)
        arrays, wrong = named[chosen[0]]
        if all(named[where][1] == wrong and _equal(named[where][0], arrays) for where in chosen):
            chosen = chosen[:1]  # one transformer under several names
    if len(chosen) != 1:
        raise UserError(
            f"{file} holds LoFTR's transformer under {', '.join(sorted(named))}. Choose one of them, as in "
            f"--loftr_ckpt '{file}#{min(named)}'."
        )
    return named[chosen[0]]


def _choice(path: str | os.PathLike) -> tuple[Path, str | None]:
    """The file, and which transformer in it, of `FILE` or `FILE#NAME`."""
    file, sign, name = str(path).rpartition("#")
    return (Path(file), name) if sign and not os.path.exists(path) else (Path(path), None)


def _by_our_names(where: str, arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    ours, wrong = {}, []
    for theirs, array in arrays.items():
        layer = _LAYER.fullmatch(_WRAPPERS.sub("", theirs))
        name = f"layer_{layer[1]}/{_OURS.get(layer[2])}" if layer else ""
        if not layer or layer[2] not in _OURS:
            wrong.append(f"{where}.{theirs} is not one of LoFTR's arrays")
            continue
        if name in ours:
            wrong.append(f"{where}.{theirs} is there twice, under two names")
        if "float" not in array.dtype.name:
            wrong.append(f"{name} is of type {array.dtype.name}, which is no float's")
        ours[name] = _float32(array)
        if not np.isfinite(ours[name]).all():
            wrong.append(f"{name} has values that are not finite")
    return ours, wrong


def _equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def _holes(source: dict[str, np.ndarray]) -> list[str]:
    """The arrays that the layers lack."""
    count = 1 + max(int(layer.removeprefix("layer_")) for layer in _layers(source))
    whole = {f"layer_{layer}/{name}" for layer in range(count) for name in _THEIRS}
    return [f"{name} is missing" for name in sorted(whole - source.keys(), key=_natural)]


def _float32(value: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # it becomes infinite, which is refused
        array = np.asarray(value, np.float32)
    return np.ascontiguousarray(array.T if array.ndim == 2 else array)


def _layers(flat: dict[str, Any]) -> set[str]:
    return {name.split("/")[0] for name in flat if name.startswith("layer_")}


def _natural(name: str) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# --- the command ---


@dataclass(frozen=True)
class Export:
    """Writes Module 1's transformer under LoFTR's names, as safetensors."""

    ckpt: Annotated[str, tyro.conf.Positional]
    """a checkpoint of Module 1, or a pickle of the legacy format"""
    out: Annotated[str, tyro.conf.Positional]
    """a name that ends in .safetensors"""

    def run(self) -> int:
        from ifvit import checkpoint
        from ifvit.foreign import legacy_transformer  # they need not be there to read weights

        out = Path(self.out)
        if out.suffix != ".safetensors":
            raise UserError(f"{out} does not end in .safetensors, the one format that is written; give such a name.")
        found = checkpoint.load(self.ckpt, parts=("state/params/", "aligner/params/"))
        params = found.state["params"] if found.module == "dense_reg" else (found.aligner or {}).get("params", {})
        name, tree, notes = legacy_transformer.transformer(params, found.path)
        state = loftr_from_transformer(tree)
        for note in notes:
            print(f"⚠ {note}")
        if name != "loftr_transformer":
            print(f"⚠ {name} was trained with softmax attention; LoFTR's own is linear.")
        if out.exists():
            raise UserError(f"{out} is there already; give a new name.")
        _write(out, state)
        print(f"{out}: {len(state)} arrays, {sum(x.size for x in state.values()):,} parameters of {found.path}")
        if "temp_bug_fix" in found.metadata["config"]:
            print(f"LoFTR's configuration for it: temp_bug_fix={bool(found.metadata['config']['temp_bug_fix'])}")
        return 0


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    import safetensors.numpy  # only this command needs it

    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "wb") as file:
            file.write(safetensors.numpy.save(arrays, {"format": "pt"}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}); give another place, or make room.") from None
    finally:
        with contextlib.suppress(OSError):  # it is not there: all went well, or nothing was begun
            fresh.unlink()


COMMANDS = {"export": Export}

if __name__ == "__main__":
    from ifvit import cli

    sys.exit(cli.main_with_commands(COMMANDS, "ifvit.loftr"))
