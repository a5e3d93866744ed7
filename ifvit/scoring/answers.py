"""All that is told of a pair: how print 0 lies on print 1, and the scores."""

import jax
import jax.numpy as jnp

from ifvit.config import Settings
from ifvit.models.networks import Network
from ifvit.pixels.alignment import align
from ifvit.pixels.geometry import exact
from ifvit.pixels.registration import CheckedRegistration, registration, views_of
from ifvit.pixels.wide import looked_at, widened
from ifvit.scoring.scores import PairScore, dense_prepares, in_either_window, match_scores, prepares


def registrations(aligner: Network, config: Settings) -> PairScore:
    """What Module 1 tells, its state (aligner_state,), in px of the window.

    `similarity` (B, 4) whether it stands (`aligned`); up to K matches: `points0`, `points1` (B, K, 2), `confidence`,
    and whether they agree with it (`inliers`); `overlap`, the share of the smaller print's foreground that both show.
    """

    @exact
    def register(aligner_state, batch):
        views = views_of(batch, config)
        found = registration(aligner, aligner_state, views, config, batch)
        image0, mask0, image1, mask1 = views
        both = align(image0, image1, mask0, mask1, found.similarity, config).overlap
        stretch = (found.similarity[:, :2] ** 2).sum(1)  # of areas of print 0 in the frame of print 1
        smaller = jnp.maximum(jnp.minimum(stretch * mask0.sum((1, 2)), mask1.sum((1, 2))), 1)
        return {
            "similarity": found.similarity,
            "aligned": found.aligned,
            "points0": found.points0,
            "points1": found.points1,
            "confidence": found.matches.confidence,
            "inliers": found.inliers,
            "overlap": jnp.minimum(both.sum((1, 2)) / smaller, 1),
        }

    return PairScore(prepares(aligner, config), register)


def dense_answers(net: Network, config: Settings, wide_window: float = 1.0) -> PairScore:
    """Module 1 alone, its state (params, batch_stats): `score`, its `probability`, and what `registrations` tells.

    Those of the registration that the ridges have confirmed: `aligned` is `registered`, and the score how well they
    agree.
    """

    def how(wide):
        @exact
        def answer(params, batch_stats, batch):
            found, _ = looked_at(net, (params, batch_stats), batch, config, wide)
            return {"score": found.agreement, "probability": found.confidence} | _told(found, config)

        return PairScore(dense_prepares(net, wide or config), answer)

    return in_either_window(how, config, wide_window)


def answers(
    net: Network, aligner: Network | None, config: Settings, check: bool = False, wide_window: float = 1.0
) -> PairScore:
    """What `match_scores` and, with an aligner, `registrations` tell; its state is that of `match_scores`.

    With `check` the registration is the one that `dense_answers` tells.
    """
    scores = match_scores(net, aligner, config, check, wide_window)

    def of(scores: PairScore, wide: Settings | None) -> PairScore:
        @exact
        def answer(params, batch_stats, aligner_state, batch):
            if aligner and check:
                looked = looked_at(aligner, aligner_state, batch, config, wide)
                return scores.score(params, batch_stats, aligner_state, batch, looked) | _told(looked[0], config)
            found = scores.score(params, batch_stats, aligner_state, batch)
            return found | (registrations(aligner, config).score(aligner_state, batch) if aligner else {})

        return scores._replace(score=answer)

    found = of(scores, None)
    return found._replace(wide=of(scores.wide, widened(config, wide_window))) if scores.wide else found


def _told(found: CheckedRegistration, config: Settings) -> dict[str, jax.Array]:
    """Of as many matches as `config` keeps, those that agree before others."""
    sure = jnp.where(found.inliers, 2.0, 0.0) + found.matches.confidence
    keep = jax.lax.top_k(sure, min(config.alignment_matches, sure.shape[1]))[1]
    of = lambda x: jnp.take_along_axis(x, keep.reshape(*keep.shape, *(1,) * (x.ndim - 2)), 1)
    return {
        "similarity": found.similarity,
        "aligned": found.registered,
        "points0": of(found.points0),
        "points1": of(found.points1),
        "confidence": of(found.matches.confidence),
        "inliers": of(found.inliers),
        "overlap": found.overlap,
    }
