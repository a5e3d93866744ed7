"""How sure the rates of a database are: 95 % intervals by bootstrap over its fingers.

Pairs that share a finger are not independent, so fingers are drawn and not pairs (Bolle, Ratha and Pankanti, "Error
analysis of pattern recognition systems: the subsets bootstrap", CVIU 93(1), 2004). Of F fingers F are drawn with
replacement. A finger that is drawn w times gives its genuine pairs the weight w; an impostor pair of two fingers has
the product of their weights. A database without an error has none in any draw: then the interval is a point and says
nothing.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Num

from ifvit.scoring.rates import FALSE_MATCH_RATES, RATES

SEED = 20020
DRAWS = 1000
DRAWS_OF_MANY = 200  # where a database has more than `MANY` pairs: seconds, not minutes
MANY = 2_000_000
THRESHOLDS = 8192  # at most; of more scores a sample serves
AT_ONCE = 1 << 22  # weights of pairs in memory


def bootstrap(
    genuine: Num[np.ndarray, " g"],
    impostor: Num[np.ndarray, " i"],
    genuine_fingers: Int[np.ndarray, " g"],
    impostor_fingers: Int[np.ndarray, "i 2"],
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Each of RATES in every draw; fingers are told by numbers.

    The draws are the same for all scores of the same pairs, so the rates of two systems can be subtracted draw by draw.
    Draws that leave no genuine or no impostor pair are made again.
    """
    rng = np.random.default_rng(SEED)
    there = np.zeros(1 + max(genuine_fingers.max(), impostor_fingers.max()), bool)
    there[genuine_fingers] = there[impostor_fingers] = True
    number, count = np.cumsum(there, dtype=np.int32) - 1, np.count_nonzero(there)
    draws = DRAWS if len(genuine) + len(impostor) <= MANY else DRAWS_OF_MANY
    weights = lambda n: rng.multinomial(count, np.full(count, 1 / count), size=n).astype(np.int32)
    rate = _Rates(genuine, impostor, number[genuine_fingers], number[impostor_fingers])
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
        order_g, order_i = np.argsort(genuine), np.argsort(impostor)
        genuine, impostor = genuine[order_g], impostor[order_i]
        self.genuine_fingers = genuine_fingers[order_g]
        self.impostor_fingers = impostor_fingers[order_i]
        thresholds = _thresholds(genuine, impostor)
        # How many scores lie below each threshold; the last one refuses all.
        self.genuine_below = np.append(np.searchsorted(genuine, thresholds, "left"), len(genuine))
        self.impostor_below = np.append(np.searchsorted(impostor, thresholds, "left"), len(impostor))

    def of(self, weights: Int[np.ndarray, "n fingers"]) -> dict[str, Float[np.ndarray, " n"]]:
        """NaN where no genuine or no impostor pair has a weight."""
        step = max(1, AT_ONCE // (len(self.genuine_fingers) + len(self.impostor_fingers)))
        parts = [self._of(weights[at : at + step]) for at in range(0, len(weights), step)]
        return {name: np.concatenate([p[name] for p in parts]) for name in RATES}

    def _of(self, weights):
        a, b = self.impostor_fingers.T
        genuine = _sums_below(np.take(weights, self.genuine_fingers, axis=1), self.genuine_below)
        impostor = _sums_below(np.take(weights, a, axis=1) * np.take(weights, b, axis=1), self.impostor_below)
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


def _sums_below(weights: Int[np.ndarray, "n pairs"], below: Int[np.ndarray, " t"]) -> Int[np.ndarray, "n t"]:
    """The sums of the first `below[t]` weights of each row."""
    starts = np.unique(below[below < weights.shape[1]])  # reduceat wants none twice, nor the end
    sums = np.zeros((len(weights), len(starts) + 1), np.int64)
    np.cumsum(np.add.reduceat(weights, starts, axis=1, dtype=np.int64), axis=1, out=sums[:, 1:])
    return sums[:, np.searchsorted(starts, below, "left")]


def _thresholds(genuine: Num[np.ndarray, " g"], impostor: Num[np.ndarray, " i"]) -> Num[np.ndarray, " t"]:
    """Every score; of more than THRESHOLDS the highest impostors', which FMR1000 and ZeroFMR hang on, and a sample of
    both kinds. Both ascend.
    """
    every = np.unique(np.concatenate([genuine, impostor]))
    if len(every) <= THRESHOLDS:
        return every
    third = THRESHOLDS // 3
    sample = [scores[np.linspace(0, len(scores) - 1, third).astype(int)] for scores in (genuine, impostor)]
    above = np.nextafter(impostor[-1], np.inf)  # no impostor passes
    return np.unique(np.concatenate([*sample, impostor[-third:], [above], every[:1]]))
