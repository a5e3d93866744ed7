"""Do the ridges of two prints agree, once one is laid on the other?

Each similarity that the matches allow is bent as far as they tell, and local normalised cross-correlation over the
overlap chooses among them. Block matching (each window's best shift, smoothed over its neighbours) then lets the skin
stretch further. All of it is done at CHECK_PPI, where windows, shifts and smoothing are fixed shares of a ridge,
whatever the networks see.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from ifvit.config import Settings
from ifvit.constants import CANVAS_PPI
from ifvit.pixels.geometry import apply_similarity, blur, exact, fit_similarity, grid_points, invert_similarity, sample

CHECK_PPI = 350.0  # here a ridge is 6.3 px wide: enough to see a shift of a sixth of it
CELL = 8  # px: a window is two cells a side, 2.5 ridges, and there is one at every corner that four cells share
REACH = 2  # px a window is moved by at most in one round: more than half a ridge would find the next one
ROUNDS = 6
GAIN = 0.01  # of the score: what betters it by less is no deformation
STIFF = 2.0  # cells: the Gaussian that a deformation is smoothed with
SEEN = 0.5  # share of a window that both prints cover, for the window to count
FEW = 20.0  # windows: an overlap of so many can reach half of the full score
GROWN = 3  # times matches near to what their neighbours say are taken for inliers too
TAKEN = 1.25  # cells of the network: as near as this
NEAR = 0.5  # cells: matches that lie as near to the bent similarity support it
REGISTERED = 0.129  # score; tests/bench/agreement.py tells who passes
TURNED = 0.165  # score at any of eight turns that is believed: one impostor pair in a thousand reaches it as it lies
FAINT = 0.01  # a score of so much, and one of 0, are told apart by a factor of two
LOGISTIC = (6.46, 0.06, 12.32)  # of log(score + 0.01), of the overlap, and the bias, fitted there

# (false match rate, score that so many impostors reach): of the packaged weights, on sensors that they have not seen
LEAST_FMR = 0.001  # seven of the impostor pairs that REACHED was measured on
REACHED = ((0.01, 0.129), (0.003, 0.148), (0.001, 0.165))


def same_ridges(
    correlated: Float[Array, " B"], near: Int[Array, " B"], windows: Int[Array, " B"], ppi: float
) -> Float[Array, " B"]:
    """The score that ridges are the same: Agreement.score · √(near matches an area). 0 … 1, 0 without overlap.

    Either factor alone errs where the other does not: on deformed skin, and where a flow of ridges is alike. Neither
    grows with the area. `near` matches of a network at `ppi` are counted for the area that a cell has at CHECK_PPI.
    """
    density = near * (CHECK_PPI / ppi) ** 2 / (windows + FEW)
    return correlated * jnp.sqrt(jnp.minimum(density, 1.0))


def registered(score: Float[Array, " B"]) -> Bool[Array, " B"]:
    """Whether the ridges are taken for the same: hardly one in a hundred pairs of different fingers passes."""
    return score > REGISTERED


def threshold(fmr: float) -> float:
    """The score that a share `fmr` of the impostors reaches: linear in log fmr between and beyond the rates of REACHED.

    Below the last rate it is an estimate, no measurement. Another Module 1 than the packaged one differs a little.
    """
    logs, scores = np.log([rate for rate, _ in REACHED]), np.array([score for _, score in REACHED])
    n = int(np.clip(np.searchsorted(-logs, -np.log(fmr)), 1, len(logs) - 1))
    slope = (scores[n] - scores[n - 1]) / (logs[n] - logs[n - 1])
    return float(np.clip(scores[n] + slope * (np.log(fmr) - logs[n]), 0.0, 1.0))


def confidence(score: Float[Array, " B"], overlap: Float[Array, " B"]) -> Float[Array, " B"]:
    """Probability that they are, with as many genuine pairs: σ(s log(score + 0.01) + o overlap + bias)."""
    return jax.nn.sigmoid(log_odds(score, overlap))


def log_odds(
    score: Float[Array | np.ndarray, " B"], overlap: Float[Array | np.ndarray, " B"]
) -> Float[Array | np.ndarray, " B"]:
    """The natural logarithm of the odds that `confidence` gives."""
    slope, of_overlap, bias = LOGISTIC
    log = np.log if isinstance(score, np.ndarray) else jnp.log
    return slope * log(score + FAINT) + of_overlap * overlap + bias


def parts(score: float, overlap: float) -> dict[str, float]:
    """What the score (with the bias) and the overlap add to `log_odds`."""
    slope, of_overlap, bias = LOGISTIC
    return {"log_clear": slope * float(np.log(score + FAINT)) + bias, "overlap": of_overlap * overlap}


class Agreement(NamedTuple):
    """How well print 0, laid on print 1, agrees with it; W windows a side, lengths in px at CHECK_PPI."""

    score: Float[Array, " B"]  # Σ max(correlation, 0) / (windows + FEW): 0 … 1, 0 without overlap
    windows: Int[Array, " B"]  # of the overlap
    overlap: Float[Array, " B"]  # share of the smaller print that the other covers
    chosen: Int[Array, " B"]  # which of the candidates
    field: Float[Array, "B W W 2"]  # print 0's content at q lies at similarity⁻¹(q + field(q))
    correlation: Float[Array, "B W W"]  # of each window, 0 where it is not in the overlap
    before: Float[Array, " B"]  # the score before block matching


def checked_config(config: Settings) -> Settings:
    """The window of `config` at CHECK_PPI, no larger than the canvas."""
    seen = min(config.image_size / config.input_ppi, config.canvas_size / CANVAS_PPI)  # inches
    side = min(math.ceil(seen * CHECK_PPI / CELL) * CELL, 2048)  # of more a window may not be
    return config.replace(input_ppi=CHECK_PPI, image_size=side)


def seen_of(deformation: Float[Array | np.ndarray, "*B W W 2"], config: Settings) -> Settings:
    """The window at CHECK_PPI that a deformation was found in: that of `config`, or a wider one (`pixels.wide`)."""
    return checked_config(config).replace(image_size=CELL * (deformation.shape[-2] + 1))


def points_at_ppi(p: Float[Array, "*B 2"], a: Settings, b: Settings) -> Float[Array, "*B 2"]:
    """Points of the window of configuration a, in that of b: both are centred on the same spot of the canvas."""
    return (p - (a.image_size - 1) / 2) * (b.input_ppi / a.input_ppi) + (b.image_size - 1) / 2


def at_ppi(similarity: Float[Array, "*B 4"], a: Settings, b: Settings) -> Float[Array, "*B 4"]:
    """A similarity between windows of configuration a, for those of b."""
    middle_a, middle_b = (jnp.full((*similarity.shape[:-1], 1, 2), (c.image_size - 1) / 2) for c in (a, b))
    there = points_at_ppi(apply_similarity(similarity, middle_a), a, b)
    turn = similarity.at[..., 2:].set(0.0)
    return turn.at[..., 2:].set((there - apply_similarity(turn, middle_b))[..., 0, :])


def window_sums(x: Float[Array, "*B S S"]) -> Float[Array, "*B W W"]:
    """Sums over windows of 2 × 2 cells, at every corner that four cells share: W = S/CELL − 1."""
    *b, h, w = x.shape
    rows = x.reshape(*b, h // CELL, CELL, w).sum(-2)
    cells = rows.reshape(*b, h // CELL, w // CELL, CELL).sum(-1)
    pairs = cells[..., :-1, :] + cells[..., 1:, :]
    return pairs[..., :-1] + pairs[..., 1:]


def correlation(
    a: Float[Array, "*B S S"], b: Float[Array, "*B S S"], both: Float[Array, "*B S S"]
) -> Float[Array, "*B W W"]:
    """Normalised cross-correlation of each window, over the pixels of `both` (0 or 1): cov / √(var var) (Lewis 1995).

    The variances have a floor of 0.02 (of normalised prints: 1), so that blank skin agrees with nothing.
    """
    n = jnp.maximum(window_sums(both), 1.0)
    a, b = a * both, b * both
    sa, sb, saa, sbb, sab = map(window_sums, (a, b, a * a, b * b, a * b))
    va, vb = (jnp.maximum(s2 - s * s / n, 0.0) + 0.02 * n for s, s2 in ((sa, saa), (sb, sbb)))
    return (sab - sa * sb / n) / jnp.sqrt(va * vb)


def best_shifts(
    a: Float[Array, "S S"], b: Float[Array, "S S"], both: Float[Array, "S S"]
) -> tuple[Float[Array, "W W"], Float[Array, "W W 2"]]:
    """Block matching: each window's highest correlation with a moved by up to REACH px, and its shift (x, y).

    The shift is the mean of all under softmax(10 · correlation): finer than a pixel, and none where none is better.
    """
    side = 2 * REACH + 1
    size = a.shape[0]
    a, b = a * both, b * both
    n = window_sums(both)
    scale = jax.lax.rsqrt((window_sums(a * a) + 0.02 * n + 1e-3) * (window_sums(b * b) + 0.02 * n + 1e-3))
    wide = jnp.pad(a, REACH)

    def one(i, carry):
        top, total, moved = carry
        y, x = jnp.divmod(i, side)
        c = window_sums(jax.lax.dynamic_slice(wide, (y, x), (size, size)) * b) * scale
        w = jnp.exp(10.0 * c)  # correlations are at most about 1: no overflow
        return jnp.maximum(top, c), total + w, moved + w[..., None] * (jnp.stack([x, y]) - REACH)

    zeros = jnp.zeros_like(n)
    start = (zeros - 1.0, zeros, jnp.stack([zeros, zeros], -1))
    top, total, moved = jax.lax.fori_loop(0, side**2, one, start)
    return top, moved / total[..., None]


@exact
def dense_field(field: Float[Array, "W W 2"], along: Num[np.ndarray, " S"]) -> Float[Array, "S S 2"]:
    """A field on windows' centres, at all points whose x and y are among `along`, px: bilinear, constant beyond."""
    n = field.shape[0]
    u = np.clip((along + 0.5) / CELL - 1.0, 0, n - 1)
    weights = jnp.asarray(np.maximum(0, 1 - np.abs(u[:, None] - np.arange(n))), jnp.float32)
    return jnp.einsum("yi,ijc,xj->yxc", weights, field, weights, optimize=True)


def bend(deformation: Float[Array, "B W W 2"], config: Settings) -> Float[Array, "B S S 2"]:
    """How far a registration's deformation moves every pixel of the window of `config`, in px of that window."""
    times, seen = CHECK_PPI / config.input_ppi, seen_of(deformation, config).image_size
    along = (np.arange(config.image_size) - (config.image_size - 1) / 2) * times + (seen - 1) / 2
    return jax.vmap(lambda field: dense_field(field, along))(deformation) / times


def smoothed(field: Float[Array, "W W 2"], weight: Float[Array, "W W"]) -> Float[Array, "W W 2"]:
    """The weighted Gaussian mean over neighbours; it fades to 0 far from all that has weight."""
    total = blur(weight, STIFF) + 1e-3
    return jnp.moveaxis(blur(jnp.moveaxis(field * weight[..., None], -1, 0), STIFF) / total, 0, -1)


@exact
def from_residuals(
    similarity: Float[Array, "4"],
    p: Float[Array, "N 2"],
    q: Float[Array, "N 2"],
    inliers: Bool[Array, " N"],
    valid: Bool[Array, " N"],
    side: int,
    cell: float,
) -> tuple[Float[Array, "side side 2"], Bool[Array, " N"]]:
    """The smooth deformation that matches p → q leave to their similarity, and which of them support it.

    A Gaussian mean of residuals about each window's centre (Nadaraya–Watson), as if two more matches had none. The
    similarity's inliers begin it. Where skin is bent by more than they allow, `valid` matches that lie near to what it
    says there are taken in, and it says more. A cell of the network is `cell` px wide.
    """
    residual = apply_similarity(similarity, p) - q
    values = jnp.append(residual, jnp.ones_like(residual[:, :1]), 1)

    def kernel(difference):
        return jnp.exp(-0.5 * (difference / (1.5 * STIFF * CELL)) ** 2)

    def mean(total):
        return total[..., :2] / (total[..., 2:] + 2.0)

    near = kernel(jnp.linalg.norm(q[:, None] - q[None], axis=-1))

    def off(taken):
        return jnp.linalg.norm(residual - mean(near @ (values * taken[:, None])), axis=-1)

    for _ in range(GROWN):
        inliers = valid & (off(inliers) < TAKEN * cell)
    x, y = (kernel(np.arange(1, side + 1)[:, None] * CELL - 0.5 - q[:, axis]) for axis in (0, 1))
    field = mean(jnp.einsum("yn,xn,nk->yxk", y, x, values * inliers[:, None], optimize=True))
    return field, inliers & (off(inliers) < NEAR * cell)


@exact
def refitted(
    similarity: Float[Array, "4"], field: Float[Array, "W W 2"], correlation: Float[Array, "W W"]
) -> tuple[Float[Array, "4"], Float[Array, "W W 2"]]:
    """The similarity that is nearest to where both lay print 0, and what the deformation is then: no print moves.

    Windows weigh as their ridges correlate. Where fewer than three do, both stay as they are.
    """
    centres = jnp.asarray(grid_points(field.shape[0])) * CELL + CELL - 0.5
    lies = apply_similarity(invert_similarity(similarity), centres + field.reshape(-1, 2))
    weights = jnp.maximum(correlation.reshape(-1), 0.0)
    fitted = jnp.where((weights > 0).sum() >= 3, fit_similarity(lies, centres, weights), similarity)
    return fitted, (apply_similarity(fitted, lies) - centres).reshape(field.shape)


def warp(
    image: Float[Array, "S S"], mask: Bool[Array, "S S"], similarity: Float[Array, "4"], field: Float[Array, "W W 2"]
) -> tuple[Float[Array, "S S"], Float[Array, "S S"]]:
    """Print 0 and its foreground (0 or 1, in blocks of half a cell) in the frame of print 1."""
    size, block = image.shape[0], CELL // 2
    xy = jnp.asarray(grid_points(size)) + dense_field(field, np.arange(size)).reshape(-1, 2)
    xy = apply_similarity(invert_similarity(similarity), xy)
    coarse = xy.reshape(size, size, 2)[block // 2 :: block, block // 2 :: block].reshape(-1, 2)
    covered = (sample(mask.astype(jnp.float32), coarse, 0.0) > 0.5).astype(jnp.float32)
    covered = covered.reshape(size // block, size // block).repeat(block, 0).repeat(block, 1)
    return sample(image, xy, 0.0).reshape(size, size), covered


def mean_agreement(correlation: Float[Array, "*B W W"], counts: Bool[Array, "*B W W"]) -> Float[Array, "*B"]:
    """Σ max(correlation, 0) / (windows + FEW) over the windows that count."""
    total = jnp.where(counts, jnp.maximum(correlation, 0.0), 0.0).sum((-2, -1))
    return total / (counts.sum((-2, -1)) + FEW)


def check(
    image0: Float[Array, "S S"],
    mask0: Bool[Array, "S S"],
    image1: Float[Array, "S S"],
    mask1: Bool[Array, "S S"],
    similarities: Float[Array, "K 4"],
    possible: Bool[Array, " K"],
    starts: Float[Array, "K W W 2"],
) -> Agreement:
    """One pair of locally normalised prints: the candidate whose ridges agree best, and how they agree once deformed.

    A candidate starts with a deformation (`from_residuals`, or 0). Of what block matching adds, round by round, the
    best is kept, where the ridges agree better for it. Only the `possible` candidates are looked at; where none is,
    nothing overlaps.
    """
    m1 = mask1.astype(jnp.float32) * possible.any()

    def laid(similarity, field):
        warped, covered = warp(image0, mask0, similarity, field)
        both = covered * m1
        windows = correlation(warped, image1, both)
        use = window_sums(both) / (2 * CELL) ** 2 > SEEN
        return mean_agreement(windows, use), (field, windows, use, both.sum()), (warped, both)

    def taken(better, new, old):
        return jax.tree.map(lambda n, o: jnp.where(better, n, o), new, old)

    # loops in Python: as turns of `scan` and rows of `vmap` all of this took twice as long on a CPU
    scores = jnp.stack([laid(*each)[0] for each in zip(similarities, starts)])
    k = jnp.where(possible, scores, -1.0).argmax()
    similarity = similarities[k]
    before, start, (warped, both) = laid(similarity, starts[k])
    after, best, found = before, start, start
    for _ in range(ROUNDS):
        field, _, use, _ = found
        top, shift = best_shifts(warped, image1, both)
        field = smoothed(field + shift, jnp.clip(top, 0.0, 1.0) ** 2 * use + 1e-4)
        score, found, (warped, both) = laid(similarity, field)
        best, after = taken(score > after, (found, score), (best, after))
    better = after > before + GAIN
    field, windows, use, common = taken(better, best, start)
    smaller = jnp.minimum(mask0.sum() * (similarity[0] ** 2 + similarity[1] ** 2), mask1.sum())
    return Agreement(
        jnp.where(better, after, before),
        use.sum(),
        common / jnp.maximum(smaller, 1.0),
        k,
        field,
        jnp.where(use, windows, 0.0),
        before,
    )
