"""A scorer of a fixed batch of pairs as StableHLO, its weights inside: what runs where this package is not."""

import jax
import numpy as np
from jax import export

from ifvit.constants import MASK_CELL
from ifvit.scoring.scorer import Scorer

INPUTS = ("canvas0", "mask0", "canvas1", "mask1")


def stable_hlo(scorer: Scorer, batch_size: int, platforms: tuple[str, ...]) -> export.Exported:
    """(canvas0, mask0, canvas1, mask1), each (batch_size, …), -> name: (batch_size,), `score` among them.

    Canvases are uint8 at 500 ppi, their masks bool, a value for each MASK_CELL px, as `Matcher.read` gives them.
    """
    side = scorer.config.canvas_size
    shapes = {"canvas": ((side, side), np.uint8), "mask": ((side // MASK_CELL,) * 2, np.bool_)}
    given = (shapes[name[:-1]] for name in INPUTS)

    def score(*arrays):
        return scorer.scores_of_canvases(dict(zip(INPUTS, arrays)))

    arguments = [jax.ShapeDtypeStruct((batch_size, *shape), dtype) for shape, dtype in given]
    return export.export(jax.jit(score), platforms=platforms)(*arguments)


def described(exported: export.Exported) -> dict:
    """Inputs in their order, and outputs: shapes and dtypes."""
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    told = lambda x: {"shape": list(x.shape), "dtype": x.dtype.name}
    return {
        "inputs": [{"name": name} | told(x) for name, x in zip(INPUTS, exported.in_avals)],
        "outputs": {name: told(x) for name, x in outputs.items()},
        "platforms": list(exported.platforms),
    }
