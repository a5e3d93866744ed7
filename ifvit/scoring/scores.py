"""Scores of pairs, by either module, and the fusion of Module 2's into one calibrated score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ifvit.bar import bar
from ifvit.config import Settings
from ifvit.data.loader import fixed_batches
from ifvit.data.pairs import Pair
from ifvit.data.prepare import Prints
from ifvit.devices.sharding import fetch, make_mesh, put_whole_batch
from ifvit.models.networks import Network
from ifvit.pixels.alignment import aligned_pair
from ifvit.pixels.geometry import exact
from ifvit.pixels.registration import checked_registration
from ifvit.pixels.views import plain_views
from ifvit.scoring.rates import threshold_at_fmr


def dense_scores(net: Network, config: Settings) -> Callable:
    """Module 1: (params, batch_stats, batch) -> `ridges`, how well they agree, and `matches`, the inliers."""

    @exact
    def score(params, batch_stats, batch):
        found, by_matches = checked_registration(net, (params, batch_stats), batch, config)
        return {"ridges": found.agreement, "matches": by_matches.count}

    return score


def match_scores(net: Network, aligner: Network | None, config: Settings) -> Callable:
    """Module 2: (params, batch_stats, aligner_state, batch) -> cosines `global` and `local`, `agreement`, `matches`.

    `agreement` is the global branch's matching confidence of each overlap cell with itself, summed:
    in the common frame of a genuine pair a cell is its own match.
    """

    @exact
    def score(params, batch_stats, aligner_state, batch):
        pair, _, count = aligned_pair(aligner, aligner_state, plain_views(batch, config), config)
        e, _ = net.apply(params, batch_stats, pair, train=False)
        itself = jnp.exp(jnp.diagonal(e.log_conf, axis1=1, axis2=2)) * e.cells
        return {
            "global": (e.global0 * e.global1).sum(-1),
            "local": (e.local0 * e.local1).sum(-1),
            "agreement": itself.sum(-1),
            "matches": count,
        }

    return score


def score_pairs(
    score: Callable, state: tuple, prints: Prints, pairs: Sequence[Pair], batch_size: int, model_parallel: int = 1
) -> dict[str, np.ndarray]:
    """`score(*state, batch)` over all pairs, split over the devices: name -> (pairs, …) array, in order.

    A batch that does not divide among accelerators or processes is made as much larger.
    """
    if jax.process_count() > 1 or jax.default_backend() != "cpu":
        batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    mesh = make_mesh(batch_size, model_parallel)
    found: dict[str, np.ndarray] = {}
    done = 0
    with bar("scoring", len(pairs), "pair") as shown:
        for batch, count in fixed_batches(prints, pairs, batch_size):
            for k, v in fetch(score(*state, put_whole_batch(batch, mesh))).items():
                found.setdefault(k, np.empty((len(pairs), *v.shape[1:]), v.dtype))[done : done + count] = v[:count]
            done += count
            shown.update(count)
    return found


FEATURES = ("global", "local", "agreement", "matches")
AT_ONCE = 1 << 20  # pairs whose features are in memory together


@dataclass(frozen=True)
class Fusion:
    """Logistic fusion of a pair's scores, and the impostor scores that thresholds are taken from."""

    weights: tuple[float, ...]  # of FEATURES, after `features`
    bias: float
    impostor_scores: tuple[float, ...]  # fused, of the calibration pairs, descending

    def score(self, scores: dict[str, np.ndarray]) -> Float[np.ndarray, " N"]:
        """Probability that a pair is genuine, were genuine and impostor pairs equally many."""
        count = len(scores["matches"])
        fused = np.empty(count)
        for at in range(0, count, AT_ONCE):
            logits = features({k: v[at : at + AT_ONCE] for k, v in scores.items()}) @ np.asarray(self.weights)
            fused[at : at + AT_ONCE] = 1 / (1 + np.exp(-(logits + self.bias)))
        return fused

    def threshold(self, fmr: float) -> float:
        """The lowest score that at most a share `fmr` of the impostors reaches: `score >= threshold` is a match.

        Below one in the number of calibration pairs the tail of the log-odds is taken as
        exponential (fitted to its highest tenth): an estimate, no measurement.
        """
        scores = np.asarray(self.impostor_scores)
        rank = fmr * len(scores)
        if rank >= 1:
            return threshold_at_fmr(scores, fmr)
        odds = np.log(np.clip(scores, 1e-12, 1 - 1e-12) / (1 - np.clip(scores, 1e-12, 1 - 1e-12)))
        tail = odds[: max(2, len(odds) // 10)]
        spread = max(float((tail - tail[-1]).mean()), 1e-3)
        return float(1 / (1 + np.exp(-(tail[-1] + spread * np.log(len(tail) / max(rank, 1e-9))))))


def features(scores: dict[str, np.ndarray]) -> Float[np.ndarray, "N 4"]:
    """FEATURES as the fusion takes them: counts enter as logarithms."""
    return np.stack(
        [scores["global"], scores["local"], np.log1p(scores["agreement"]), np.log1p(scores["matches"])], axis=1
    ).astype(np.float64)


def fit_fusion(scores: dict[str, np.ndarray], genuine: np.ndarray, ridge: float = 0.1) -> Fusion:
    """Logistic regression with weights ≥ 0 (no score may count against a pair), both classes weighted alike."""
    from scipy.optimize import minimize

    x, y = features(scores), genuine.astype(np.float64)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / scale
    w = np.where(y > 0, 0.5 / max(y.sum(), 1), 0.5 / max((1 - y).sum(), 1))

    def loss(theta):
        logit = z @ theta[:-1] + theta[-1]
        p = 1 / (1 + np.exp(-logit))
        value = (w * (np.logaddexp(0, logit) - y * logit)).sum() + ridge / len(y) * (theta[:-1] ** 2).sum()
        grad = np.append(z.T @ (w * (p - y)) + 2 * ridge / len(y) * theta[:-1], (w * (p - y)).sum())
        return value, grad

    start = np.append(np.full(x.shape[1], 0.5), 0.0)
    theta = minimize(loss, start, jac=True, bounds=[(0, None)] * x.shape[1] + [(None, None)]).x
    weights = theta[:-1] / scale
    fusion = Fusion(tuple(map(float, weights)), float(theta[-1] - weights @ mean), ())
    impostors = np.sort(fusion.score({k: v[~genuine] for k, v in scores.items()}))[::-1]
    return Fusion(fusion.weights, fusion.bias, tuple(map(float, impostors)))
