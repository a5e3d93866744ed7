"""Batches through Grain: random access by pair number, so a resume or another host count needs no state."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ifvit.data.impressions import Impressions
from ifvit.data.pairs import Pair
from ifvit.data.prepare import Prints, PrintSet


def example(prints: Prints, pair: Pair, classes: dict) -> dict[str, np.ndarray]:
    """One pair as the step takes it; a label is −1 for a finger that is no class."""
    (canvas0, mask0), (canvas1, mask1) = prints.canvas(pair.print0), prints.canvas(pair.print1)
    label0, label1 = (np.int32(classes.get(prints.prints[i].identity, -1)) for i in pair[:2])
    return {
        "canvas0": canvas0,
        "canvas1": canvas1,
        "mask0": mask0,
        "mask1": mask1,
        "genuine": np.bool_(pair.genuine),
        "label0": label0,
        "label1": label1,
    }


@dataclass(frozen=True)
class PairSource:
    """Grain's random-access source: the pairs of this process, from step `start` on.

    The global batch of step s holds the pairs s·B … s·B + B − 1, in `accumulate` micro-batches; process p of P
    reads its P-th part of each. With `impressions` an example has `map01` and `map10` too (`Impressions.maps`).
    """

    prints: PrintSet
    pairs: object  # DensePairs or MatchPairs: pairs[n] -> Pair
    classes: dict
    batch_size: int
    start: int
    stop: int
    process: int
    processes: int
    accumulate: int = 1
    impressions: Impressions | None = None

    def __len__(self):
        return (self.stop - self.start) * self.batch_size // self.processes

    def __getitem__(self, i: int):
        local = self.batch_size // self.accumulate // self.processes
        micro, slot = divmod(int(i), local)
        n = self.start * self.batch_size + (micro * self.processes + self.process) * local + slot
        pair = self.pairs[n]
        row = example(self.prints, pair, self.classes)
        return row | self.impressions.maps(pair.print0, pair.print1) if self.impressions else row


def batches(source: PairSource, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """The source's batches in order, read ahead by threads, or by `workers` processes."""
    import grain.python as grain

    data = grain.MapDataset.source(source).batch(source.batch_size // source.processes)
    stream = data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)


def fixed_batches(
    prints: Prints, pairs: Sequence[Pair], batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Pairs in batches of one size, the last filled up with its last pair: (batch, how many count)."""
    for at in range(0, len(pairs), batch_size):
        part = pairs[at : at + batch_size]
        rows = [example(prints, p, {}) for p in part + [part[-1]] * (batch_size - len(part))]
        yield {k: np.stack([r[k] for r in rows]) for k in rows[0]}, len(part)


def print_rows(prints: Prints, numbers: Int[np.ndarray, " N"]) -> dict[str, np.ndarray]:
    """`canvas` (N C C) uint8 and `mask` (N C/8 C/8) bool of prints by their numbers."""
    canvases, masks = zip(*(prints.canvas(int(i)) for i in numbers))
    return {"canvas": np.stack(canvases), "mask": np.stack(masks)}
