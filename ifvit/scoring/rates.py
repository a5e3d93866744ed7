"""Error rates of a matcher's scores.

A higher score means more alike; a comparison is accepted when score >= threshold. FMR(t) is the
share of impostor scores accepted, FNMR(t) the share of genuine scores refused (ISO/IEC 19795-1;
Maio et al., "FVC2000: Fingerprint Verification Competition", IEEE TPAMI 24(3), 2002). Rates are
fractions, not per cent.

Wherever scores are taken: 1-D array-likes, at least one score, each finite, else UserError.
"""

from bisect import bisect_left
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from ifvit.errors import UserError

FALSE_MATCH_RATES = {"fmr100": 0.01, "fmr1000": 0.001, "zerofmr": 0.0}  # at which the FNMR is given
RATES = ("eer", *FALSE_MATCH_RATES, "auc")
POINTS = 4000  # of a curve for a picture
MOST = 1_000_000  # scores that a cost is reckoned from


def summary(genuine: ArrayLike, impostor: ArrayLike) -> dict[str, float | int]:
    """One database's results: RATES; `genuine`, `impostor` (counts)."""
    _, fmr, fnmr = det_curve(genuine, impostor, POINTS)
    return {
        "eer": eer_of_curve(fmr, fnmr),
        **{name: float(fnmr[fmr <= at][0]) for name, at in FALSE_MATCH_RATES.items()},
        "auc": auc(genuine, impostor),
        "genuine": len(np.asarray(genuine)),
        "impostor": len(np.asarray(impostor)),
    }


def macro(databases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over databases of RATES, each database weighing the same.

    Raises UserError when there is no database.
    """
    if not databases:
        raise UserError("There is no database to average over. Give a folder that holds prints.")
    return {rate: float(np.mean([results[rate] for results in databases.values()])) for rate in RATES}


def thinned(scores: np.ndarray) -> np.ndarray:
    """At most MOST of them, evenly drawn: enough for a cost or a threshold."""
    return scores[:: max(1, -(-len(scores) // MOST))]


def cllr(genuine: Float[np.ndarray, " G"], impostor: Float[np.ndarray, " I"]) -> float:
    """The cost of log-likelihood ratios, natural logarithms, in bits (Brümmer & du Preez 2006, eq. 8).

    0 for a perfect score; 1 for one that tells nothing; above 1 it misleads.
    """
    return float((np.logaddexp(0, -genuine).mean() + np.logaddexp(0, impostor).mean()) / 2 / np.log(2))


def min_cllr(genuine: Float[np.ndarray, " G"], impostor: Float[np.ndarray, " I"]) -> float:
    """What `cllr` would be if the scores, in their order, were calibrated as well as can be (isotonic regression)."""
    from scipy.optimize import isotonic_regression

    scores = np.concatenate([genuine, impostor])
    kind = np.concatenate([np.ones(len(genuine)), np.zeros(len(impostor))])
    values, at = np.unique(scores, return_inverse=True)  # equal scores have one ratio
    weights = np.where(kind > 0, 0.5 / len(genuine), 0.5 / len(impostor))
    total = np.bincount(at, weights, len(values))
    p = isotonic_regression(np.bincount(at, weights * kind, len(values)) / total, weights=total).x
    with np.errstate(divide="ignore"):
        odds = np.log(p) - np.log1p(-p)
    return cllr(odds[at[kind > 0]], odds[at[kind == 0]])


def det_curve(
    genuine: ArrayLike, impostor: ArrayLike, points: int | None = None
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """(thresholds, FMR, FNMR): thresholds ascend, so FMR falls and FNMR rises.

    The thresholds are every distinct score, and the next number above the highest, which refuses
    everything. No other threshold gives other rates. With `points` they are about so many of these where
    there are more, even on logarithmic axes; the EER, and the FNMR at FALSE_MATCH_RATES, are the same.
    """
    genuine, impostor = np.sort(_scores(genuine, "genuine")), np.sort(_scores(impostor, "impostor"))
    if points is None or len(genuine) + len(impostor) <= points:
        scores = np.union1d(genuine, impostor)
    else:
        scores = _telling(genuine, impostor, points)
    thresholds = np.append(scores, np.nextafter(scores[-1], np.inf))
    return thresholds, _fmr(impostor, thresholds), _fnmr(genuine, thresholds)


def _fmr(impostor, thresholds):
    # Counts are subtracted before the division: 1 - 99/100 would come out above 0.01.
    return (len(impostor) - np.searchsorted(impostor, thresholds, "left")) / len(impostor)


def _fnmr(genuine, thresholds):
    return np.searchsorted(genuine, thresholds, "left") / len(genuine)


def _telling(
    genuine: Float[np.ndarray, " g"], impostor: Float[np.ndarray, " i"], points: int
) -> Float[np.ndarray, " p"]:
    """Of ascending scores about `points`, and those where the rates cross or fall to FALSE_MATCH_RATES, ascending."""
    shares = np.geomspace(1e-9, 1, points // 2)
    telling = [kind[(shares * (len(kind) - 1)).astype(int)] for kind in (genuine, impostor[::-1])]
    meet = (
        lambda t: _fnmr(genuine, t) >= _fmr(impostor, t),
        lambda t: _fnmr(genuine, t) > _fmr(impostor, t),
        *(lambda t, rate=rate: _fmr(impostor, t) <= rate for rate in FALSE_MATCH_RATES.values()),
    )
    for holds in meet:  # from some score on
        for kind in (genuine, impostor):
            first = bisect_left(kind, True, key=holds)
            telling.append(kind[max(first - 1, 0) : first + 1])
    return np.unique(np.concatenate(telling))


def equal_error_rate(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """The rate at which FMR = FNMR, as `eer_of_curve` finds it."""
    _, fmr, fnmr = det_curve(genuine, impostor, POINTS)
    return eer_of_curve(fmr, fnmr)


def d_prime(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """How far apart the scores lie, in their own spread: (μ_g − μ_i) / √((σ_g² + σ_i²) / 2) (Daugman 2000).

    Finer than the EER where pairs are few, and not at its end once no two scores overlap.
    """
    g, i = np.asarray(genuine, np.float64), np.asarray(impostor, np.float64)
    return float((g.mean() - i.mean()) / max(np.sqrt((g.var() + i.var()) / 2), 1e-9))


def eer_of_curve(fmr: Float[np.ndarray, " t"], fnmr: Float[np.ndarray, " t"]) -> float:
    """EER of a DET curve whose thresholds ascend, as the FVC defines it (Maio et al. 2002, section 4).

    t1 is the last threshold with FNMR <= FMR, t2 the first with FNMR >= FMR. Of the two intervals
    [FNMR(t1), FMR(t1)] and [FMR(t2), FNMR(t2)] the one of the lower sum counts; the EER is its
    middle. Where some threshold makes both rates equal, that is their value.
    """
    t1 = np.flatnonzero(fnmr <= fmr)[-1]
    t2 = np.flatnonzero(fnmr >= fmr)[0]
    return float(min(fnmr[t1] + fmr[t1], fnmr[t2] + fmr[t2]) / 2)


def fnmr_at_fmr(genuine: ArrayLike, impostor: ArrayLike, fmr: float) -> float:
    """The lowest FNMR among the thresholds whose FMR is at most `fmr` (FMR100: 0.01, FMR1000: 0.001).

    Raises UserError when `fmr` is not within 0 to 1.
    """
    _check_rate(fmr)
    _, fmr_t, fnmr_t = det_curve(genuine, impostor)
    return float(fnmr_t[fmr_t <= fmr][0])


def threshold_at_fmr(impostor: ArrayLike, fmr: float) -> float:
    """The lowest threshold at which at most the share `fmr` of the impostor scores is accepted.

    It lies next above an impostor score in the scores' own precision, so `score >= threshold` gives
    the FNMR of `fnmr_at_fmr` whether the scores are float32 or float64. At an `fmr` of 1 it is the
    lowest score.

    Raises UserError when `fmr` is not within 0 to 1.
    """
    _check_rate(fmr)
    falling = np.sort(_scores(impostor, "impostor"))[::-1]
    if fmr == 1:
        return float(falling[-1])
    # n impostors may pass; the score of rank n + 1 and all that equal it may not.
    passes = int(np.count_nonzero(np.arange(1, len(falling) + 1) / len(falling) <= fmr))
    return float(np.nextafter(falling[passes], falling.dtype.type(np.inf)))


def auc(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """The chance that a genuine score exceeds an impostor score, a tie counting one half (Mann-Whitney U / nm)."""
    genuine, impostor = _scores(genuine, "genuine"), np.sort(_scores(impostor, "impostor"))
    below = np.searchsorted(impostor, genuine, "left")
    not_above = np.searchsorted(impostor, genuine, "right")
    return float(np.mean((below + not_above) / 2) / len(impostor))


def _scores(values: ArrayLike, kind: str) -> np.ndarray:
    """Floats of the given precision (integers as float64): `threshold_at_fmr` depends on it."""
    scores = np.asarray(values)
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise UserError(f"There are no {kind} scores to rate. Give two fingers with two impressions each.")
    if not np.isfinite(scores).all():
        raise UserError(
            f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} {kind} scores are not finite numbers. "
            "Check the model that gave them: NaN weights give NaN scores."
        )
    return scores


def _check_rate(fmr: float) -> None:
    if not 0 <= fmr <= 1:
        raise UserError(f"A false match rate of {fmr} is not within 0 to 1. Give a fraction, such as 0.001.")
