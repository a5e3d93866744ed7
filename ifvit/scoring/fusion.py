"""Module 2's scores of a pair, fused into one: a calibrated log-likelihood ratio, and thresholds for it."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from ifvit.pixels.agreement import FAINT, LOGISTIC, log_odds
from ifvit.scoring.rates import threshold_at_fmr

AT_ONCE = 1 << 20  # pairs whose features are in memory together
Scores = dict[str, np.ndarray]

# What a fusion may weigh, of the scores of N pairs, by numpy or by jax.numpy. Cosines tell most between 0.95 and 1, and
# there the logarithm looks.
FEATURES: dict[str, Callable[[Scores, ModuleType], np.ndarray | jax.Array]] = {
    "log_clear": lambda s, xp: xp.log(s["ridges"] + FAINT),
    "log_ridges": lambda s, xp: xp.log(xp.interp(s["ridges"], CLEAR, AS_THEY_WERE) + FAINT),
    "overlap": lambda s, xp: s["overlap"],
    "log_global": lambda s, xp: -xp.log(1.001 - s["global"]),
    "log_local": lambda s, xp: -xp.log(1.001 - s["local"]),
    "global": lambda s, xp: s["global"],
    "local": lambda s, xp: s["local"],
    "agreement": lambda s, xp: xp.log1p(s["agreement"]),
    "matches": lambda s, xp: xp.log1p(s["matches"]),
}
# The agreement of ridges, and of the same pairs before ridges were smoothed (`pixels.enhancement`): quantiles of
# impostor and genuine pairs. Checkpoints of then weigh `log_ridges`, and so keep their thresholds, nearly.
CLEAR = np.array([0, 0.05, 0.129, 0.148, 0.165, 0.36, 0.45, 0.53, 1], np.float32)
AS_THEY_WERE = np.array([0, 0.04, 0.093, 0.105, 0.131, 0.26, 0.41, 0.5, 1], np.float32)
OF_RIDGES = ("log_clear", "log_ridges")
EARLIER = ("global", "local", "agreement", "matches")  # of checkpoints that name no features
# Towards which a fit is drawn: the ridges' log-odds as they are, and nothing of the cosines, which must show their
# worth.
PRIOR = (1.0, 0.0, 0.0)
HELD = 0.03  # how strongly, where nothing chooses it
STRENGTHS = (0.003, 0.03, 0.3)


@dataclass(frozen=True)
class Fusion:
    """A logistic fusion of a pair's scores, and the impostor scores that thresholds are taken from."""

    weights: tuple[float, ...]  # of the features
    bias: float
    impostor_scores: tuple[float, ...]  # fused, of the calibration pairs, descending
    features: tuple[str, ...] = EARLIER

    @classmethod
    def of_metadata(cls, told: dict) -> "Fusion":
        """As `dataclasses.asdict` and JSON have left it."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})

    @property
    def checked(self) -> bool:
        """Whether it is for pairs that are laid as their ridges agree best."""
        return any(name in self.features for name in OF_RIDGES)

    def log_odds(self, scores: Scores) -> Float[np.ndarray, " N"]:
        """The natural log-likelihood ratio: how much likelier these scores are of one finger than of two."""
        found = np.empty(len(scores["global"]))
        for at in range(0, len(found), AT_ONCE):
            x = features({k: v[at : at + AT_ONCE] for k, v in scores.items()}, self.features)
            found[at : at + AT_ONCE] = x @ np.asarray(self.weights) + self.bias
        return found

    def parts(self, scores: Scores) -> dict[str, Float[np.ndarray, " N"]]:
        """What each feature adds to `log_odds`; the bias belongs to the ridges, else to the first feature."""
        x = features(scores, self.features) * np.asarray(self.weights)
        x[:, next((n for n, name in enumerate(self.features) if name in OF_RIDGES), 0)] += self.bias
        return dict(zip(self.features, x.T))

    def traced_log_odds(self, scores: dict[str, jax.Array]) -> Float[jax.Array, " N"]:
        """The same inside a jitted function, in float32."""
        parts = zip(self.weights, self.features)
        return sum(weight * FEATURES[name](scores, jnp) for weight, name in parts) + jnp.float32(self.bias)

    def score(self, scores: Scores) -> Float[np.ndarray, " N"]:
        """Probability that a pair is genuine, were genuine and impostor pairs equally many."""
        return 1 / (1 + np.exp(-self.log_odds(scores)))

    def threshold(self, fmr: float) -> float:
        """The lowest score that at most a share `fmr` of the impostors reaches: `score >= threshold` is a match.

        Below `least_fmr` it is an estimate, no measurement. Below one in the number of calibration pairs the tail of
        the log-odds is taken as exponential (fitted to its highest tenth).
        """
        scores = np.asarray(self.impostor_scores)
        rank = fmr * len(scores)
        if rank >= 1:
            return threshold_at_fmr(scores, fmr)
        odds = np.log(np.clip(scores, 1e-12, 1 - 1e-12) / (1 - np.clip(scores, 1e-12, 1 - 1e-12)))
        tail = odds[: max(2, len(odds) // 10)]
        spread = max(float((tail - tail[-1]).mean()), 1e-3)
        return float(1 / (1 + np.exp(-(tail[-1] + spread * np.log(len(tail) / max(rank, 1e-9))))))

    @property
    def least_fmr(self) -> float:
        """The lowest false match rate that the calibration pairs can show, by the rule of three."""
        return min(1.0, 3 / max(len(self.impostor_scores), 1))


def features(scores: Scores, names: tuple[str, ...]) -> Float[np.ndarray, "N F"]:
    """The named FEATURES of N pairs."""
    return np.stack([np.asarray(FEATURES[name](scores, np), np.float64) for name in names], axis=1)


def evidence(scores: Scores) -> Float[np.ndarray, " N"]:
    """What is told before any weight is fitted: the parts that `fit_fusion` weighs, added up."""
    return _parts(scores).sum(1)


def _parts(scores: Scores) -> Float[np.ndarray, "N P"]:
    """The ridges' log-odds, where there is a Module 1, and the logarithms of both cosines."""
    cosines = features(scores, ("log_global", "log_local"))
    if "ridges" not in scores:
        return cosines
    ridges = np.asarray(log_odds(scores["ridges"], scores["overlap"]), np.float64)
    return np.concatenate([ridges[:, None], cosines], axis=1)


def fit_fusion(
    scores: Scores, genuine: Bool[np.ndarray, " N"], databases: np.ndarray | None = None, paper: float | None = None
) -> Fusion:
    """Logistic regression of the ridges' log-odds and of the logarithms of both cosines; both classes weigh alike.

    Weights are at least 0, for no part may count against a pair, and drawn to PRIOR: on few fingers, which it may
    separate without an error, a fit would follow what holds for them alone. With `databases`, the name of each pair's,
    the strength is chosen on each of them in turn, fitted to the others. `paper`: the weight of the global cosine in
    the paper's sum of both, which is calibrated then, and nothing else is heeded.
    """
    if paper is not None:
        total = paper * scores["global"] + (1 - paper) * scores["local"]
        (slope,), bias = _logistic(total[:, None].astype(np.float64), genuine, np.zeros(1), 1e-6)
        fusion = Fusion((slope * paper, slope * (1 - paper)), bias, (), ("global", "local"))
        return _with_impostors(fusion, scores, genuine)
    x = _parts(scores)
    prior = np.array(PRIOR if x.shape[1] == len(PRIOR) else PRIOR[1:])
    strength = HELD if databases is None else _chosen(x, genuine, prior, databases)
    found, bias = _logistic(x, genuine, prior, strength)
    *ridges, w_global, w_local = found
    weights = {"log_global": w_global, "log_local": w_local}
    for weight in ridges:  # one or none; written out, so that a checkpoint keeps its own LOGISTIC
        slope, of_overlap, constant = LOGISTIC
        weights |= {"log_clear": weight * slope, "overlap": weight * of_overlap}
        bias += weight * constant
    fusion = Fusion(tuple(map(float, weights.values())), float(bias), (), tuple(weights))
    return _with_impostors(fusion, scores, genuine)


def _with_impostors(fusion: Fusion, scores: Scores, genuine: np.ndarray) -> Fusion:
    found = np.sort(fusion.score({k: v[~genuine] for k, v in scores.items()}))[::-1]
    return Fusion(fusion.weights, fusion.bias, tuple(map(float, found)), fusion.features)


def _logistic(x, genuine, prior, strength: float) -> tuple[np.ndarray, float]:
    """Weights ≥ 0 and the bias that have the least class-balanced loss, plus strength · |weights − prior|²."""
    from scipy.optimize import minimize

    y = genuine.astype(np.float64)
    w = _balanced(y)

    def loss(theta):
        logit, away = x @ theta[:-1] + theta[-1], theta[:-1] - prior
        p = 1 / (1 + np.exp(-logit))
        value = (w * (np.logaddexp(0, logit) - y * logit)).sum() + strength * (away**2).sum()
        return value, np.append(x.T @ (w * (p - y)) + 2 * strength * away, (w * (p - y)).sum())

    bounds = [(0, None)] * x.shape[1] + [(None, None)]
    theta = minimize(loss, np.append(prior + 0.1, 0.0), jac=True, bounds=bounds).x
    return theta[:-1], float(theta[-1])


def _balanced(y: np.ndarray) -> np.ndarray:
    """Weights of pairs that let both classes weigh a half."""
    return np.where(y > 0, 0.5 / max(y.sum(), 1), 0.5 / max((1 - y).sum(), 1))


def _chosen(x, genuine, prior, databases) -> float:
    """The one of STRENGTHS that loses least on a database left out; HELD where fewer than two have both kinds."""
    both = [d for d in np.unique(databases) if len(np.unique(genuine[databases == d])) == 2]
    if len(both) < 2:
        return HELD

    def loss(strength: float) -> float:
        total = 0.0
        for database in both:
            out = databases == database
            weights, bias = _logistic(x[~out], genuine[~out], prior, strength)
            y, logit = genuine[out].astype(np.float64), x[out] @ weights + bias
            total += (_balanced(y) * (np.logaddexp(0, logit) - y * logit)).sum()
        return total

    return min(STRENGTHS, key=loss)
