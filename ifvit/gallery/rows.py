"""Templates as rows of a file: int8 numbers and a scale. And which of them are likest to a print's.

int8, since a product of a million templates of 256 took 180 ms of a core with it, 300 with float32, whose file is four
times as long, and 650 with float16. The rounding changes a product of unit vectors by some thousandths.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float32

# OpenBLAS makes a product of so many multiplications in the thread that asks. For larger ones it wakes threads of its
# own, and where other work is done waits for them: thirty times as long.
ALONE = 1 << 18
AT_ONCE = 8  # products that numpy is asked for together: their numbers fit into a core's cache


def row_type(width: int) -> np.dtype:
    """A template of `width` numbers."""
    return np.dtype([("scale", "<f4"), ("numbers", "i1", (width,))])


def as_rows(templates: Float32[np.ndarray, "N E"]) -> np.ndarray:
    """Each number in 1/127 of its template's largest."""
    rows = np.empty(len(templates), row_type(templates.shape[1]))
    rows["scale"] = np.abs(templates).max(1, initial=0) / 127
    rows["numbers"] = np.rint(templates / np.where(rows["scale"] > 0, rows["scale"], 1)[:, None])
    return rows


def likeness(rows: np.ndarray, probes: Float32[np.ndarray, "R E"], threads: int = 2) -> Float32[np.ndarray, " N"]:
    """The cosine of each of the templates with the likest of a print's, which it has at R turns."""
    found = np.empty(len(rows), np.float32)
    few = max(1, ALONE // probes.size)
    turned = np.ascontiguousarray(probes.T)

    def part(first: int, last: int) -> None:
        block = np.zeros((AT_ONCE * few, probes.shape[1]), np.float32)
        for at in range(first, last, len(block)):
            stop = min(at + len(block), last)
            some = rows[at:stop]
            block[: stop - at] = some["numbers"]
            products = (block.reshape(AT_ONCE, few, -1) @ turned).max(2).ravel()
            np.multiply(products[: stop - at], some["scale"], out=found[at:stop])

    edges = [len(rows) * n // threads for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, edges, edges[1:]))
    return found
