"""A digest of an array that does not depend on how the array is split over devices, hosts or files.

It is two sums modulo 2^64, 128 bits in all. Each element's bits are multiplied with an odd key of its position in the
whole array, and added up. A shard gives the sum over its own elements, and the array's digest is the sum over its
shards. So no host ever needs the whole array.

Why it finds damage: elements are words of at most 32 bits and keys are odd, so a change of one element always changes
both sums. Unrelated changes of several elements cancel in both sums with a probability of about 2^-64. For a pattern
such as the sign bits of a 2×2×2×2 block it is 2^-41, because sums of odd keys are even. The digest is no protection
against someone who wants to deceive.
"""

from functools import lru_cache, reduce

import numpy as np

Sums = tuple[int, int]

BLOCK = 4096  # period of the keys of an axis: key(i) = low[i % BLOCK] * high[i // BLOCK]
CHUNK = 1 << 16  # so many elements are multiplied with one vector of keys; they fit into the processor's cache
MASK = (1 << 64) - 1


def partial(shard: np.ndarray | np.generic, start: tuple[int, ...]) -> Sums:
    """The sums over a shard whose first element lies at `start` of the whole array."""
    words, start = _words(shard, start)
    if words.size == 0:
        return 0, 0
    inner, columns = words.ndim, 1  # axes from `inner` on are multiplied with one vector of keys
    while inner and columns * words.shape[inner - 1] <= CHUNK:
        inner -= 1
        columns *= words.shape[inner]
    if inner < words.ndim:
        axes = list(zip(start, words.shape))
        return _sums(
            words.reshape(-1, columns),
            *((_keys(axes[:inner], 0, lane), _keys(axes[inner:], inner, lane)) for lane in (0, 1)),
        )
    # The last axis alone is longer than a chunk. Whole periods of its keys become rows; the rest is added at the end.
    *before, (begin, size) = zip(start, words.shape)
    head = min(size, -begin % BLOCK)
    body = (size - head) // BLOCK * BLOCK
    last, first = len(before), (begin + head) // BLOCK
    rows = np.ascontiguousarray(words[..., head : head + body]).reshape(-1, BLOCK)
    total = _sums(
        rows,
        *(
            (
                np.multiply.outer(_keys(before, 0, lane), _high(first, first + body // BLOCK, last, lane)).reshape(-1),
                _low(last, lane),
            )
            for lane in (0, 1)
        ),
    )
    edges = (words[..., :head], begin), (words[..., head + body :], begin + head + body)
    return add(total, *(partial(edge, (*start[:-1], at)) for edge, at in edges))


def _sums(rows: np.ndarray, *keys: tuple[np.ndarray, np.ndarray]) -> Sums:
    """sum over r, c of rows[r, c] · outer[r] · inner[c] modulo 2^64, for each (outer, inner)."""
    totals = [0] * len(keys)
    step = max(1, CHUNK // rows.shape[1])
    for at in range(0, len(rows), step):
        block = rows[at : at + step].astype(np.uint64)
        for lane, (outer, inner) in enumerate(keys):
            row_sums = np.einsum("rc,c->r", block, inner)  # twice as fast as @, which has no BLAS for integers
            totals[lane] += int(np.einsum("r,r->", row_sums, outer[at : at + step]))
    return tuple(total & MASK for total in totals)


def add(*sums: Sums) -> Sums:
    return sum(s[0] for s in sums) & MASK, sum(s[1] for s in sums) & MASK


def text(dtype, shape: tuple[int, ...], sums: Sums) -> str:
    """A digest as the metadata hold it: type, shape and both sums."""
    return f"{np.dtype(dtype).name}{list(shape)}:{sums[0]:016x}{sums[1]:016x}".replace(" ", "")


def digest(array: np.ndarray | np.generic) -> str:
    """The digest of a whole array."""
    array = np.asarray(array)
    return text(array.dtype, array.shape, partial(array, (0,) * array.ndim))


def _words(shard: np.ndarray | np.generic, start) -> tuple[np.ndarray, tuple[int, ...]]:
    """The elements' bits as unsigned integers of at most 32 bits; wider elements get one more axis."""
    if shard.ndim == 0:
        shard, start = shard.reshape(1), (0,)
    shard = np.ascontiguousarray(shard)
    size = shard.dtype.itemsize
    if size in (1, 2, 4):
        return shard.view(f"<u{size}"), tuple(start)
    return shard[..., None].view("<u4"), (*start, 0)


def _keys(axes, first: int, lane: int) -> np.ndarray:
    """The keys of a block of positions: the product over its axes, flattened in C order."""
    per_axis = [_axis_keys(first + n, begin, begin + size, lane) for n, (begin, size) in enumerate(axes)]
    return reduce(np.multiply.outer, per_axis, np.ones((), np.uint64)).reshape(-1)


def _axis_keys(axis: int, begin: int, end: int, lane: int) -> np.ndarray:
    first, last = begin // BLOCK, (end - 1) // BLOCK
    keys = np.multiply.outer(_high(first, last + 1, axis, lane), _low(axis, lane)).reshape(-1)
    return keys[begin - first * BLOCK : end - first * BLOCK]


def _high(begin: int, end: int, axis: int, lane: int) -> np.ndarray:
    return _odd(begin, end, 4 * axis + 2 * lane + 1)


@lru_cache
def _low(axis: int, lane: int) -> np.ndarray:
    return _odd(0, BLOCK, 4 * axis + 2 * lane)


def _odd(begin: int, end: int, stream: int) -> np.ndarray:
    """Odd pseudo-random 64-bit integers: SplitMix64 (Steele et al. 2014) of (stream, index)."""
    index = np.arange(begin, end, dtype=np.uint64)
    z = (index + np.uint64(stream << 48)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
