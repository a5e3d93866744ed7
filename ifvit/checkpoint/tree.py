"""Trees of a checkpoint: nested dictionaries with string keys, and their flat view by names."""

import numpy as np

from ifvit.checkpoint import digest


def leaves(tree: dict) -> dict:
    """Flat view of nested dictionaries: `params/resnet/stem/conv/kernel` -> leaf."""
    import jax

    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in flat}


def nested(flat: dict) -> dict:
    """The inverse of `leaves`."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for p in parents:
            node = node.setdefault(p, {})
        node[last] = leaf
    return tree


def kind(dtype, shape: tuple[int, ...]) -> str:
    """Type and shape, in the form in which a digest begins: `float32[3,4]`."""
    return digest.text(dtype, shape, (0, 0)).split(":")[0]


def difference(a: dict, b: dict) -> dict[str, str]:
    """Leaves that are not equal to the bit -> how they differ."""
    a, b = ({n: np.asarray(x) for n, x in leaves(tree).items()} for tree in (a, b))
    out = dict.fromkeys(a.keys() - b.keys(), "only in the first") | dict.fromkeys(
        b.keys() - a.keys(), "only in the second"
    )
    for n in a.keys() & b.keys():
        if a[n].shape != b[n].shape or a[n].dtype != b[n].dtype:
            out[n] = f"{a[n].dtype}{list(a[n].shape)} against {b[n].dtype}{list(b[n].shape)}"
        elif a[n].tobytes() != b[n].tobytes():
            with np.errstate(invalid="ignore"):
                gap = np.abs(a[n].astype(np.float64) - b[n].astype(np.float64))
            out[n] = f"{(gap > 0).sum()} of {gap.size} elements, at most {gap.max():.3g}"
    return dict(sorted(out.items()))
