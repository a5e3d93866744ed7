"""Does any damaged legacy checkpoint do anything but be read or be refused?

Mutates files that JAX, optax, flax and numpy pickled. A failure is an exception other than
UserError, an execution (an import, a process, a file opened other than the one read: any event of
Python's audit hooks), memory or recursion that ran out, or a read of more than 10 s. The failing
case is printed with the seed that makes it again.

    python tests/bench/fuzz_pickles.py --count 10000 [--seed N]

10,000 cases: 20 s on one core.
"""

import argparse
import collections
import contextlib
import datetime
import os
import pickle
import pickletools
import random
import struct
import sys
import tempfile
import time
import uuid
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState

from ifvit import legacy
from ifvit.errors import UserError

SECONDS = 10.0
OPCODES = [op.code.encode("latin1") for op in pickletools.opcodes]
LENGTHS = {
    "BINUNICODE": "<I",
    "BINBYTES": "<I",
    "LONG4": "<i",
    "BINSTRING": "<i",
    "BINUNICODE8": "<Q",
    "BINBYTES8": "<Q",
    "BYTEARRAY8": "<Q",
    "FRAME": "<Q",
    "LONG_BINPUT": "<I",
    "LONG_BINGET": "<I",
    "SHORT_BINUNICODE": "<B",
    "SHORT_BINBYTES": "<B",
    "LONG1": "<B",
    "BINPUT": "<B",
    "BINGET": "<B",
    "BININT1": "<B",
    "BININT": "<i",
}
# What an attacker would put in: calls of os.system in each way there is, and jumps of the stack.
SNIPPETS = [
    b"cos\nsystem\n(S'touch executed'\ntR",
    b"(S'touch executed'\nios\nsystem\n",
    b"(cos\nsystem\nS'touch executed'\no",
    b"cbuiltins\neval\n(S'1/0'\ntR",
    b"\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R",
    b"cos\nsystem\n)\x81",
    b"cbuiltins\ngetattr\n(cos\n__dict__\nS'system'\ntR",
    b"}}b",
    b"(NtR",
    b"Q",
    b"P1\n",
    b"\x82\x01",
    b"\x97",
    b"\x98",
    b"(" * 300,
    b"]" * 300,
    b"\x85" * 300,
    b"2a",
    b"}2s",
    b"0",
    b"1",
    b"]q\x002a",
    b"j\xff\xff\xff\xff",
    b"I" + b"9" * 5000 + b"\n",
]


def samples() -> dict[str, bytes]:
    """Real legacy files by name, in every protocol."""
    params = {
        "loftr_transformer": {"layers.0.0": {"q_proj": {"kernel": jnp.arange(6.0).reshape(2, 3)}}},
        "half": jnp.ones(3, jnp.bfloat16),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    odd = {
        "fortran": np.asfortranarray(np.ones((2, 3))),
        "big": np.arange(3, dtype=">i4"),
        "scalar": np.float32(2),
        "bf16": np.ones(2, ml_dtypes.bfloat16),
        "flag": True,
        "list": [1, 2.5, np.int64(3)],
        "none": None,
    }
    contents = {
        "guide": {
            "state": {"params": params, "opt_state": tx.init(params), "step": 12},
            "metadata": {"epoch": 3, "config": {"lr": 1e-3, "path": Path("a/b"), "dtype": jnp.float32, "set": {1}}},
            "timestamp": "2024-05-01T10:00:00",
        },
        "bare": {"odd": odd, **params},
        "linen": freeze({"params": params, "batch_stats": {"mean": jnp.zeros(2)}}),
        "record": {"state": TrainState(step=1, apply_fn=None, params=params, tx=None, opt_state=tx.init(params))},
        "nnx": {
            "params": nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
            "rng": jax.random.key(1),
            "metadata": argparse.Namespace(a=collections.OrderedDict(b=1)),
        },
        "values": {
            "params": params,
            "timestamp": datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
            "metadata": {
                "text": np.array(["a", "é"]),
                "days": np.array(["2024-05-01"], "M8[D]"),
                "rng": np.random.default_rng(0),
                "records": np.array([(1, 2.5)], [("n", ">i4"), ("x", "f8")]),
                "objects": np.array([1, None, "a"], object),
                "masked": np.ma.array([1, 2], mask=[True, False]),
                "seen": collections.Counter(a=2),
                (1, None): {2.5: {1}},
                "last": collections.deque([1.0], 5),
                "id": uuid.UUID(int=5),
                "error": ValueError("a", params),
            },
        },
    }
    files = {
        f"{name}, protocol {p}": pickle.dumps(x, p)
        for name, x in contents.items()
        for p in range(6)
        if name != "nnx" or p > 1
    }  # JAX 0.12 writes typed keys with protocol 2 and newer only
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.pkl"
        legacy.write(path, {"params": {"w": np.arange(6.0).reshape(2, 3)}, "step": np.int32(3)}, {"epoch": 1}, "now")
        files["ours"] = path.read_bytes()
    return files


def mutate(raw: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to three changes, at random places or at the borders of instructions."""
    out = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            ops = [(op, at) for op, _, at in pickletools.genops(bytes(out))]
        except Exception:  # an earlier change broke it
            ops = []
        border = rng.choice(ops)[1] if ops else rng.randrange(len(out) + 1)
        match rng.choice(
            ["flip", "flip", "byte", "cut", "splice", "repeat", "drop", "swap", "length", "length", "insert", "snippet"]
        ):
            case "flip":
                for _ in range(rng.randint(1, 8)):
                    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            case "byte":
                out[rng.randrange(len(out))] = rng.randrange(256)
            case "cut":
                del out[rng.randrange(1, len(out)) :]
            case "splice":
                a = rng.randrange(len(other))
                out[border : border + rng.choice([0, 0, 20])] = other[a : a + rng.randint(1, 200)]
            case "repeat":
                out[border:border] = out[border : border + rng.randint(1, 200)] * rng.choice([1, 1, 2, 50])
            case "drop":
                del out[border : border + rng.randint(1, 40)]
            case "swap":
                out[border : border + 1] = rng.choice(OPCODES)
            case "length":
                places = [(op, at) for op, at in ops if op.name in LENGTHS]
                if places:
                    op, at = rng.choice(places)
                    size = struct.calcsize(LENGTHS[op.name])
                    low = -(1 << 8 * size - 1) if LENGTHS[op.name] == "<i" else 0
                    high = low + (1 << 8 * size) - 1
                    new = rng.choice([low, high, high // 2, 0, 1, rng.randint(low, high), rng.randint(0, 127)])
                    out[at + 1 : at + 1 + size] = struct.pack(LENGTHS[op.name], new)
            case "insert":
                out[border:border] = rng.choice(OPCODES) + rng.randbytes(rng.choice([0, 0, 1, 4, 8]))
            case "snippet":
                out[border:border] = rng.choice(SNIPPETS)
        if len(out) < 2:
            out += b"N."
    return bytes(out)


class Watch:
    """Events of Python's audit hooks within `with watch(path)`, less the opening of that file.

    A hook cannot be taken away again, hence one for the process.
    """

    def __init__(self):
        self.events: list | None = None
        sys.addaudithook(self._note)

    def _note(self, event, args):
        if self.events is not None and not (event == "open" and str(args[0]) == self.path):
            self.events.append((event, str(args)[:200]))

    @contextlib.contextmanager
    def __call__(self, path):
        self.path, self.events = str(path), []
        found = self.events
        try:
            yield found
        finally:
            self.events = None


@contextlib.contextmanager
def in_folder():
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield Path(folder)


def bits(tree) -> object:
    if isinstance(tree, dict):
        return {k: bits(v) for k, v in tree.items()}
    return (tree.dtype.name, tree.shape, tree.tobytes()) if isinstance(tree, np.ndarray) else repr(tree)


def content(path: Path) -> tuple:
    found = legacy.read(path)
    return bits(found.state), bits(found.metadata), found.timestamp


def fuzz(count: int, seed: int, watch: Watch) -> tuple[collections.Counter, list[str]]:
    """Outcomes of `count` cases, of the seeds from `seed` on, and the failures."""
    legacy._optax_fields()  # imports optax, once
    outcomes, failures = collections.Counter(), []
    with in_folder() as folder:
        path = folder / "case.pkl"
        files = list(samples().values())
        whole = []
        for raw in files:
            path.write_bytes(raw)
            whole.append(content(path))
        for case in range(seed, seed + count):
            rng = random.Random(case)
            which = rng.randrange(len(files))
            path.write_bytes(mutate(files[which], rng.choice(files), rng))
            error, start = None, time.perf_counter()
            with watch(path) as events:
                try:
                    found = content(path)
                    outcomes["read equal" if found == whole[which] else "read different"] += 1
                except UserError as e:
                    outcomes["refused"] += 1
                    error = next((n for n in ("MemoryError", "RecursionError") if n in str(e)), None)
                except BaseException as e:
                    error = f"{type(e).__name__}: {e}"
            seconds = time.perf_counter() - start
            if seconds > SECONDS:
                error = f"took {seconds:.0f} s"
            if events or sorted(p.name for p in folder.iterdir()) != ["case.pkl"]:
                error = f"executed something: {events[:3]} {[p.name for p in folder.iterdir()]}"
            if error:
                outcomes["FAILED"] += 1
                failures.append(f"{error[:300]}: again with --count 1 --seed {case}")
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    outcomes, failures = fuzz(args.count, args.seed, Watch())
    print("\n".join(failures))
    print(
        f"{args.count} cases in {time.perf_counter() - start:.0f} s: "
        + ", ".join(f"{n} {what}" for what, n in outcomes.most_common())
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
