"""A digest is the same however an array is split, and another as soon as one bit of it is."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from ifvit.checkpoint import digest

DTYPES = [np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.bool_, np.int64, np.complex64]
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (5, 6), (4, 3, 2, 5), (3, 4097), (200_000,), (2, 70_001), (70_000, 3)]


def drawn(shape, dtype, seed: int = 0) -> np.ndarray:
    """Any bits at all, NaNs included; of booleans 0 and 1."""
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


def pieces(array: np.ndarray, start: tuple, rng, cuts: int) -> list[tuple[np.ndarray, tuple]]:
    """The array cut in two at a random place of a random axis, and each part again: shards and where they begin."""
    axes = [a for a in range(array.ndim) if array.shape[a] > 1]
    if not cuts or not axes:
        return [(array, start)]
    axis = int(rng.choice(axes))
    at = int(rng.integers(0, array.shape[axis] + 1))  # 0 and all: a shard may be empty
    first, second = np.split(array, [at], axis)
    behind = (*start[:axis], start[axis] + at, *start[axis + 1 :])
    return pieces(first, start, rng, cuts - 1) + pieces(second, behind, rng, cuts - 1)


# ---- the format


def splitmix64(index: int, stream: int) -> int:
    """Steele et al. 2014 (the constants are theirs), of a counter that `stream` shifts by multiples of 2^48."""
    full = 2**64 - 1
    z = (index + (stream << 48)) * 0x9E3779B97F4A7C15 & full
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & full
    z = (z ^ z >> 27) * 0x94D049BB133111EB & full
    return z ^ z >> 31


def by_definition(array: np.ndarray) -> str:
    """The digest's definition, an element at a time.

    An element is its bits as words of 4 bytes (or one of 1 or 2), little end first, the words of a wider
    one along one more axis. Its key is the product, over the axes, of an odd number for the position
    modulo 4096 and one for the position divided by it. Axis n has the SplitMix64 streams 4n to 4n + 3:
    two for the first sum, two for the second.
    """
    width = min(array.itemsize, 4)
    words = np.frombuffer(array.tobytes(), f"<u{width}").reshape(*(array.shape or (1,)), array.itemsize // width)
    sums = [0, 0]
    for place in itertools.product(*map(range, words.shape)):
        axes = place if array.itemsize > 4 else place[:-1]
        for lane in (0, 1):
            key = 1
            for n, i in enumerate(axes):
                key *= splitmix64(i % 4096, 4 * n + 2 * lane) | 1
                key *= splitmix64(i // 4096, 4 * n + 2 * lane + 1) | 1
            sums[lane] += key * int(words[place])
    shape = ",".join(map(str, array.shape))
    return f"{array.dtype.name}[{shape}]:" + "".join(f"{s % 2**64:016x}" for s in sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 3, 2, 5), (2, 4099)])
def test_a_digest_is_what_its_definition_says(shape, dtype):
    array = drawn(shape, dtype)
    assert digest.digest(array) == by_definition(array)


def test_beyond_a_block_of_elements_too():
    array = drawn((70_001,), np.uint8)
    assert digest.digest(array) == by_definition(array)


def test_what_was_written_years_ago_is_still_right():
    """One value, from `by_definition`: where it changes, no checkpoint of before can be read."""
    array = (np.arange(12) / 7).astype(np.float32).reshape(3, 4)
    assert digest.digest(array) == "float32[3,4]:9b0c45c378527f1b95d9bfbf00a01cf1"


# ---- however it is split


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shards_sums_add_up_to_the_wholes(shape, dtype):
    array = drawn(shape, dtype)
    rng = np.random.default_rng(1)
    for cuts in (1, 2, 5):
        shards = pieces(array, (0,) * array.ndim, rng, cuts)
        sums = digest.add((0, 0), *(digest.partial(shard, start) for shard, start in shards))
        assert digest.text(array.dtype, array.shape, sums) == digest.digest(array)


@pytest.mark.parametrize("cut", [1, 4095, 4096, 4097, 65_535, 65_536, 65_537, 135_168, 199_999])
def test_a_long_axis_may_be_cut_anywhere(cut):
    array = drawn((200_000,), np.float32)
    sums = digest.add(digest.partial(array[:cut], (0,)), digest.partial(array[cut:], (cut,)))
    assert digest.text(array.dtype, array.shape, sums) == digest.digest(array)


def test_the_order_in_memory_does_not_matter():
    array = drawn((5, 6, 7), np.float32)
    assert digest.digest(np.asfortranarray(array)) == digest.digest(array)
    assert digest.digest(np.repeat(array, 2, axis=1)[:, ::2]) == digest.digest(array)


# ---- what changes it


def flipped(array: np.ndarray, *bits: int) -> np.ndarray:
    raw = np.frombuffer(array.tobytes(), np.uint8).copy()
    for bit in bits:
        raw[bit // 8] ^= 1 << bit % 8
    return raw.view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_counts(dtype):
    array = drawn((3, 2, 4), dtype)
    digests = {digest.digest(flipped(array, bit)) for bit in range(8 * array.nbytes)} | {digest.digest(array)}
    assert len(digests) == 8 * array.nbytes + 1  # all different


def test_every_single_bit_of_a_large_array_counts():
    array = drawn((300, 1000), np.float32)
    places = {int(b) for b in np.random.default_rng(2).integers(0, 8 * array.nbytes, 200)}
    digests = {digest.digest(flipped(array, bit)) for bit in places} | {digest.digest(array)}
    assert len(digests) == len(places) + 1


def test_two_elements_that_change_places_count():
    array = drawn((4, 6), np.float32)
    digests = {digest.digest(array)}
    for a, b in itertools.combinations(range(24), 2):
        other = array.copy()
        other.flat[a], other.flat[b] = array.flat[b], array.flat[a]
        digests.add(digest.digest(other))
    assert len(digests) == 24 * 23 // 2 + 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_and_columns_that_change_places_count(axis):
    array = drawn((5, 6, 7), np.float32)
    whole = digest.digest(array)
    for a, b in itertools.combinations(range(array.shape[axis]), 2):
        order = list(range(array.shape[axis]))
        order[a], order[b] = b, a
        assert digest.digest(array.take(order, axis)) != whole


def test_two_signs_that_change_count():
    """The highest bits: what two of them add to a sum is 0 modulo 2^32 and, were all keys alike, modulo 2^64."""
    array = drawn((8, 8), np.float32)
    digests = {digest.digest(flipped(array, 32 * a + 31, 32 * b + 31)) for a, b in itertools.combinations(range(64), 2)}
    assert len(digests) == 64 * 63 // 2 and digest.digest(array) not in digests


@pytest.mark.parametrize("axis", [0, 1])
def test_a_shift_by_one_counts(axis):
    array = drawn((64, 5000), np.uint8)
    assert digest.digest(np.roll(array, 1, axis)) != digest.digest(array)


def test_a_shift_by_the_period_of_the_keys_counts():
    array = drawn((4 * digest.BLOCK,), np.uint8)
    assert digest.digest(np.roll(array, digest.BLOCK)) != digest.digest(array)


def test_zeros_of_another_shape_or_type_are_something_else():
    shapes = [(), (1,), (12,), (3, 4), (4, 3), (2, 6), (12, 1), (0,), (0, 3)]
    assert len({digest.digest(np.zeros(shape, dtype)) for shape in shapes for dtype in DTYPES}) == len(shapes) * len(
        DTYPES
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.complex64])
def test_minus_zero_is_not_zero(dtype):
    assert digest.digest(np.array([1, -0.0], dtype)) != digest.digest(np.array([1, 0.0], dtype))
