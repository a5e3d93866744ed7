"""How sure the rates of a database are: 95 % intervals by bootstrap over its fingers.

Pairs that share a finger are not independent, so fingers are drawn and not pairs (Bolle, Ratha and Pankanti, "Error
analysis of pattern recognition systems: the subsets bootstrap", CVIU 93(1), 2004). Of F fingers F are drawn with
replacement. A finger that is drawn w times gives its genuine pairs the weight w; an impostor pair of two fingers has
the product of their weights. A database without an error has none in any draw: then the interval is a point and says
nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.sparse import csr_array

from ifvit.data.protocols import EveryTwo
from ifvit.scoring.rates import FALSE_MATCH_RATES, RATES

SEED = 20020
DRAWS = 1000
DRAWS_OF_MANY = 200  # where a database has more than `MANY` pairs: seconds, not minutes
MANY = 2_000_000
THRESHOLDS = 8192  # at most; of more scores a sample serves
DRAWS_AT_ONCE = 200
BLOCK = 1 << 18  # pairs that are sorted and looked up at once
ROWS = 4096  # pairs that are weighed at once, so few that they stay in a core's cache, and 32 bits hold their sum


@dataclass(frozen=True, eq=False)
class Fingers:
    """Whose impostor pairs are, looked up as they are asked for: `fingers[numbers]`, as of an array of them."""

    finger: Int[np.ndarray, " prints"]  # its number, of each print
    pairs: EveryTwo | Int[np.ndarray, "i 2"]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, numbers: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 2"]:
        return self.finger[self.pairs[numbers]]


def bootstrap(
    genuine: Num[np.ndarray, " g"],
    impostor: Num[np.ndarray, " i"],
    genuine_fingers: Int[np.ndarray, " g"],
    impostor_fingers: Int[np.ndarray, "i 2"] | Fingers,
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Each of RATES in every draw; fingers are told by numbers.

    The draws are the same for all scores of the same pairs, so the rates of two systems can be subtracted draw by draw.
    Draws that leave no genuine or no impostor pair are made again.
    """
    rng = np.random.default_rng(SEED)
    there = reduce(np.union1d, (f[n] for f in (genuine_fingers, impostor_fingers) for n in _blocks(len(f))))

    def weights(n):
        of_all = np.zeros((n, there[-1] + 1), np.int32)
        of_all[:, there] = rng.multinomial(len(there), np.full(len(there), 1 / len(there)), size=n)
        return of_all

    draws = DRAWS if len(genuine) + len(impostor) <= MANY else DRAWS_OF_MANY
    rate = _Rates(genuine, impostor, genuine_fingers, impostor_fingers)
    drawn = rate.of(weights(draws))
    while len(again := np.flatnonzero(np.isnan(drawn["eer"]))):
        for name, values in rate.of(weights(len(again))).items():
            drawn[name][again] = values
    return drawn


def of(drawn: Mapping[str, Float[np.ndarray, " draws"]]) -> dict[str, list[float]]:
    """The interval of each rate, as metrics.json has it: `eer_ci` …"""
    return {f"{name}_ci": interval(values) for name, values in drawn.items()}


def interval(values: Float[np.ndarray, " draws"]) -> list[float]:
    """From the 2.5th to the 97.5th percentile."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def macro(databases: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Float[np.ndarray, " draws"]]:
    """The mean of each rate over databases, draw by draw.

    Fingers of two databases are drawn independently, while `bootstrap` makes the same draws for as many fingers: hence
    the shuffling.
    """
    rng = np.random.default_rng(SEED)
    shuffled = []
    for drawn in databases.values():
        order = rng.permutation(np.resize(np.arange(len(drawn["eer"])), DRAWS))
        shuffled.append({name: values[order] for name, values in drawn.items()})
    return {name: np.mean([drawn[name] for drawn in shuffled], axis=0) for name in RATES}


class _Rates:
    """RATES of weighted pairs. With equal weights they are those of `rates.summary`, but for very many scores."""

    def __init__(self, genuine, impostor, genuine_fingers, impostor_fingers):
        self.kinds = (genuine, genuine_fingers), (impostor, impostor_fingers)
        self.thresholds = _thresholds(np.sort(genuine), np.sort(impostor))

    def of(self, weights: Int[np.ndarray, "n fingers"]) -> dict[str, Float[np.ndarray, " n"]]:
        """NaN where no genuine or no impostor pair has a weight."""
        parts = [self._of(weights[at : at + DRAWS_AT_ONCE]) for at in range(0, len(weights), DRAWS_AT_ONCE)]
        return {name: np.concatenate([p[name] for p in parts]) for name in RATES}

    def _of(self, weights):
        genuine, impostor = (_sums_below(self.thresholds, *kind, weights) for kind in self.kinds)
        genuine_total, impostor_total = (np.where(s[:, -1:] > 0, s[:, -1:], np.nan) for s in (genuine, impostor))
        fnmr, fmr = genuine / genuine_total, (impostor_total - impostor) / impostor_total
        either = (fnmr + fmr) / 2
        # The EER as `rates.eer_of_curve` has it. FMR falls and FNMR rises along an axis.
        t1 = np.count_nonzero(fnmr <= fmr, axis=1) - 1
        t2 = np.argmax(fnmr >= fmr, axis=1)
        at = lambda values, index: np.take_along_axis(values, index[:, None], axis=1)[:, 0]
        rates = {"eer": np.minimum(at(either, t1), at(either, t2))}
        for name, most in FALSE_MATCH_RATES.items():
            rates[name] = at(fnmr, np.argmax(fmr <= most, axis=1))
        # The area under 1 - FNMR over FMR, by trapezoids: a tie counts one half.
        rates["auc"] = -np.trapezoid(1 - fnmr, fmr, axis=1)
        return rates


def _sums_below(thresholds, scores, fingers, weights: Int[np.ndarray, "n fingers"]) -> Int[np.ndarray, "n t"]:
    """In each draw the weight of all pairs with scores below each threshold, and at last of all pairs."""
    of_finger = np.ascontiguousarray(weights.T)
    sums = np.zeros((len(thresholds) + 1, len(weights)), np.int64)
    for numbers in _blocks(len(scores)):
        part = scores[numbers[0] : numbers[-1] + 1]
        order = np.argsort(part)
        whose = fingers[numbers].reshape(len(numbers), -1)[order].T  # a row of genuine pairs, two of impostor pairs
        below = np.searchsorted(part[order], thresholds, "left")
        for start in range(0, len(numbers), ROWS):
            weight, *other = (of_finger[f[start : start + ROWS]] for f in whose)
            for o in other:
                weight *= o
            # What lies from one threshold to the next is summed; `first` and `last` count the thresholds below.
            stop = start + len(weight)
            first, last = np.searchsorted(below, (start, stop - 1), "right")
            ends = np.concatenate([[start], below[first:last], [stop]]) - start
            side_by_side = np.ones(len(weight), np.int32), np.arange(len(weight)), ends
            sums[first : last + 1] += csr_array(side_by_side, (len(ends) - 1, len(weight))) @ weight
    return sums.cumsum(axis=0).T


def _blocks(count: int) -> Iterator[Int[np.ndarray, " n"]]:
    """The numbers below `count`, some after the other."""
    return (np.arange(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def _thresholds(genuine: Num[np.ndarray, " g"], impostor: Num[np.ndarray, " i"]) -> Num[np.ndarray, " t"]:
    """Every score; of more than THRESHOLDS the highest impostors', which FMR1000 and ZeroFMR hang on, and a sample of
    both kinds. Both ascend.
    """
    if max(1 + np.count_nonzero(scores[1:] != scores[:-1]) for scores in (genuine, impostor)) <= THRESHOLDS:
        every = np.union1d(genuine, impostor)
        if len(every) <= THRESHOLDS:
            return every
    third = THRESHOLDS // 3
    sample = [scores[np.linspace(0, len(scores) - 1, third).astype(int)] for scores in (genuine, impostor)]
    lowest, above = min(genuine[0], impostor[0]), np.nextafter(impostor[-1], np.inf)  # above it no impostor passes
    return np.unique(np.concatenate([*sample, impostor[-third:], [lowest, above]]))
