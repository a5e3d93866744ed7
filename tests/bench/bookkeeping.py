"""What an evaluation costs beyond the network: seconds and memory, with scores that are drawn by chance.

    python tests/bench/bookkeeping.py

Each line is of a process of its own. Memory: the peak above what is there once all is imported; the scores themselves,
20 bytes a pair (24 within the scorer), are in it. At last the split of a training set and the pairs that validate it.
"""

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ifvit.data.sources import Print  # noqa: E402
from ifvit.data.split import split_by_finger  # noqa: E402
from ifvit.errors import UserError  # noqa: E402
from ifvit.evaluate import evaluate  # noqa: E402
from ifvit.scoring import comparison, plots, scorer  # noqa: E402, F401
from ifvit.training.match import balanced_pairs  # noqa: E402

CASES = (  # fingers, impressions, protocol, max_pairs
    (600, 10, "all", None),
    (600, 10, "all", 0),
    (6000, 1, "all", None),
    (6000, 2, "fvc", None),
    (6000, 2, "fvc", 0),
)


def scores(prints, pairs, batch_size) -> dict[str, np.ndarray]:
    """As Module 2 gives them."""
    rng = np.random.default_rng(0)
    found = {k: rng.random(len(pairs), np.float32) for k in ("global", "local", "agreement")}
    found |= {"score": rng.random(len(pairs)), "matches": np.zeros(len(pairs), np.int32)}
    found["score"][pairs.of("DB", True)] += 0.4
    return found | {"log_odds": 9 * found["score"] - 5}


def prints_of(fingers: int, impressions: int) -> SimpleNamespace:
    pairs = ((f, i) for f in range(fingers) for i in range(impressions))
    return SimpleNamespace(prints=tuple(Print(f"/{f}_{i}.png", "DB", str(f), str(i), 500.0) for f, i in pairs))


def evaluation(case: tuple) -> None:
    fingers, impressions, protocol, max_pairs = case
    prints, said = prints_of(fingers, impressions), ""
    fake = SimpleNamespace(score=scores, picture=lambda *_: None)

    def run():
        nonlocal said
        try:
            with tempfile.TemporaryDirectory() as out:
                row = evaluate(fake, prints, Path(out), protocol, max_pairs=max_pairs)["databases"]["DB"]
            said = f"{row['genuine'] + row['impostor']:,} pairs"
        except UserError as e:
            said = f"refused: {e}"

    print(f"{fingers} × {impressions}, {protocol}, max_pairs {max_pairs}: {measured(run)}; {said}", flush=True)


def training(case: tuple) -> None:
    prints = prints_of(*case)
    run = lambda: (split_by_finger(prints.prints, 0.1, 0), balanced_pairs(prints, 512))
    print(f"{case[0]} × {case[1]}, split and validation pairs: {measured(run)}", flush=True)


def measured(call) -> str:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, clock, cpu = peak(), time.perf_counter(), time.process_time()
    call()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return f"{clock:.1f} s, {cpu:.1f} of one core, {peak() - before:.0f} MB above {before:.0f}"


def peak() -> float:
    """MB of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    for job, cases in ((evaluation, CASES), (training, ((6000, 1), (600, 10)))):
        for case in cases:
            process = multiprocessing.get_context("spawn").Process(target=job, args=(case,))
            process.start()
            process.join()
