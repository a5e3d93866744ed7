"""Module 1 at work: from two views to matches, and the similarity that most of them agree on."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI, RIDGE, STRIDE
from ifvit.models.matching import Matches, mutual_matches
from ifvit.models.networks import Network
from ifvit.pixels.agreement import (
    CELL,
    at_ppi,
    check,
    checked_config,
    confidence,
    from_residuals,
    points_at_ppi,
    refitted,
    registered,
    same_ridges,
)
from ifvit.pixels.enhancement import along_ridges
from ifvit.pixels.geometry import (
    IDENTITY,
    RobustFit,
    cell_centres,
    grid_points,
    robust_modes,
    robust_similarity,
    sample,
)
from ifvit.pixels.views import Views, normalise, plain_prints, plain_views


class Registration(NamedTuple):
    """Module 1's answer on a pair: similarity from print 0 to print 1 in window px, and what supports it."""

    similarity: Float[Array, "B 4"]
    aligned: Bool[Array, " B"]  # at least `min_matches` inliers
    count: Int[Array, " B"]  # inliers
    matches: Matches
    inliers: Bool[Array, "B K"]
    points0: Float[Array, "B K 2"]  # window px of the matches in print 0, and in print 1
    points1: Float[Array, "B K 2"]


def register(log_conf: Float[Array, "B L L"], image_size: int, config: Settings) -> Registration:
    """Mutual matches of Module 1's confidences and the similarity that most of them agree on."""
    matches, p0, p1 = placed_matches(log_conf, image_size, config, config.match_threshold)
    fit: RobustFit = robust_similarity(p0, p1, matches.valid, config.alignment_samples, config.inlier_radius * STRIDE)
    aligned = fit.count >= config.min_matches
    similarity = jnp.where(aligned[:, None], fit.similarity, jnp.asarray(IDENTITY))
    return Registration(similarity, aligned, fit.count, matches, fit.inliers, p0, p1)


def placed_matches(
    log_conf: Float[Array, "B L L"], image_size: int, config: Settings, threshold: float | Float[Array, ""]
) -> tuple[Matches, Float[Array, "B K 2"], Float[Array, "B K 2"]]:
    """Mutual matches above a confidence, and where they lie in print 0 and in print 1, window px."""
    side = image_size // STRIDE
    matches = mutual_matches(log_conf, config.alignment_matches, threshold, config.match_border, (side, side))
    centres = jnp.asarray(cell_centres(image_size, STRIDE))
    return matches, centres[matches.cell0], centres[matches.cell1]


def prepared(
    aligner: Network | None,
    aligner_state: tuple,
    prints: dict,
    config: Settings,
    check: bool = False,
    degrees: float | Float[Array, ""] | None = None,
) -> dict[str, Array]:
    """What of prints is the same whatever they are compared with, N rows; `prints` has `canvas` and `mask`.

    They are seen turned by `degrees`, if any, from x towards y about the window's middle.

    `image` and `inside` are the windows (`views.plain_prints`), `features` Module 1's (`DenseRegistration.features`).
    With `check` there are `ridges` and `ridges_inside` at CHECK_PPI too.
    """
    image, inside = plain_prints(prints["canvas"], prints["mask"], config, degrees)
    normal = normalise(image, inside, config)
    found = {"image": image, "inside": inside}
    if aligner is not None:
        params, stats = aligner_state
        found["features"], _ = aligner.apply(params, stats, normal, train=False, method="features")
    if check:
        fine = checked_config(config)
        if (fine.input_ppi, fine.image_size) != (config.input_ppi, config.image_size):
            image, inside = plain_prints(prints["canvas"], prints["mask"], fine, degrees)
            normal = normalise(image, inside, fine)
        found["ridges"], found["ridges_inside"] = clear_ridges(normal, inside, fine), inside
    return found


def clear_ridges(
    normal: Float[Array, "B S S 1"], masks: Bool[Array, "B S S"], config: Settings
) -> Float[Array, "B S S"]:
    """What the check looks at: noise and gaps, which no two impressions share, are smoothed out along the ridges."""
    return along_ridges(normal[..., 0], masks, RIDGE * config.input_ppi / CANVAS_PPI)


def paired(one: dict[str, Array], other: dict[str, Array]) -> dict[str, Array]:
    """Rows of `prepared`, of the first and of the second prints of pairs, as one batch: names end in 0 and 1."""
    return {f"{k}{n}": v for n, rows in enumerate((one, other)) for k, v in rows.items()}


def views_of(batch: dict, config: Settings) -> Views:
    """Both windows of each pair, of a batch of `paired` or of canvases."""
    if "image0" not in batch:
        return plain_views(batch, config)
    return Views(*(batch[k] for k in ("image0", "inside0", "image1", "inside1")))


def registration(
    aligner: Network | None, aligner_state: tuple, views: Views, config: Settings, batch: dict | None = None
) -> Registration | None:
    """Module 1, frozen, on a batch of views; None (no aligner) where Module 2 runs unaligned.

    A batch of `paired` spares it the features of each print.
    """
    if aligner is None:
        return None
    return register(log_confidence(aligner, aligner_state, views, config, batch), config.image_size, config)


def log_confidence(
    aligner: Network, aligner_state: tuple, views: Views, config: Settings, batch: dict | None = None
) -> Float[Array, "B L L"]:
    """Of every cell of print 0 with every cell of print 1, by Module 1, frozen."""
    image0, mask0, image1, mask1 = views
    params, stats = jax.lax.stop_gradient(aligner_state)
    if batch and "features0" in batch:
        inputs, method = (batch["features0"], batch["features1"]), "match"
    else:
        inputs, method = (normalise(image0, mask0, config), normalise(image1, mask1, config)), "__call__"
    log_conf, _ = aligner.apply(params, stats, *inputs, mask0, mask1, train=False, method=method)
    return log_conf


def drawn_views(views: Views, config: Settings) -> dict[str, Array]:
    """Views as training draws them, as a batch of `paired` with what the check needs, enlarged to CHECK_PPI."""
    fine = checked_config(config)
    points = points_at_ppi(jnp.asarray(grid_points(fine.image_size)), fine, config)
    same = (fine.input_ppi, fine.image_size) == (config.input_ppi, config.image_size)

    def enlarged(images, fill):
        if same:
            return images
        found = jax.vmap(lambda x: sample(x.astype(jnp.float32), points, fill))(images)
        return found.reshape(-1, fine.image_size, fine.image_size)

    batch = {}
    for n, image, mask in ((0, *views[:2]), (1, *views[2:])):
        inside = enlarged(mask, 0.0) > 0.5
        ridges = clear_ridges(normalise(enlarged(image, 1.0), inside, fine), inside, fine)
        rows = {"image": image, "inside": mask, "ridges": ridges, "ridges_inside": inside}
        batch |= {f"{k}{n}": v for k, v in rows.items()}
    return batch


def bent_by_matches(
    similarities: Float[Array, "B K 4"],
    points0: Float[Array, "B N 2"],
    points1: Float[Array, "B N 2"],
    inliers: Bool[Array, "B K N"],
    valid: Bool[Array, "B N"],
    config: Settings,
) -> tuple[Float[Array, "B K W W 2"], Bool[Array, "B K N"]]:
    """`from_residuals` at CHECK_PPI, of K similarities a pair and its matches, which are in px of the window."""
    fine = checked_config(config)
    start = functools.partial(
        from_residuals, side=fine.image_size // CELL - 1, cell=STRIDE * fine.input_ppi / config.input_ppi
    )
    of_each = jax.vmap(jax.vmap(start, (0, None, None, 0, None)))
    p0, p1 = (points_at_ppi(p, config, fine) for p in (points0, points1))
    return of_each(at_ppi(similarities, config, fine), p0, p1, inliers, valid)


# Confidence above which a mutual match may tell of a candidate: the ridges judge, so that weak matches do no harm.
WEAK = 0.003
CANDIDATES = 3  # similarities that the matches allow, whose ridges are looked at
APART = 1.0  # ridges: candidates that lie nearer to one another are one


class CheckedRegistration(NamedTuple):
    """Module 1's answer once the ridges have been looked at: of the candidates the one whose ridges agree best."""

    similarity: Float[Array, "B 4"]  # from print 0 to print 1, window px; the identity where no candidate was found
    registered: Bool[Array, " B"]  # the ridges are the same ridges, as far as can be told
    confidence: Float[Array, " B"]  # 0 … 1, that they are (`agreement.confidence`)
    agreement: Float[Array, " B"]  # the score (`agreement.same_ridges`), 0 … 1; 0 without overlap
    correlation: Float[Array, " B"]  # of the ridges, a mean over the overlap, 0 … 1
    windows: Int[Array, " B"]  # that the overlap has
    overlap: Float[Array, " B"]  # share of the smaller print that the other covers
    deformation: Float[
        Array, "B W W 2"
    ]  # px at CHECK_PPI: print 0's content at q lies at similarity⁻¹(q + deformation)
    count: Int[Array, " B"]  # inliers of the candidate
    matches: Matches
    inliers: Bool[Array, "B K"]
    points0: Float[Array, "B K 2"]
    points1: Float[Array, "B K 2"]


def checked_registration(
    aligner: Network, aligner_state: tuple, batch: dict, config: Settings, refit: bool = True
) -> tuple[CheckedRegistration, Registration]:
    """Module 1 on pairs, checked by the ridges at CHECK_PPI; and the registration by matches alone.

    `batch` is one of canvases, or one of `paired` with what the check needs. With `refit` the similarity is the one
    nearest to where prints lie once bent, else that of the candidate.
    """
    log_conf = log_confidence(aligner, aligner_state, views_of(batch, config), config, batch)
    found = register(log_conf, config.image_size, config)
    matches, points0, points1 = placed_matches(log_conf, config.image_size, config, WEAK)
    modes = robust_modes(
        points0,
        points1,
        matches.valid,
        config.alignment_samples,
        config.inlier_radius * STRIDE,
        CANDIDATES,
        APART * RIDGE * config.input_ppi / CANVAS_PPI,
    )
    fine = checked_config(config)
    if "ridges0" in batch:
        ridges0, mask0, ridges1, mask1 = (batch[f"{k}{n}"] for n in (0, 1) for k in ("ridges", "ridges_inside"))
    else:
        image0, mask0, image1, mask1 = plain_views(batch, fine)
        ridges0, ridges1 = (clear_ridges(normalise(i, m, fine), m, fine) for i, m in ((image0, mask0), (image1, mask1)))
    similarities = at_ppi(modes.similarity, config, fine)
    starts, support = bent_by_matches(modes.similarity, points0, points1, modes.inliers, matches.valid, config)
    possible = modes.count >= config.min_matches
    agreed = jax.vmap(check)(ridges0, mask0, ridges1, mask1, similarities, possible, starts)
    of_chosen = jax.vmap(lambda x, k: x[k])
    count = of_chosen(modes.count, agreed.chosen)
    some = count >= config.min_matches
    similarity = jnp.where(some[:, None], of_chosen(modes.similarity, agreed.chosen), jnp.asarray(IDENTITY))
    field = agreed.field * some[:, None, None, None]
    if refit:
        similarity, field = jax.vmap(refitted)(at_ppi(similarity, config, fine), field, agreed.correlation)
        similarity = at_ppi(similarity, fine, config)
    near = of_chosen(support, agreed.chosen).sum(-1) * some
    score = same_ridges(agreed.score, near, agreed.windows, config.input_ppi)
    checked = CheckedRegistration(
        similarity,
        registered(score),
        confidence(score, agreed.overlap),
        score,
        agreed.score,
        agreed.windows,
        agreed.overlap,
        field,
        count,
        matches,
        of_chosen(modes.inliers, agreed.chosen),
        points0,
        points1,
    )
    return checked, found


# Degrees: from the nearest of them no pair is farther than 22.5, which Module 1 takes as it takes upright ones.
TURNS = tuple(range(0, 360, 45))


def best_turn(
    aligner: Network, aligner_state: tuple, batch: dict, config: Settings
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """By how many degrees print 0 has to be turned, from x towards y, to lie as print 1 does, and their agreement then.

    `batch` is one of canvases. Every pair is registered with print 0 at all TURNS; told is the one whose ridges agree
    best (`CheckedRegistration.agreement`).
    """
    prints = [{k: batch[f"{k}{n}"] for k in ("canvas", "mask")} for n in (0, 1)]
    other = prepared(aligner, aligner_state, prints[1], config, check=True)

    def at(degrees):
        one = prepared(aligner, aligner_state, prints[0], config, check=True, degrees=degrees)
        found, _ = checked_registration(aligner, aligner_state, paired(one, other), config, refit=False)
        a, b = found.similarity[:, 0], found.similarity[:, 1]
        return found.agreement, degrees + jnp.degrees(jnp.arctan2(b, a))

    agreement, degrees = jax.lax.map(at, jnp.array(TURNS, jnp.float32))
    best = agreement.argmax(0)[None]
    return tuple(jnp.take_along_axis(x, best, 0)[0] for x in (degrees, agreement))
