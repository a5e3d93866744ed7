"""Measures on a GPU or TPU what the tests check on CPUs: repeats, scores, coordinates, seconds a step, memory.

    python tests/bench/accelerator.py --out DIR                      # all parts, some minutes
    python tests/bench/accelerator.py --out DIR --only speed input   # these parts alone

The parts are coordinates, bits, repeat, scores, speed, input and ray.

Prints are generated. `repeat` and `scores` are of preset `smoke`, `speed` and `input` of `--preset` [paper].
"""

import argparse
import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ifvit.training.metrics import in_steps, read_rows

STEPS = 12
VARIANTS = (("dense", "float32"), ("dense", "bfloat16"), ("match", "float32"), ("match", "bfloat16"))


def command(*words: str, env: dict | None = None) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    return done


def folders(out: Path) -> list[str]:
    return ["--dense_checkpoint_dir", str(out / "dense"), "--matcher_checkpoint_dir", str(out / "matcher")]


def coordinates(args) -> None:
    """In a process of its own: one that has begun to use a GPU leaves no memory to others."""
    subprocess.run([sys.executable, __file__, "--out", str(args.out), "--alone", "coordinates"], check=True)


def points() -> None:
    """Points of a canvas of 512 px, against float64 on the host; and what they were without `geometry.exact`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ifvit.config import DenseConfig
    from ifvit.pixels.geometry import grid_points
    from ifvit.pixels.views import random_view, to_canvas

    config = DenseConfig()
    q = grid_points(config.image_size)
    view = jax.jit(lambda key: random_view(key, config, 0.7, 0.08, 45.0))(jax.random.key(1))
    m, c, a, f, p = (np.asarray(x, np.float64) for x in view)
    truth = c + (q - (config.image_size - 1) / 2) @ m.T + np.sin(q.astype(np.float64) @ f.T + p) @ a
    plain = lambda v, q: (
        v.centre + (q - (config.image_size - 1) / 2) @ v.matrix.T + jnp.sin(q @ v.frequency.T + v.phase) @ v.amplitude
    )
    for name, f in (
        ("as they are computed", lambda v, q: to_canvas(v, q, config.image_size)),
        ("with XLA's default", plain),
    ):
        print(
            f"coordinates {name}: at most {np.abs(np.asarray(jax.jit(f)(view, q)) - truth).max():.2g} px off",
            flush=True,
        )


def bits(args) -> None:
    """Whether a compiled step gives the same bits again from the same state and batch, in this and another process."""
    for flags in ("", "--xla_gpu_deterministic_ops=true"):
        digests = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, __file__, "--out", str(args.out), "--preset", "smoke", "--alone", "bits"],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()},
            )
            print(done.stdout.strip(), flush=True)
            digests.append(done.stdout.split()[-1:])
        print(
            f"XLA_FLAGS '{flags}': two processes gave {'the same' if digests[0] == digests[1] else 'different'} bits",
            flush=True,
        )


def twice() -> None:
    """Ten steps, each done twice from the same state; the first leaves that differ, and a digest of the last state."""
    import jax
    import numpy as np

    run, state, batch, how, mesh = prepared("smoke", "dense", "float32", keep=True)[:5]
    different: dict[str, int] = {}
    with jax.set_mesh(mesh):
        for n in range(10):
            (after, out), (again, out2) = (jax.device_get(run(state, batch, *how)) for _ in range(2))
            for (path, a), b in zip(jax.tree_util.tree_leaves_with_path((after, out)), jax.tree.leaves((again, out2))):
                if np.asarray(a).tobytes() != np.asarray(b).tobytes():
                    different.setdefault(jax.tree_util.keystr(path, simple=True, separator="/"), n)
            state = jax.device_put(after, jax.tree.map(lambda x: x.sharding, state))
    first = sorted(different.items(), key=lambda item: item[1])[:6]
    print(
        f"of {len(jax.tree.leaves((after, out)))} leaves {len(different)} differed between two goes at a step"
        + "".join(f"\n  {name}, from step {n} on" for name, n in first)
    )
    print("state after ten steps:", hash_of(after))


def hash_of(state) -> str:
    import hashlib

    import jax
    import numpy as np

    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))).hexdigest()[:16]


def repeat(args) -> None:
    """A run, and one that is stopped in its midst and goes on: equal bits?"""
    flags = [
        "ifvit.train_all",
        "--preset",
        "smoke",
        "--dataset_root",
        "synthetic",
        "--set",
        "dense.pairs_per_epoch=160",
    ]
    shutil.rmtree(args.out / "again", ignore_errors=True)
    print(command(*flags, *folders(args.out / "once")).stdout[-700:], flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", *flags, *folders(args.out / "again")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(read_rows(args.out / "again/dense/metrics.jsonl")) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    print(f"stopped: exit code {process.wait()}", flush=True)
    command(*flags, *folders(args.out / "again"))
    for module in ("dense/dense_reg_ckpt", "matcher/matcher_ckpt"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "ifvit.checkpoint",
                "diff",
                str(args.out / "once" / module),
                str(args.out / "again" / module),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        print(
            f"{module}, stopped and gone on with: {done.stdout.splitlines()[-1] if done.stdout else done.returncode}",
            flush=True,
        )


def scores(args) -> None:
    """Compares the scores of one checkpoint here and on the CPU.

    It prints how many different scores there are, because a poor matcher may give all pairs the same.
    """
    from ifvit.config import DenseConfig, preset
    from ifvit.data.gather import generated

    prints, found = args.out / "prints", {}
    prints.mkdir(parents=True, exist_ok=True)
    for file in generated(preset("smoke", DenseConfig).replace(synthetic_fingers=12, synthetic_impressions=4)):
        shutil.copy(file.path, prints)
    for platform, env in (("here", {}), ("cpu", {"JAX_PLATFORMS": "cpu"})):
        for module in ("dense/dense_reg_ckpt", "matcher/matcher_ckpt"):
            out = args.out / "scores" / platform / module.split("/")[0]
            command(
                "ifvit.evaluate",
                "--checkpoint",
                str(args.out / "once" / module),
                "--dataset_root",
                str(prints),
                "--out",
                str(out),
                env=env,
            )
            with (out / "scores.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            for column in ("score",) if module.startswith("dense") else ("score", "global", "local"):
                found.setdefault((module, column), []).append([float(row[column]) for row in rows])
    for (module, column), (here, cpu) in found.items():
        print(
            f"{module}, {column}: {len(here)} pairs, {len(set(here))} different values, at most "
            f"{max(abs(a - b) for a, b in zip(here, cpu)):.2g} from the CPU's",
            flush=True,
        )


def speed(args) -> None:
    """A step alone, its batch on the device: each variant in a process of its own, whose peak of memory it is."""
    for module, dtype in VARIANTS:
        words = [
            sys.executable,
            __file__,
            "--out",
            str(args.out),
            "--preset",
            args.preset,
            "--alone",
            f"{module},{dtype}",
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        print(done.stdout.strip() or f"{module}, {dtype}: {done.stderr[-1500:]}", flush=True)


def prepared(preset_name: str, module: str, dtype: str, keep: bool = False) -> tuple:
    """(compiled step, state, batch, its other arguments, mesh, the batch on the host, seconds of compilation).

    `keep`: the step does not donate the state.
    """
    import jax
    import numpy as np

    from ifvit.cli import use_compilation_cache
    from ifvit.config import DenseConfig, MatchConfig, preset
    from ifvit.devices.sharding import make_mesh, put_batch, replicated, shardings
    from ifvit.paths import cache_dir
    from ifvit.training.dense import dense_program
    from ifvit.training.match import match_program

    use_compilation_cache(cache_dir() / "compiled")
    dense = preset(preset_name, DenseConfig).replace(compute_dtype=dtype)
    config, program, constants = dense, dense_program(dense.program()), (dense.scalars(),)
    if module == "match":
        config = preset(preset_name, MatchConfig).replace(compute_dtype=dtype)
        aligner = jax.jit(program.init)(0)
        constants = config.scalars(), (aligner.params, aligner.batch_stats)
        program = match_program(config.program(), dense.program(), 300)
    pairs, side, rng = config.batch_size, config.canvas_size, np.random.default_rng(0)
    mesh = make_mesh(config.micro_batch)
    placement = shardings(jax.eval_shape(program.init, 0), mesh)
    canvas = lambda: rng.integers(0, 255, (pairs, side, side), np.uint8)
    mask = np.ones((pairs, side // 8, side // 8), bool)
    host = {
        "canvas0": canvas(),
        "canvas1": canvas(),
        "mask0": mask,
        "mask1": mask,
        "genuine": np.arange(pairs) % 2 == 0,
        "label0": np.zeros(pairs, np.int32),
        "label1": np.arange(pairs, dtype=np.int32) % 300,
    }
    state = jax.jit(program.init, out_shardings=placement)(0)
    with jax.set_mesh(mesh):
        batch, how = put_batch(host, mesh), (np.float32(1e-3), *jax.device_put(constants, replicated(mesh)))
        clock = time.perf_counter()
        run = (
            jax.jit(program.step, donate_argnums=() if keep else 0, out_shardings=(placement, replicated(mesh)))
            .lower(state, batch, *how)
            .compile()
        )
        return run, state, batch, how, mesh, host, time.perf_counter() - clock


def step(preset_name: str, module: str, dtype: str) -> None:
    """Times it, its batch on the device."""
    import jax

    from ifvit.devices.sharding import put_batch

    run, state, batch, how, mesh, host, compiled = prepared(preset_name, module, dtype)
    pairs, times = len(host["genuine"]), []
    with jax.set_mesh(mesh):
        for _ in range(STEPS + 1):
            clock = time.perf_counter()
            state, out = run(state, batch, *how)
            jax.block_until_ready((state, out))
            times.append(time.perf_counter() - clock)
        clock = time.perf_counter()
        jax.block_until_ready(put_batch(host, mesh))
        sent = time.perf_counter() - clock
    seconds = statistics.median(times[1:])
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    cost = (run.cost_analysis() or {}).get("flops", 0)
    print(
        f"{module}, {dtype}: {seconds * 1e3:.1f} ms a step of {pairs} pairs "
        f"[{min(times[1:]) * 1e3:.1f} … {max(times[1:]) * 1e3:.1f}], {pairs / seconds:.0f} pairs/s, "
        f"{cost / seconds / 1e12:.1f} TFLOP/s, peak {memory / 2**30:.1f} GiB, compiled in {compiled:.0f} s, "
        f"batch sent in {sent * 1e3:.0f} ms",
        flush=True,
    )


def pipeline(args) -> None:
    """Training as it is, prints and all: what a step takes, and what of it is waiting for prints."""
    out = args.out / "input"
    shutil.rmtree(out, ignore_errors=True)
    command(
        "ifvit.train_dense",
        "--preset",
        args.preset,
        "--dataset_root",
        "synthetic",
        "--checkpoint_dir",
        str(out),
        "--num_epochs",
        "1",
        "--set",
        "pairs_per_epoch=10240",
        "--set",
        "val_pairs=0",
    )
    rows = [r for r in read_rows(out / "metrics.jsonl") if r["split"] == "train"][1:]
    steps = 10 * len(rows)
    wait, whole = sum(r["input_seconds"] for r in rows), sum(r["seconds"] for r in rows)
    print(
        f"train_dense: {whole / steps * 1e3:.1f} ms a step, {wait / steps * 1e3:.1f} of them waiting for prints, "
        f"{statistics.median(in_steps(r) / 10 for r in rows) * 1e3:.1f} in it, "
        f"{statistics.median(r['pairs_per_second'] for r in rows):.0f} pairs/s",
        flush=True,
    )


def on_ray(args) -> None:
    """What a worker of Ray sees, and what a step costs there: two runs at a time, which share a GPU's memory."""
    out = args.out / "ray"
    shutil.rmtree(out, ignore_errors=True)
    done = command(
        "ifvit.train_dense",
        "--preset",
        "smoke",
        "--dataset_root",
        "synthetic",
        "--checkpoint_dir",
        str(out),
        "--runtime",
        "ray",
        "--num_workers",
        "1",
    )
    print(*[line for line in done.stdout.splitlines() if "train_dense:" in line], sep="\n", flush=True)
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "ray_overhead.py"),
            "--out",
            str(args.out / "overhead"),
            "--preset",
            args.preset,
            "--batch_size",
            "128",
            "--rounds",
            "8",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"},
    )
    print(done.stdout[-1500:], flush=True)


PARTS = {
    "coordinates": coordinates,
    "bits": bits,
    "repeat": repeat,
    "scores": scores,
    "speed": speed,
    "input": pipeline,
    "ray": on_ray,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.alone:
        return {"coordinates": points, "bits": twice}.get(
            args.alone, lambda: step(args.preset, *args.alone.split(","))
        )()
    for name in args.only:
        clock = time.perf_counter()
        PARTS[name](args)
        print(f"({name}: {time.perf_counter() - clock:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
