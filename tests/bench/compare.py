"""Which of several trained Modules 1 registers prints of other sensors better, the same pairs for each.

Printed are the EER of each database, and macro EER and FMR100 with their differences from the first checkpoint's, 95 %
intervals over fingers, paired. Those that OUT has are kept, so a second call goes on.

    python tests/bench/compare.py --checkpoints NAME=CKPT [NAME=CKPT …] --roots DIR [DIR …] --out OUT
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from agreement import scored

from ifvit import cli
from ifvit.devices.sharding import use_cpu_cores
from ifvit.paths import cache_dir
from ifvit.scoring import intervals, rates
from ifvit.scoring.scorer import Scorer

SCORES = ((3, "agreement of the ridges"), (4, "number of matches"))  # columns of `measured`, and their names


@dataclass(frozen=True)
class Args:
    checkpoints: tuple[str, ...]  # NAME=CKPT, the first is the one that the others are compared with
    roots: tuple[str, ...]
    out: str
    genuine: int = 150  # pairs of a database, at most
    impostor: int = 400
    batch_size: int = 8
    seed: int = 0  # of the draw of pairs


def measured(scorer: Scorer, args) -> dict[str, np.ndarray]:
    """Of each database a row a pair: whether it is genuine, its two fingers, and SCORES."""
    found = {}
    for root, name, prints, pairs, scores in scored(scorer, args):
        numbers = {identity: n for n, identity in enumerate(dict.fromkeys(p.identity for p in prints.prints))}
        fingers = [[numbers[prints.prints[i].identity] for i in pair[:2]] for pair in pairs]
        found[f"{Path(root).name}/{name}"] = np.column_stack(
            [[p.genuine for p in pairs], fingers, scores["agreement"], scores["matches"]]
        )
    return found


def rows(path: Path, column: int) -> dict[str, tuple]:
    """Of each database EER, FMR100 and their draws."""
    found = {}
    for database, table in np.load(path).items():
        g, fingers, s = table[:, 0] > 0, table[:, 1:3].astype(int), table[:, column]
        found[database] = (
            100 * rates.equal_error_rate(s[g], s[~g]),
            100 * rates.fnmr_at_fmr(s[g], s[~g], 0.01),
            intervals.bootstrap(s[g], s[~g], fingers[g, 0], fingers[~g]),
        )
    return found


def report(out: Path, names: list[str], base: str) -> None:
    """The table of those of `names` that OUT has."""
    done = [name for name in names if (out / f"{name}.npz").exists()]
    for column, score in SCORES:
        print(f"\n{score}: EER of each database; macro EER and FMR100, and what they are more than `{base}`'s, points")
        table = {name: rows(out / f"{name}.npz", column) for name in done}
        for name, databases in table.items():
            cells = [f"{e:5.1f}" for e, _, _ in databases.values()]
            for n, rate in ((0, "eer"), (1, "fmr100")):
                cells.append(f"| {np.mean([d[n] for d in databases.values()]):5.1f}")
                if name != base and base in table:
                    here, there = ({d: row[2] for d, row in table[k].items()} for k in (name, base))
                    low, high = intervals.interval(100 * (intervals.macro(here)[rate] - intervals.macro(there)[rate]))
                    more = np.mean([databases[d][n] - table[base][d][n] for d in databases])
                    cells.append(f"{more:+.1f} [{low:+.1f}, {high:+.1f}]")
            print(f"{name:36s}", *cells)
    print("\nof " + ", ".join(next(iter(table.values()))))


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = dict(entry.split("=", 1) for entry in args.checkpoints)
    for name, path in found.items():
        if not (out / f"{name}.npz").exists():
            np.savez(out / f"{name}.npz", **measured(Scorer.from_checkpoint(path), args))
    report(out, list(found), next(iter(found)))


if __name__ == "__main__":
    cli.use_huge_pages()
    main(tyro.cli(Args, use_underscores=True))
