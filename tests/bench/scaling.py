"""What two processes of one core each gain over one, and what their step sends: pairs per second, collectives, bytes.

    python tests/bench/scaling.py --pairs 16 64 --rounds 3

Each process is bound to a core of its own; a round runs one process, then two with the same number of
pairs each. The ratio of a round is of that round's own runs: other jobs on the machine disturb both.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time

STEPS = 6


def worker(pairs: int, rank: int, processes: int, port: int, name: str, sets: list[str]) -> None:
    """Trains on random pixels; process 0 prints pairs per second of the median step, and the step's collectives."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    import numpy as np

    from ifvit.config import DenseConfig, parse_value, preset
    from ifvit.devices.sharding import make_mesh, put_batch, replicated, shardings
    from ifvit.training.dense import dense_program
    from ifvit.training.resume import begin
    from ifvit.training.task import Task

    changes = {k: parse_value(DenseConfig, k, v) for k, v in (s.split("=") for s in sets)}
    config = preset(name, DenseConfig).replace(batch_size=pairs * processes, **changes)
    program = dense_program(config.program())
    mesh = make_mesh(config.micro_batch)
    task = Task("dense_reg", config, 100, "", program.init, program.step, None, (), None, None, "accuracy", True, {})
    placement = shardings(jax.eval_shape(task.init, 0), mesh)
    rng = np.random.default_rng(rank)
    canvas = lambda: rng.integers(0, 255, (pairs, config.canvas_size, config.canvas_size), np.uint8)
    mask = np.ones((pairs, config.canvas_size // 8, config.canvas_size // 8), bool)
    host = {
        "canvas0": canvas(),
        "canvas1": canvas(),
        "mask0": mask,
        "mask1": mask,
        "genuine": np.ones(pairs, bool),
        "label0": np.zeros(pairs, np.int32),
        "label1": np.zeros(pairs, np.int32),
    }
    state = begin(task, placement)
    how = np.float32(1e-3), config.scalars()
    times = []
    with jax.set_mesh(mesh):
        batch = put_batch(host, mesh, config.accumulate)
        step = (
            jax.jit(task.step, donate_argnums=0, out_shardings=(placement, replicated(mesh)))
            .lower(state, batch, *how)
            .compile()
        )
        for _ in range(STEPS + 1):
            clock = time.perf_counter()
            state, metrics = step(state, put_batch(host, mesh, config.accumulate), *how)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - clock)
    if rank == 0:
        sent = collectives(step.as_text())
        print(
            json.dumps(
                {
                    "rate": pairs * processes / statistics.median(times[1:]),
                    "collectives": len(sent),
                    "bytes": sum(sent),
                    "largest": max(sent, default=0),
                }
            ),
            flush=True,
        )


def collectives(hlo: str) -> list[int]:
    """Bytes of what each all-reduce (or gather, scatter) of a compiled step moves, one entry a collective."""
    size = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
    found = []
    for kinds in re.findall(
        r"= (\(?[^=]*?\)?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", hlo
    ):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", kinds)
        found.append(sum(size.get(t, 4) * eval("*".join(d.split(",")) or "1") for t, d in shapes))
    return found


def measured(pairs: int, processes: int, name: str, sets: list[str]) -> dict:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps([pairs, rank, processes, port, name, sets])],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        )
        for rank in range(processes)
    ]
    said = [p.communicate()[0] for p in started]
    return json.loads(said[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 64], help="a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--set", action="append", default=[], help="a configuration key, as in training")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*json.loads(args.worker))
    for pairs in args.pairs:
        ratios = []
        for _ in range(args.rounds):
            one, two = (measured(pairs, n, args.preset, args.set) for n in (1, 2))
            ratios.append(two["rate"] / one["rate"])
            print(
                f"{pairs} pairs a process: one {one['rate']:.1f} pairs/s, two {two['rate']:.1f}: "
                f"{ratios[-1]:.2f} times",
                flush=True,
            )
        print(
            f"{pairs} pairs a process: {statistics.median(ratios):.2f} times [{min(ratios):.2f} … {max(ratios):.2f}]; "
            f"a step makes {two['collectives']} collectives of {two['bytes'] / 1e6:.2f} MB, the largest "
            f"{two['largest'] / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
