"""How well Module 1 registers: warps that are known, and pairs of impressions beside SIFT's.

    python tests/bench/registration.py --root DATA/FVC2002 [--checkpoint CKPT]    # the extra `bench` has OpenCV

Known warps: two views of every print, turned by up to ±60°, then ±180°, distorted and corrupted as in training at
strength 1. Told are the share of the cells found within one cell, the share of the pairs that are registered, and of
these the mean error after the fit, px at 500 ppi. Impressions: all genuine pairs; the ridges, normalised by their
surroundings, of print a laid on print b by Module 1 (similarity and deformation) and by SIFT, the ratio test and
RANSAC for a similarity (OpenCV); their normalised cross-correlation where both show ridges. Then how many of all
impostor pairs are called registered; and of a draw of them how many would be at any turn.
"""

import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.ndimage import gaussian_filter, map_coordinates

from ifvit import cli
from ifvit.constants import CANVAS_PPI, MASK_CELL, STRIDE
from ifvit.data.loader import fixed_batches
from ifvit.data.pairs import Pair
from ifvit.data.placement import Placement, mapped
from ifvit.data.prepare import prepare
from ifvit.data.protocols import Comparisons, Pairs, pairs_all
from ifvit.data.single import Canvases, OnCanvas
from ifvit.data.sources import read_roots
from ifvit.devices.sharding import use_cpu_cores
from ifvit.paths import cache_dir
from ifvit.pixels.agreement import REGISTERED, TURNED
from ifvit.pixels.geometry import cell_centres, exact, sample
from ifvit.pixels.registration import best_turn
from ifvit.pixels.views import dense_pair, dense_views, to_canvas, to_view
from ifvit.scoring.fit import Fit, fit
from ifvit.scoring.known_warps import warp_accuracy
from ifvit.scoring.scorer import Scorer

SEED = 0
LEAST = 0.1  # share of print b that both must show, for a correlation


@dataclass(frozen=True)
class Args:
    root: tuple[str, ...]
    checkpoint: str = "pretrained"
    batch_size: int = 8
    warps: int = 2  # pairs of views of each print
    parts: tuple[str, ...] = ("warps", "impressions", "impostors", "turned")
    impostor: int = 100  # pairs of each database that are tried at all turns


def known_warps(scorer: Scorer, prints, rotation: float, args: Args) -> str:
    net, state = scorer.registers
    config = scorer.config.replace(rotation=rotation, distortion=1.0, noise=1.0, thickness=1.0, partial=1.0)
    whole = config.replace(input_ppi=CANVAS_PPI, image_size=config.canvas_size)
    cell = STRIDE * CANVAS_PPI / config.input_ppi

    @jax.jit
    @exact
    def drawn(batch, keys):
        pair = dense_pair(keys, batch, config)
        log_conf, _ = net.apply(*state, pair.image0, pair.image1, pair.mask0, pair.mask1, train=False)
        accuracy = jax.vmap(lambda a, b: warp_accuracy(a[None], b[None]))(log_conf, pair.labels)
        known = (pair.labels >= 0).sum(1)
        views, image, inside = dense_views(keys, batch, whole)
        cells = inside.reshape(*inside.shape[:2], *(whole.canvas_size // MASK_CELL, MASK_CELL) * 2).mean((3, 5)) > 0.5
        return accuracy * known, known, views, jnp.clip(128 + 40 * image[..., 0], 0, 255).astype(jnp.uint8), cells

    @jax.jit
    @exact
    def truth(view0, view1, xy):
        return to_view(view0, to_canvas(view1, xy, whole.image_size), whole.image_size)

    centres = cell_centres(whole.image_size, MASK_CELL)
    correct, known, upright, registered, error, shares = [], [], [], [], [], []
    pairs = [Pair(i, i, True) for i in range(len(prints.prints)) for _ in range(args.warps)]
    for at, (batch, real) in enumerate(fixed_batches(prints, pairs, args.batch_size)):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(SEED), at * args.batch_size + np.arange(args.batch_size)
        )
        *counts, views, images, cells = jax.device_get(drawn(batch, keys))
        for n in range(real):
            a, b = (OnCanvas(f"view {k}", images[n, k], cells[n, k], Placement()) for k in (0, 1))
            straight, found = registered_pair(scorer, a, b)
            upright.append(straight)
            registered.append(found.registered)
            there = np.asarray(truth(*(jax.tree.map(lambda x, k=k: x[n, k], views) for k in (0, 1)), centres))
            seen = cells[n, 1].ravel() & (sample(jnp.asarray(cells[n, 0], jnp.float32), there / MASK_CELL, 0.0) > 0.5)
            if found.registered and seen.any():
                off = np.linalg.norm(found.back(centres) - there, axis=-1)[seen]
                error.append(off.mean())
                shares.append((off <= cell).mean())
            else:
                shares.append(0.0)
        correct.append(counts[0][:real])
        known.append(counts[1][:real])
    error = np.array(error)
    return (
        f"±{rotation:g}°: {len(pairs)} pairs, cells that the network finds within one cell "
        f"{np.concatenate(correct).sum() / np.concatenate(known).sum():.1%}; registered as they lie "
        f"{np.mean(upright):.1%}, once turned {np.mean(registered):.1%}; cells that the fit lays within one cell "
        f"{np.mean(shares):.1%} (nothing of a pair that is not registered); error of a fit mean {error.mean():.2f} px, "
        f"median {np.median(error):.2f}, 3 px or less {(error <= 3).mean():.1%}"
    )


def registered_pair(scorer: Scorer, a: OnCanvas, b: OnCanvas) -> tuple[bool, Fit]:
    """Whether it registers as it lies, and the fit of `ifvit.register`."""
    straight = bool(scorer.registration(Canvases([a, b]), Pair(0, 1, False)).registered)
    a, found = scorer.laid(a, b)
    return straight, fit(found, a.placement, b.placement, scorer.config)


class Ridges:
    """A print's ridges on its canvas, and what SIFT finds on it."""

    def __init__(self, canvas, mask):
        import cv2

        x = canvas.astype(np.float32)
        x -= gaussian_filter(x, 8)
        self.mask = mask.repeat(MASK_CELL, 0).repeat(MASK_CELL, 1)
        self.x = np.where(self.mask, x / (np.sqrt(gaussian_filter(x * x, 8)) + 5), 0)
        self.points, self.words = cv2.SIFT_create().detectAndCompute(canvas, self.mask.astype(np.uint8))

    def correlation(self, other: "Ridges", xy: np.ndarray) -> float:
        """With print b = `other`, where `xy` (C, C, 2) is where in a its pixels lie; 0 where too little is common."""
        at = [xy[..., 1], xy[..., 0]]
        both = (map_coordinates(self.mask.astype(np.float32), at, order=1) > 0.5) & other.mask
        if both.sum() < LEAST * other.mask.sum():
            return 0.0
        a, b = map_coordinates(self.x, at, order=1)[both], other.x[both]
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum() + 1e-9))


def by_sift(a: Ridges, b: Ridges) -> np.ndarray | None:
    """The similarity from a's canvas to b's, 3 × 3; None where there is none, or one that shrinks a to a point."""
    import cv2

    if a.words is None or b.words is None or min(len(a.points), len(b.points)) < 3:
        return None
    near = [
        m
        for m, *other in cv2.BFMatcher().knnMatch(a.words, b.words, k=2)
        if other and m.distance < 0.8 * other[0].distance
    ]
    if len(near) < 3:
        return None
    p, q = np.float32([a.points[m.queryIdx].pt for m in near]), np.float32([b.points[m.trainIdx].pt for m in near])
    cv2.setRNGSeed(SEED)
    found, _ = cv2.estimateAffinePartial2D(p, q, method=cv2.RANSAC, ransacReprojThreshold=5)
    return None if found is None or abs(np.linalg.det(found[:, :2])) < 1e-4 else np.vstack([found, [0, 0, 1]])


def impressions(scorer: Scorer, prints, pairs) -> str:
    registered = 0
    ridges = [Ridges(*prints.canvas(i)) for i in range(len(prints.prints))]
    y, x = np.mgrid[: scorer.config.canvas_size, : scorer.config.canvas_size]
    xy = np.stack([x, y], -1).reshape(-1, 2).astype(np.float64)
    ours, theirs = [], []
    for pair in pairs:
        a, b = (ridges[i] for i in pair[:2])
        found = fit(scorer.registration(prints, pair), Placement(), Placement(), scorer.config)
        registered += found.registered
        ours.append(a.correlation(b, found.back(xy).reshape(*x.shape, 2)))
        sift = by_sift(a, b)
        theirs.append(0.0 if sift is None else a.correlation(b, mapped(np.linalg.inv(sift), xy).reshape(*x.shape, 2)))
    ours, theirs = np.array(ours), np.array(theirs)
    mine, other = np.median(ours), np.median(theirs)
    return (
        f"{len(pairs)} genuine pairs, {registered / len(pairs):.1%} registered: correlation median {mine:.3f}, "
        f"SIFT's {other:.3f} ({mine / max(other, 1e-9):.2f} times); higher than SIFT's in {(ours > theirs).mean():.1%}"
    )


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    scorer = Scorer.from_checkpoint(args.checkpoint)
    prints = prepare(
        read_roots(args.root), scorer.config.canvas_size, scorer.config.max_broken, cache_dir(), apart=True
    )
    if "warps" in args.parts:
        for rotation in (60.0, 180.0):
            print(known_warps(scorer, prints, rotation, args), flush=True)
    databases = pairs_all(prints.prints)
    if "impressions" in args.parts:
        genuine = [Pair(int(i), int(j), True) for d in databases for i, j in d.genuine]
        print(impressions(scorer, prints, genuine), flush=True)
    if "impostors" in args.parts:
        pairs = Pairs(tuple(databases))
        impostors = [pairs[n] for d in databases for n in range(*pairs.of(d.database, False).indices(len(pairs)))]
        found = scorer.score(prints, impostors, args.batch_size)["score"]
        print(f"{len(impostors)} impostor pairs: {(found > REGISTERED).mean():.2%} called registered", flush=True)
    if "turned" in args.parts:
        print(turned(scorer, prints, databases, args), flush=True)


def turned(scorer: Scorer, prints, databases: list[Comparisons], args: Args) -> str:
    """How many impostors agree as they lie, and at the best of all turns, the upright one included."""
    net, state = scorer.registers
    pairs, rng = Pairs(tuple(databases)), np.random.default_rng(SEED)
    some = [
        rng.permutation(range(*pairs.of(d.database, False).indices(len(pairs))))[: args.impostor] for d in databases
    ]
    some = [pairs[int(n)] for n in np.concatenate(some)]
    best = jax.jit(exact(lambda state, batch: best_turn(net, state, batch, scorer.config)[1]))
    found = [np.asarray(best(state, b))[:real] for b, real in fixed_batches(prints, some, args.batch_size)]
    lain = scorer.score(prints, some, args.batch_size)["ridges"]
    shares = [f"{(x >= y).mean():.2%}" for y in (REGISTERED, TURNED) for x in (lain, np.concatenate(found))]
    return (
        f"{len(some)} impostor pairs: a score of {REGISTERED} is reached by {shares[0]} as they lie, at any turn by "
        f"{shares[1]}; one of {TURNED} by {shares[2]} and {shares[3]}"
    )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
