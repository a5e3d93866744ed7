"""How well Module 1 registers: warps that are known, and pairs of impressions beside SIFT's.

    python tests/bench/registration.py --root DATA/FVC2002 [--checkpoint CKPT]    # the extra `bench` has OpenCV

Known warps: two views of every print, turned by up to ±60°, then ±180°, distorted and corrupted as in training at
strength 1. Told are the share of the cells found within one cell, the share of the pairs that are registered, and of
these the mean error after the fit, px at 500 ppi. Impressions: all genuine pairs; the ridges, normalised by their
surroundings, of print a laid on print b by Module 1 (similarity and deformation) and by SIFT, the ratio test and
RANSAC for a similarity (OpenCV); their normalised cross-correlation where both show ridges. Then how many of all
impostor pairs are called registered.
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
from ifvit.data.placement import mapped, similarity_map, window_to_canvas
from ifvit.data.prepare import prepare
from ifvit.data.protocols import Pairs, pairs_all
from ifvit.data.sources import read_roots
from ifvit.devices.sharding import use_cpu_cores
from ifvit.models.cells import cell_mask
from ifvit.paths import cache_dir
from ifvit.pixels.agreement import CELL, checked_config
from ifvit.pixels.geometry import apply_similarity, cell_centres, exact, invert_similarity, sample
from ifvit.pixels.registration import checked_registration, log_confidence, views_of
from ifvit.pixels.views import dense_pair, dense_views, to_canvas, to_view
from ifvit.scoring.fit import bent_back
from ifvit.scoring.known_warps import warp_accuracy
from ifvit.scoring.scorer import Scorer
from ifvit.scoring.scores import PairScore, dense_scores, score_pairs

SEED = 0
LEAST = 0.1  # share of print b that both must show, for a correlation


@dataclass(frozen=True)
class Args:
    root: str
    checkpoint: str = "pretrained"
    batch_size: int = 8
    warps: int = 2  # pairs of views of each print
    parts: tuple[str, ...] = ("warps", "impressions", "impostors")


def known_warps(scorer: Scorer, prints, rotation: float, args: Args) -> str:
    net, state = scorer.registers
    config = scorer.config.replace(rotation=rotation, distortion=1.0, noise=1.0, thickness=1.0, partial=1.0)
    size = config.image_size
    if checked_config(config).image_size != size:
        raise SystemExit("A network whose window is not that of the ridges' check: give one of preset cpu.")
    centres = jnp.asarray(cell_centres(size, STRIDE))

    @jax.jit
    @exact
    def of(batch, keys):
        pair = dense_pair(keys, batch, config)
        views, image, inside = dense_views(keys, batch, config)
        rows = {}
        for n in (0, 1):
            features, _ = net.apply(*state, image[:, n], train=False, method="features")
            rows |= {f"image{n}": image[:, n, ..., 0], f"inside{n}": inside[:, n], f"features{n}": features}
            rows |= {f"ridges{n}": image[:, n, ..., 0], f"ridges_inside{n}": inside[:, n]}
        log_conf = log_confidence(net, state, views_of(rows, config), config, rows)
        found, _ = checked_registration(net, state, rows, config)

        def errors(views, similarity, field, inside):
            """Of each cell of view 1 that shows what view 0 does: how far from there the fit lays it, in view 0."""
            view0, view1 = (jax.tree.map(lambda a, n=n: a[n], views) for n in (0, 1))
            there = to_view(view0, to_canvas(view1, centres, size), size)
            seen = sample(inside[0].astype(jnp.float32), there, 0.0) > 0.5
            bend = jnp.stack([sample(field[..., k], (centres + 0.5) / CELL - 1, 0.0) for k in (0, 1)], -1)
            laid = apply_similarity(invert_similarity(similarity), centres + bend)
            return jnp.linalg.norm(laid - there, axis=-1), seen & cell_mask(inside[1:])[0]

        off, counts = jax.vmap(errors)(views, found.similarity, found.deformation, inside)
        accuracy = jax.vmap(lambda a, b: warp_accuracy(a[None], b[None]))(log_conf, pair.labels)
        known = (pair.labels >= 0).sum(1)
        mean = (off * counts).sum(1) / jnp.maximum(counts.sum(1), 1) * (CANVAS_PPI / config.input_ppi)
        return accuracy * known, known, found.registered, mean

    pairs = [Pair(i, i, True) for i in range(len(prints.prints)) for _ in range(args.warps)]
    found = []
    for at, (batch, real) in enumerate(fixed_batches(prints, pairs, args.batch_size)):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(SEED), at * args.batch_size + np.arange(args.batch_size)
        )
        found.append([np.asarray(x)[:real] for x in of(batch, keys)])
    correct, known, registered, error = (np.concatenate(x) for x in zip(*found))
    some = error[registered]
    return (
        f"±{rotation:g}°: {len(pairs)} pairs, cells within one cell {correct.sum() / known.sum():.1%}, registered "
        f"{registered.mean():.1%}, of these error mean {some.mean():.2f} px, median {np.median(some):.2f}, "
        f"3 px or less {(some <= 3).mean():.1%}"
    )


def registers(scorer: Scorer) -> PairScore:
    net, config = scorer.registers[0], scorer.config

    @exact
    def of(params, stats, batch):
        found, _ = checked_registration(net, (params, stats), batch, config)
        return {"similarity": found.similarity, "deformation": found.deformation, "registered": found.registered}

    return PairScore(dense_scores(net, config).prepare, of).jitted()


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
    """The similarity from a's canvas to b's, 3 × 3."""
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
    return None if found is None else np.vstack([found, [0, 0, 1]])


def impressions(scorer: Scorer, prints, pairs, args: Args) -> str:
    found = score_pairs(registers(scorer), scorer.registers[1], prints, pairs, args.batch_size)
    ridges = [Ridges(*prints.canvas(i)) for i in range(len(prints.prints))]
    window, check = window_to_canvas(scorer.config), window_to_canvas(checked_config(scorer.config))
    y, x = np.mgrid[: scorer.config.canvas_size, : scorer.config.canvas_size]
    xy = np.stack([x, y], -1).reshape(-1, 2).astype(np.float64)
    ours, theirs = [], []
    for n, (i, j, _) in enumerate(pairs):
        a, b = ridges[i], ridges[j]
        through = window @ similarity_map(found["similarity"][n]) @ np.linalg.inv(window)
        laid = bent_back(xy, through, found["deformation"][n], np.linalg.inv(check))
        ours.append(a.correlation(b, laid.reshape(*x.shape, 2)))
        sift = by_sift(a, b)
        theirs.append(0.0 if sift is None else a.correlation(b, mapped(np.linalg.inv(sift), xy).reshape(*x.shape, 2)))
    ours, theirs = np.array(ours), np.array(theirs)
    mine, other = np.median(ours), np.median(theirs)
    return (
        f"{len(pairs)} genuine pairs, {found['registered'].mean():.1%} registered: correlation median {mine:.3f}, "
        f"SIFT's {other:.3f} ({mine / max(other, 1e-9):.2f} times); higher than SIFT's in {(ours > theirs).mean():.1%}"
    )


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    scorer = Scorer.from_checkpoint(args.checkpoint)
    prints = prepare(
        read_roots([args.root]), scorer.config.canvas_size, scorer.config.max_broken, cache_dir(), apart=True
    )
    if "warps" in args.parts:
        for rotation in (60.0, 180.0):
            print(known_warps(scorer, prints, rotation, args), flush=True)
    databases = pairs_all(prints.prints)
    if "impressions" in args.parts:
        genuine = [Pair(int(i), int(j), True) for d in databases for i, j in d.genuine]
        print(impressions(scorer, prints, genuine, args), flush=True)
    if "impostors" in args.parts:
        pairs = Pairs(tuple(databases))
        impostors = [pairs[n] for d in databases for n in range(*pairs.of(d.database, False).indices(len(pairs)))]
        found = score_pairs(registers(scorer), scorer.registers[1], prints, impostors, args.batch_size)["registered"]
        print(f"{len(impostors)} impostor pairs: {found.mean():.2%} called registered", flush=True)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
