"""What pairs are scored by, of either module: each print prepared once, then pair by pair."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from ifvit.bar import bar
from ifvit.config import Settings
from ifvit.data.loader import fixed_batches, print_rows
from ifvit.data.pairs import Pair
from ifvit.data.prepare import Prints
from ifvit.devices.sharding import batch_spec, fetch, make_mesh, put_whole_batch, replicated
from ifvit.models.networks import Network
from ifvit.pixels.alignment import align, aligned_pair
from ifvit.pixels.geometry import exact
from ifvit.pixels.registration import paired, prepared, views_of
from ifvit.pixels.wide import KEY, looked_at, widened
from ifvit.window import cuts


class PairScore(NamedTuple):
    """How pairs are scored, both parts jitted or to be: what is done once a print, and what is done for each pair.

    `prepare(*state, prints)` -> rows of prints (`registration.prepared`), `score(*state, batch)` -> name: (B, …), where
    the batch is `registration.paired` of such rows, or one of canvases. `wide` takes the place of both for pairs with a
    print whose mask `cut` tells to be too large (`pixels.wide`).
    """

    prepare: Callable
    score: Callable
    wide: "PairScore | None" = None
    cut: Callable | None = None

    def jitted(self) -> "PairScore":
        wide = self.wide and self.wide.jitted()
        return PairScore(jax.jit(self.prepare), jax.jit(self.score), wide, self.cut)


def in_either_window(how: Callable[[Settings | None], PairScore], config: Settings, times: float) -> PairScore:
    """`how(None)`, and `how(wide)` of the window that is so many times as wide, for pairs that need it."""
    wide = widened(config, times)
    narrow = how(None)
    return narrow._replace(wide=how(wide), cut=lambda mask: cuts(mask, config)) if wide else narrow


def prepares(aligner: Network | None, config: Settings, check: bool = False) -> Callable:
    """(aligner_state, prints) -> `registration.prepared`."""

    @exact
    def prepare(aligner_state, prints):
        return prepared(aligner, aligner_state, prints, config, check)

    return prepare


def dense_prepares(net: Network, config: Settings) -> Callable:
    """(params, batch_stats, prints) -> what Module 1 registers and checks prints by."""
    prepare = prepares(net, config, check=True)
    return lambda params, batch_stats, prints: prepare((params, batch_stats), prints)


def dense_scores(net: Network, config: Settings, wide_window: float = 1.0) -> PairScore:
    """Module 1, its state (params, batch_stats) -> `ridges`, how well they agree, `overlap`, `matches`, the inliers."""

    def how(wide):
        @exact
        def score(params, batch_stats, batch):
            found, by_matches = looked_at(net, (params, batch_stats), batch, config, wide)
            return {"ridges": found.agreement, "overlap": found.overlap, "matches": by_matches.count}

        return PairScore(dense_prepares(net, wide or config), score)

    return in_either_window(how, config, wide_window)


def match_scores(
    net: Network, aligner: Network | None, config: Settings, check: bool = False, wide_window: float = 1.0
) -> PairScore:
    """Module 2, its state (params, batch_stats, aligner_state) -> cosines `global` and `local`, `agreement`, `matches`.

    `agreement` is the global branch's matching confidence of each overlap cell with itself, summed:
    in the common frame of a genuine pair a cell is its own match. With `check`, and an aligner, the pair is laid as its
    ridges agree best, and there are `ridges`, how well they do, and `overlap` too; whoever has that registration
    already gives it as `looked`. Module 1 then has a wider window where it needs one (`wide_window` times), both
    branches never.
    """
    checked = check and aligner is not None

    def how(wide):
        @exact
        def prepare(params, batch_stats, aligner_state, prints):
            if wide is None:
                return prepared(aligner, aligner_state, prints, config, checked)
            of_wide = prepared(aligner, aligner_state, prints, wide, checked)
            return prepared(None, (), prints, config) | {KEY + k: v for k, v in of_wide.items()}

        @exact
        def score(params, batch_stats, aligner_state, batch, looked=None):
            views, ridges = views_of(batch, config), {}
            if checked:
                found, by_matches = looked or looked_at(aligner, aligner_state, batch, config, wide)
                image0, mask0, image1, mask1 = views
                pair = align(image0, image1, mask0, mask1, found.similarity, config, found.deformation)
                count = by_matches.count
                ridges = {"ridges": found.agreement, "overlap": found.overlap}
            else:
                pair, _, count = aligned_pair(aligner, aligner_state, views, config, batch)
            e, _ = net.apply(params, batch_stats, pair, train=False)
            itself = jnp.exp(jnp.diagonal(e.log_conf, axis1=1, axis2=2)) * e.cells
            return ridges | {
                "global": (e.global0 * e.global1).sum(-1),
                "local": (e.local0 * e.local1).sum(-1),
                "agreement": itself.sum(-1),
                "matches": count,
            }

        return PairScore(prepare, score)

    return in_either_window(how, config, wide_window if checked else 1.0)


PREPARED_BYTES = 512 << 20  # of prints, that are kept ready at once


def score_pairs(
    how: PairScore, state: tuple, prints: Prints, pairs: Sequence[Pair], batch_size: int, model_parallel: int = 1
) -> dict[str, np.ndarray]:
    """`how.score` of all pairs, split over the devices: name -> (pairs, …) array, in order.

    A print passes the backbone once, however many pairs it is in, as long as PREPARED_BYTES suffice; else once for
    each block of pairs. A batch that does not divide among accelerators or processes is made as much larger. One pair
    alone is scored of its canvases: one program to start in place of five.
    """
    if len(pairs) == 1 and jax.process_count() == 1:
        batch, _ = next(fixed_batches(prints, pairs, 1))
        return fetch(for_pair(how, prints, pairs[0]).score(*state, batch))
    if jax.process_count() > 1 or jax.default_backend() != "cpu":
        batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    mesh = make_mesh(batch_size, model_parallel)
    numbers = np.fromiter((n for pair in pairs for n in pair[:2]), np.int32, 2 * len(pairs)).reshape(-1, 2)
    wide = np.zeros(len(pairs), bool)
    if how.cut:
        there, places = np.unique(numbers, return_inverse=True)
        is_cut = np.array([how.cut(prints.canvas(int(i))[1]) for i in there], bool)
        wide = is_cut[places.reshape(-1, 2)].any(1)
    found: dict[str, np.ndarray] = {}
    with bar("scoring", len(pairs), "pair") as shown:
        for one, which in ((how, np.flatnonzero(~wide)), (how.wide, np.flatnonzero(wide))):
            if len(which):
                for at, rows in _scored(one, state, prints, numbers[which], batch_size, mesh):
                    for k, v in rows.items():
                        found.setdefault(k, np.empty((len(pairs), *v.shape[1:]), v.dtype))[which[at]] = v
                    shown.update(len(at))
    return found


def for_pair(how: PairScore, prints: Prints, pair: Pair) -> PairScore:
    """`how` for a pair as large as this one."""
    return how.wide if how.cut and any(how.cut(prints.canvas(i)[1]) for i in pair[:2]) else how


def in_graph(how: PairScore, state: tuple, batch: dict) -> dict[str, jax.Array]:
    """What `score_pairs` tells of a batch of canvases, to be traced."""
    if not how.cut:
        return how.score(*state, batch)
    wide = how.cut(batch["mask0"]) | how.cut(batch["mask1"])
    narrow = lambda: how.score(*state, batch)
    either = lambda: {k: jnp.where(wide, v, narrow()[k]) for k, v in how.wide.score(*state, batch).items()}
    return jax.lax.cond(wide.any(), either, narrow)


def _scored(
    how: PairScore, state: tuple, prints: Prints, numbers: Int[np.ndarray, "N 2"], batch_size: int, mesh: Mesh
) -> Iterator[tuple[Int[np.ndarray, " M"], dict[str, np.ndarray]]]:
    """Batch by batch, which pairs, and their scores."""
    empty, put, take = _programs(mesh)
    of_batch = lambda some: np.concatenate([some, np.repeat(some[-1:], batch_size - len(some), axis=0)])
    one = jax.eval_shape(how.prepare, *state, print_rows(prints, numbers[:1, 0]))
    shapes = tuple((k, x.shape[1:], x.dtype) for k, x in one.items())
    size = sum(x.size * x.dtype.itemsize for x in one.values())
    if jax.default_backend() == "cpu":  # devices that share one memory, and each has all rows
        size *= len(mesh.local_devices)
    room = max(PREPARED_BYTES // max(size, 1) // batch_size, 2) * batch_size
    for block in blocks(numbers, room):
        needed = np.unique(numbers[block])
        store = None  # the last block's goes before there is another
        store = empty(shapes, -(-len(needed) // batch_size) * batch_size)
        for at in range(0, len(needed), batch_size):
            rows = put_whole_batch(print_rows(prints, of_batch(needed[at : at + batch_size])), mesh)
            store = put(store, how.prepare(*state, rows), at)
            if jax.default_backend() == "cpu":
                # XLA runs what is ready first: with much of it begun, `put` may wait for its part on another core
                # until it takes that for dead (40 s), and ends the process.
                jax.block_until_ready(store)
        for at in range(0, len(block), batch_size):
            which = block[at : at + batch_size]
            rows = put_whole_batch({"at": np.searchsorted(needed, of_batch(numbers[which]))}, mesh)["at"]
            found = fetch(how.score(*state, take(store, rows)))
            yield which, {k: v[: len(which)] for k, v in found.items()}


@functools.lru_cache(maxsize=8)
def _programs(mesh: Mesh) -> tuple[Callable, Callable, Callable]:
    """Rows of prints that every device has: empty ones, with some put in, and those of a batch of pairs."""

    def empty(shapes, places: int) -> dict:
        return {k: jnp.zeros((places, *shape), dtype) for k, shape, dtype in shapes}

    def put(store: dict, rows: dict, at) -> dict:
        return {k: jax.lax.dynamic_update_slice_in_dim(store[k], rows[k], at, 0) for k in store}

    def take(store: dict, rows) -> dict:
        return paired(*({k: v[rows[:, n]] for k, v in store.items()} for n in (0, 1)))

    whole, split = replicated(mesh), NamedSharding(mesh, batch_spec())
    return (
        jax.jit(empty, static_argnums=(0, 1), out_shardings=whole),
        jax.jit(put, donate_argnums=0, out_shardings=whole),
        jax.jit(take, out_shardings=split),
    )


def blocks(numbers: Int[np.ndarray, "N 2"], room: int) -> Iterator[Int[np.ndarray, " M"]]:
    """All pairs, parted so that each part has at most `room` prints; prints that meet often are in one part."""
    side = max(room // 2, 1)
    low, high = np.sort(numbers, axis=1).T // side
    tiles = low.astype(np.int64) * (numbers.max(initial=0) // side + 1) + high
    order = np.argsort(tiles, kind="stable")
    start, have = 0, np.empty(0, np.int32)
    edges = [*(np.flatnonzero(np.diff(tiles[order])) + 1), len(order)]
    for at, stop in zip([0, *edges], edges):
        union = np.union1d(have, numbers[order[at:stop]])
        if len(union) > room:
            yield order[start:at]
            start, union = at, np.unique(numbers[order[at:stop]])
        have = union
    if start < len(order):
        yield order[start:]
