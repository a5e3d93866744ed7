"""Module 1's transformer out of other code's parameters, in the names and shapes used here.

The legacy code (flax linen) has layers of its own for each print, `layers.{i}.0` and `layers.{i}.1`, with
biased projections; what has a place in LoFTR's layer is mapped, what has none is said, the rest is refused.
"""

import os
import re
from collections.abc import Iterator

import numpy as np

from ifvit.errors import UserError


class NoTransformer(UserError):
    """There is none in the parameters."""


_TRANSFORMERS = ("loftr_transformer", "siamese_transformer")
# Layer, print, module and leaf in a name. For example: layers.0.1/mlp.2/kernel, layers_0/norm1/scale,
# layers/0/0/q_proj/weight, layer_0/mlp_0/kernel.
_PLACE = re.compile(
    r"layers?[._/](?P<layer>0|[1-9]\d{0,2})(?:[._/](?P<print>[01]))?/"
    r"(?:(?P<linear>[qkv]_proj|merge|mlp[._/](?:layers_)?[02])/(?:kernel|weight|(?P<bias>bias))"
    r"|(?P<norm>norm[12])/(?P<leaf>scale|weight|bias))"
)
_SHAPES = {f"{name}/kernel": (1, 1) for name in ("q_proj", "k_proj", "v_proj", "merge")} | {  # in widths
    "mlp_0/kernel": (2, 2),
    "mlp_2/kernel": (2, 1),
    "norm1/scale": (1,),
    "norm1/bias": (1,),
    "norm2/scale": (1,),
    "norm2/bias": (1,),
}


def transformer(params: dict, path: os.PathLike | None = None) -> tuple[str, dict, list[str]]:
    """Module 1's transformer: name, `{"layer_0": {"q_proj": {"kernel": (in, out)}, …}, …}`, and notes on it.

    Arrays are float32. Understood: our names, and linen's or torch's for layers of LoFTR, of which
    there may be one per print (`layers.0.0`, `layers.0.1`); then print 0's are taken. The notes are
    sentences, one for each thing that was changed or left out. `path` is the checkpoint that errors name.

    Raises UserError: there is none, it is of another architecture, or arrays are missing, left over
    or of other shapes (each named).
    """
    name, tree = _find(params, path)
    where = path or "this checkpoint"
    flat = dict(_flat(tree))
    if any(re.match(r"(self|cross)_attn_\d+_layer_\d+/", path) for path in flat):
        raise UserError(
            f"The {name} of {where} is another architecture: its layers are standard attention with biases "
            "(MultiHeadDotProductAttention, LayerNorm_0, Dense_0), and it has position encodings of its own; LoFTR's "
            "layers have no place for them. Train Module 1 anew."
        )
    arrays, biases, problems, odd_types = _places(flat)
    prints = sorted({p for p, _ in arrays})
    problems += _mismatches(arrays, prints)
    if problems:
        more = [f"and {len(problems) - 500} more"] if len(problems) > 500 else []
        raise UserError(
            f"The {name} of {where} does not fit LoFTR's layers: {'; '.join(problems[:500] + more)}. "
            "Give a checkpoint with a transformer of LoFTR's layers, or train Module 1 anew."
        )

    notes = []
    if biases and max(biases) == 0:
        notes.append(
            f"{len(biases)} biases of {name}'s linear maps, which LoFTR's have not, were all zero and dropped."
        )
    elif biases:
        notes.append(
            f"{sum(b > 0 for b in biases)} biases of {name}'s linear maps (of {len(biases)}), which LoFTR's "
            f"have not, were left out; their largest value is {max(biases):.3g}."
        )
    if odd_types:
        notes.append(f"{name} was converted to float32 from {', '.join(sorted(odd_types))}.")
    if len(prints) == 2:
        gaps = [float(np.abs(arrays["1", key] - value).max()) for (p, key), value in arrays.items() if p == "0"]
        if max(gaps) > 0:
            notes.append(
                f"{name} has layers of its own for each print, and ours has one for both: print 0's were taken, "
                f"and {len(gaps)} arrays of print 1's left out, of which {sum(g > 0 for g in gaps)} differ by "
                f"up to {max(gaps):.3g}."
            )
    if prints != [""]:
        notes.append(
            f"{name}'s code normalises its input (norm1) and the sum (norm2), LoFTR's the message: the weights "
            "are a start, not the same function."
        )
    mapped: dict = {}
    for (p, key), value in arrays.items():
        if p == prints[0]:
            layer, module, leaf = key.split("/")
            mapped.setdefault(layer, {}).setdefault(module, {})[leaf] = value
    return name, mapped, notes


def _find(params: dict, path: os.PathLike | None) -> tuple[str, dict]:
    level = [params]
    for _ in range(3):  # bare, under `params`, `model` or `dense_reg`, or under two of them
        for name in _TRANSFORMERS:
            for tree in level:
                if isinstance(tree.get(name), dict):
                    return name, tree[name]
        level = [child for tree in level for child in tree.values() if isinstance(child, dict)]
    place = f" {path}" if path else ""
    raise NoTransformer(
        f"No transformer found in Module 1 checkpoint{place}, which has {', '.join(sorted(params)) or 'nothing'} "
        f"and no {' or '.join(_TRANSFORMERS)}; train Module 1 again."
    )


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", np.asarray(value)


def _places(flat: dict[str, np.ndarray]) -> tuple[dict, list[float], list[str], set[str]]:
    """(print, "layer_0/q_proj/kernel") -> array; the biases' largest values; what has no place; types converted."""
    arrays: dict[tuple[str, str], np.ndarray] = {}
    biases, problems, odd_types = [], [], set()
    for path, array in flat.items():
        place = _PLACE.fullmatch(path)
        if not place or "float" not in array.dtype.name:
            problems.append(f"{path} has no place in them" if not place else f"{path} is of type {array.dtype}")
            continue
        if array.dtype != np.float32:
            odd_types.add(array.dtype.name)
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            problems.append(f"{path} has values that are not finite")
        if place["bias"]:
            biases.append(float(np.abs(array).max(initial=0)))
            continue
        if place["norm"]:
            where = f"{place['norm']}/{'bias' if place['leaf'] == 'bias' else 'scale'}"
        else:
            module = place["linear"]
            where = f"{'mlp_' + module[-1] if module.startswith('mlp') else module}/kernel"
            array = np.ascontiguousarray(array.T) if path.endswith("/weight") else array
        key = (place["print"] or "", f"layer_{place['layer']}/{where}")
        if key in arrays:
            problems.append(f"{path} is there twice, under two names")
        arrays[key] = array
    return arrays, biases, problems, odd_types


def _mismatches(arrays: dict[tuple[str, str], np.ndarray], prints: list[str]) -> list[str]:
    if not arrays:
        return ["it has no layers"]
    problems = []
    if prints not in ([""], ["0"], ["0", "1"]):
        problems.append("its layers are not all of print 0, or of prints 0 and 1")
    count = 1 + max(int(re.search(r"\d+", key)[0]) for _, key in arrays)
    if count % 2:
        problems.append(f"{count} layers are no pairs of self and cross attention")
    widths = [a.shape[0] for (_, key), a in arrays.items() if key.endswith("_proj/kernel") and a.ndim]
    width = max(set(widths), key=widths.count, default=0)
    for p in prints:
        for layer in range(count):
            label = f"layer {layer}" + f" of print {p}" * bool(p)
            present = {k for k in _SHAPES if (p, f"layer_{layer}/{k}") in arrays}
            if not present:
                problems.append(f"{label} is missing")
                continue
            problems += [f"{label} {k} is missing" for k in _SHAPES if k not in present]
            for k in sorted(present):
                shape, want = arrays[p, f"layer_{layer}/{k}"].shape, tuple(width * n for n in _SHAPES[k])
                if shape != want:
                    problems.append(f"{label} {k} is {shape}, not {want}")
    return problems
