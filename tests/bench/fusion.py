"""Whether a matcher's fused score tells fingers apart better than its parts, on databases that its fusion has not seen.

Pairs of each database are scored by a matcher: of `--roots`, which it was trained on, those of the held-out fingers; of
`--unseen` all. The fusion is fitted anew for each database, to all the others of `--roots`. Printed are EER and FMR100
of each part and of the fused score, a database a column; the difference between the fused score and each part, with its
95 % interval over fingers; and the false match rate that a threshold for `--fmr`, taken from the others, has on it.

    python tests/bench/fusion.py --checkpoint CKPT --roots DIR [DIR …] [--unseen DIR …]
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from agreement import drawn

from ifvit import cli
from ifvit.data.prepare import prepare
from ifvit.data.sources import read_roots
from ifvit.data.split import split_by_finger
from ifvit.devices.sharding import use_cpu_cores
from ifvit.paths import cache_dir
from ifvit.pixels.agreement import log_odds
from ifvit.scoring import intervals, rates
from ifvit.scoring.fusion import Fusion, fit_fusion
from ifvit.scoring.scorer import Scorer


@dataclass(frozen=True)
class Args:
    checkpoint: str
    roots: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    genuine: int = 400  # pairs of a database, at most
    impostor: int = 1000
    fmr: float = 0.001
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Database:
    scores: dict[str, np.ndarray]
    genuine: np.ndarray
    fingers: np.ndarray  # (pairs, 2), numbers
    known: bool  # the networks were trained on its other fingers


def score(scorer: Scorer, root: str, known: bool, args: Args) -> dict[str, Database]:
    prints = read_roots([root])
    if known:
        prints = split_by_finger(prints, scorer.config.held_out, scorer.config.data_seed)[1]
    prints = prepare(prints, scorer.config.canvas_size, scorer.config.max_broken, cache_dir(), apart=True)
    found = {}
    for name in sorted({p.database for p in prints.prints}):
        mine = prints.subset([p for p in prints.prints if p.database == name])
        pairs = drawn(mine.prints, args)
        numbers = {identity: n for n, identity in enumerate(dict.fromkeys(p.identity for p in mine.prints))}
        genuine = np.array([p.genuine for p in pairs])
        if genuine.any() and not genuine.all():
            scores = scorer.score(mine, pairs, args.batch_size)
            fingers = np.array([[numbers[mine.prints[i].identity] for i in pair[:2]] for pair in pairs])
            found[f"{Path(root).name}/{name}" if name != Path(root).name else name] = Database(
                scores, genuine, fingers, known
            )
    return found


def ridges(scores: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(log_odds(scores["ridges"], scores["overlap"]), np.float64)


def fused_without(databases: dict[str, Database], name: str) -> Fusion:
    """Fitted to all known databases but this one."""
    others = {n: d for n, d in databases.items() if d.known and n != name}
    keys = next(iter(others.values())).scores
    scores = {k: np.concatenate([d.scores[k] for d in others.values()]) for k in keys}
    names = np.concatenate([np.full(len(d.genuine), n) for n, d in others.items()])
    return fit_fusion(scores, np.concatenate([d.genuine for d in others.values()]), names)


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    scorer, databases = Scorer.from_checkpoint(args.checkpoint), {}
    for roots, known in ((args.roots, True), (args.unseen, False)):
        for root in roots:
            databases |= score(scorer, root, known, args)
    fusions = {name: fused_without(databases, name) for name in databases}
    parts = {
        name: {
            "fused": fusions[name].log_odds(d.scores),
            "Module 1": ridges(d.scores),
            "global": d.scores["global"].astype(np.float64),
            "local": d.scores["local"].astype(np.float64),
        }
        for name, d in databases.items()
    }
    unseen = [name for name, d in databases.items() if not d.known]
    groups = {"all": list(databases)} | ({"unseen": unseen} if unseen else {})
    print(f"{'EER / FMR100, %':18s}" + "".join(f"{n[-14:]:>15s}" for n in databases) + f"{'mean':>15s}")
    draws: dict[str, dict] = {}
    for part in ("fused", "Module 1", "global", "local"):
        rows, draws[part] = [], {}
        for name, d in databases.items():
            s, g = parts[name][part], d.genuine
            rows.append([100 * rates.equal_error_rate(s[g], s[~g]), 100 * rates.fnmr_at_fmr(s[g], s[~g], 0.01)])
            draws[part][name] = intervals.bootstrap(s[g], s[~g], d.fingers[g, 0], d.fingers[~g])
        print(f"{part:18s}" + "".join(f"{f'{e:.1f} / {m:.1f}':>15s}" for e, m in [*rows, np.mean(rows, 0)]))
    for group, names in groups.items():
        macro = {part: intervals.macro({n: of[n] for n in names}) for part, of in draws.items()}
        for part in ("Module 1", "global", "local"):
            for rate in ("eer", "fmr100"):
                less = macro["fused"][rate] - macro[part][rate]
                low, high = intervals.interval(100 * less)
                change = f"{100 * less.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
                print(f"{group}: {rate} of the fused score less that of {part}, percentage points: {change}")
    for name, d in databases.items():
        others = [n for n, o in databases.items() if o.known and n != name]
        told = []
        for part in ("fused", "Module 1"):
            s = parts[name][part]
            if part == "fused":
                at = fusions[name].threshold(args.fmr)
                at = np.log(at / (1 - at))
            else:
                impostors = np.concatenate([parts[n][part][~databases[n].genuine] for n in others])
                at = rates.threshold_at_fmr(impostors, args.fmr)
            told.append(f"{part} FMR {(s[~d.genuine] >= at).mean():.2%}, FNMR {(s[d.genuine] < at).mean():.2%}")
        weights = ", ".join(f"{f} {w:.2f}" for f, w in zip(fusions[name].features, fusions[name].weights))
        print(f"{name:20s} at --fmr {args.fmr}, {(~d.genuine).sum()} impostors: {'; '.join(told)}; {weights}")


if __name__ == "__main__":
    cli.use_huge_pages()
    main(tyro.cli(Args, use_underscores=True))
