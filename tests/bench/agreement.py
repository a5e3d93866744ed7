"""Which score of a registration tells fingers apart on sensors it has not seen, its threshold and its confidence.

Genuine and impostor pairs of each database are registered by a Module 1 that was trained on none of them. Printed are
the EER and FMR100 of each score, a database a column; the share of either kind that `registered` passes; the LOGISTIC
of pixels/agreement.py: fitted to all databases, each of them and both kinds weighing the same; and of each database the
errors at a threshold that the others tell, and how well it is calibrated when fitted to the others.

    python tests/bench/agreement.py --checkpoint CKPT --roots DIR [DIR …]
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import tyro
from scipy.optimize import minimize

from ifvit import cli
from ifvit.data.pairs import Pair
from ifvit.data.prepare import PrintSet, prepare
from ifvit.data.sources import read_roots
from ifvit.devices.sharding import use_cpu_cores
from ifvit.paths import cache_dir
from ifvit.pixels.agreement import LEAST_FMR
from ifvit.pixels.geometry import apply_similarity, exact
from ifvit.pixels.wide import looked_at
from ifvit.scoring import rates
from ifvit.scoring.scorer import Scorer
from ifvit.scoring.scores import PairScore, dense_prepares, in_either_window, score_pairs


@dataclass(frozen=True)
class Args:
    checkpoint: str
    roots: tuple[str, ...]
    genuine: int = 120  # pairs of a database, at most
    impostor: int = 240
    batch_size: int = 8
    seed: int = 0


def features(scorer: Scorer) -> PairScore:
    config, net = scorer.config, scorer.registers[0]

    def how(wide):
        @exact
        def of(params, stats, batch):
            found, matched = looked_at(net, (params, stats), batch, config, wide)
            off = jnp.linalg.norm(apply_similarity(matched.similarity, matched.points0) - matched.points1, axis=-1)
            return {
                "matches": matched.count,
                "within 5 px": ((off < 5) & matched.inliers).sum(1),
                "agreement": found.agreement,
                "correlation": found.correlation,
                "overlap": found.overlap,
                "windows": found.windows,
                "registered": found.registered,
            }

        return PairScore(dense_prepares(net, wide or config), of)

    return in_either_window(how, config, scorer.wide_window).jitted()


def drawn(prints, args: Args) -> list[Pair]:
    """Pairs of impressions of one finger, and of different fingers."""
    rng = np.random.default_rng(args.seed)
    fingers: dict[tuple, list[int]] = {}
    for i, p in enumerate(prints):
        fingers.setdefault(p.identity, []).append(i)
    genuine = [(i, j) for some in fingers.values() for n, i in enumerate(some) for j in some[n + 1 :]]
    genuine = [genuine[k] for k in rng.permutation(len(genuine))[: args.genuine]]
    some = list(fingers.values())
    impostor = [rng.choice(len(some), 2, replace=False) for _ in range(args.impostor)]
    impostor = [(int(rng.choice(some[a])), int(rng.choice(some[b]))) for a, b in impostor]
    return [Pair(*p, True) for p in genuine] + [Pair(*p, False) for p in impostor]


def scored(scorer: Scorer, args) -> Iterator[tuple[str, str, PrintSet, list[Pair], dict[str, np.ndarray]]]:
    """Of each database its root, its name, its prints, the pairs that are drawn, and their `features`."""
    of = features(scorer)
    for root in args.roots:
        prints = prepare(
            read_roots([root]), scorer.config.canvas_size, scorer.config.max_broken, cache_dir(), apart=True
        )
        for name in sorted({p.database for p in prints.prints}):
            mine = prints.subset([p for p in prints.prints if p.database == name])
            pairs = drawn(mine.prints, args)
            yield root, name, mine, pairs, score_pairs(of, scorer.registers[1], mine, pairs, args.batch_size)


def scores(f: dict) -> dict[str, np.ndarray]:
    """What is compared: the higher, the more one finger."""
    return {
        "matches": f["matches"].astype(float),
        "within 5 px / √overlap": f["within 5 px"] / np.sqrt(np.maximum(f["windows"], 1)),
        "correlation": f["correlation"].astype(float),
        "correlation · log(1 + matches)": f["correlation"] * np.log1p(f["matches"]),
        "correlation + 0.05 log(1 + matches)": f["correlation"] + 0.05 * np.log1p(f["matches"]),
        "agreement": f["agreement"].astype(float),  # correlation · √(within 5 px / overlap)
    }


def inputs(f: dict) -> np.ndarray:
    return np.stack([np.log(f["agreement"] + 0.01), f["overlap"], np.ones(len(f["agreement"]))], -1)


def logistic(databases: list[dict]) -> np.ndarray:
    """(slope of the score's logarithm, of the overlap, bias), fitted with a little ridge."""
    x, y, w = [], [], []
    for f in databases:
        x.append(inputs(f))
        y.append(f["genuine"])
        w.append(np.where(f["genuine"], 0.5 / f["genuine"].sum(), 0.5 / (~f["genuine"]).sum()))
    x, y, w = np.concatenate(x), np.concatenate(y).astype(float), np.concatenate(w) / len(databases)

    def loss(theta):
        z = x @ theta
        return (w * (np.logaddexp(0, z) - y * z)).sum() + 1e-5 * (theta[:2] ** 2).sum()

    return minimize(loss, np.zeros(3)).x


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    databases = {}
    for _, name, _, pairs, found in scored(Scorer.from_checkpoint(args.checkpoint), args):
        databases[name] = found | {"genuine": np.array([p.genuine for p in pairs])}
    report(databases)


def report(databases: dict[str, dict]) -> None:
    print(f"{'EER / FMR100, %':36s}" + "".join(f"{d[:14]:>15s}" for d in databases) + f"{'mean':>15s} {'spread':>6s}")
    table = {d: scores(f) for d, f in databases.items()}
    for score in next(iter(table.values())):
        found = []
        for d, f in databases.items():
            s, g = table[d][score], f["genuine"]
            found.append([100 * rates.equal_error_rate(s[g], s[~g]), 100 * rates.fnmr_at_fmr(s[g], s[~g], 0.01)])
        cells = [f"{e:.1f} / {m:.1f}" for e, m in [*found, np.mean(found, 0)]]
        print(f"{score:36s}" + "".join(f"{c:>15s}" for c in cells) + f" {np.std([e for e, _ in found]):6.1f}")
    for kind in (True, False):
        shares = [f["registered"][f["genuine"] == kind].mean() for f in databases.values()]
        print(f"{'registered, ' + ('genuine' if kind else 'impostor'):36s}" + "".join(f"{s:15.2%}" for s in shares))
    impostors = np.concatenate([f["agreement"][~f["genuine"]] for f in databases.values()])
    print(
        "REGISTERED that passes 1, 0.3 and 0.1 % of impostors:", np.quantile(impostors, [0.99, 0.997, 0.999]).round(3)
    )
    print("LOGISTIC =", tuple(round(float(v), 2) for v in logistic(list(databases.values()))))
    if len(databases) < 2:
        return
    told = []
    for left_out, f in databases.items():
        others = [g["agreement"][~g["genuine"]] for d, g in databases.items() if d != left_out]
        at, g = rates.threshold_at_fmr(np.concatenate(others), LEAST_FMR), f["genuine"]
        told.append([(f["agreement"][~g] >= at).mean(), (f["agreement"][g] < at).mean()])
    print(f"at the threshold that lets {LEAST_FMR:.1%} of the others' impostors pass:")
    for kind, shares in zip(("false matches", "false non-matches"), zip(*told)):
        print(f"{kind:36s}" + "".join(f"{s:15.2%}" for s in (*shares, np.mean(shares))))
    said, right, weight = [], [], []
    for left_out, f in databases.items():
        theta = logistic([g for d, g in databases.items() if d != left_out])
        said.append(1 / (1 + np.exp(-inputs(f) @ theta)))
        right.append(f["genuine"])
        weight.append(np.where(f["genuine"], 0.5 / f["genuine"].sum(), 0.5 / (~f["genuine"]).sum()))
    said, right, weight = map(np.concatenate, (said, right, weight))
    for low, high in ((0, 0.1), (0.1, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.001)):
        inside = (said >= low) & (said < high)
        if inside.any():
            share = np.average(right[inside], weights=weight[inside])
            print(f"confidence {low:.2f} … {min(high, 1):.2f}: {inside.sum():5d} pairs, {share:.1%} are of one finger")


if __name__ == "__main__":
    cli.use_huge_pages()
    main(tyro.cli(Args, use_underscores=True))
