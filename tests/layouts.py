"""What test_layouts runs in processes of their own; each prints what it found as a line of JSON.

python tests/layouts.py one FOLDER              one process with eight devices
python tests/layouts.py steps FOLDER            a training step on each of three layouts
python tests/layouts.py two FOLDER RANK PORT    one of two processes with two devices each
python tests/layouts.py seed CHECKPOINT         Module 1's transformer onto the devices of Module 2
"""

import contextlib
import io
import json
import logging
import os
import sys
from pathlib import Path
from unittest.mock import Mock

from xla import flags

DEVICES = {"one": 8, "steps": 4, "two": 2, "seed": 4}

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = flags(DEVICES[sys.argv[1]])

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tensorstore as ts  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from orbax.checkpoint._src.multihost import multihost  # noqa: E402

from ifvit import checkpoint  # noqa: E402
from ifvit.checkpoint import handlers, reading  # noqa: E402
from ifvit.config import DenseConfig, preset  # noqa: E402
from ifvit.devices.sharding import put_whole_batch, shardings  # noqa: E402  # noqa: E402
from ifvit.errors import UserError  # noqa: E402
from ifvit.load_module1_weights import BRANCHES, load_module1_transformer_weights  # noqa: E402
from ifvit.models.networks import dense_network  # noqa: E402
from ifvit.training.loop import Task, saved_tree  # noqa: E402
from ifvit.training.saved import saved_tree  # noqa: E402
from ifvit.training.state import init_state, learning_rate, optimizer  # noqa: E402
from ifvit.training.step import dense_step  # noqa: E402
from ifvit.training.task import Task  # noqa: E402

ONE = ["1x1", "2x1", "1x2", "4x1", "2x2", "1x4", "8x1", "4x2", "2x4", "1x8"]  # data × model
WHOLE = ["1x1", "8x1", "1x8", "2x4", "2x2"]  # under which all leaves are saved; under the others one of each kind
TWO = ["4x1", "2x2", "2x2 across", "1x4"]  # `across`: those that share parameters sit in both processes
FAILURES = [("part of process 1", "_write_part", 1), ("part of process 0", "_write_part", 0), ("end", "finalize", 0)]
STEPS = ["1x1", "2x2", "1x4"]
META = {"epoch": 1, "config": {}}
TASK = Mock(Task, to_saved=lambda params: params)
CONFIG = preset("smoke", DenseConfig)
NET = dense_network(CONFIG)
ABSTRACT = jax.eval_shape(lambda: init_state(NET, optimizer(CONFIG, 0.0), 0))
BARRIER = 3  # seconds that a process waits for the other where a write fails; Orbax's own are 300


def drawn():
    """A state of preset smoke's Module 1, in the midst of a run: moments and step are not zero."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.dtype == np.int32:
            return np.full(leaf.shape, 3, np.int32)
        x = rng.normal(0, 0.3, leaf.shape).astype(np.float32)
        positive = {"var", "nu", "scale"} & {str(getattr(k, "key", getattr(k, "name", ""))) for k in path}
        return np.abs(x) + np.float32(0.5) if positive else x

    return jax.tree_util.tree_map_with_path(draw, ABSTRACT)


STATE = drawn()
LEAVES = checkpoint.leaves({"state": saved_tree(STATE, TASK)})


def mesh_of(layout: str) -> Mesh:
    data, model = map(int, layout.split()[0].split("x"))
    devices = np.array(jax.devices()[: data * model])
    devices = devices.reshape(model, data).T if "across" in layout else devices.reshape(data, model)
    return Mesh(devices, ("data", "model"))


def placement(layout: str, names=LEAVES) -> dict:
    """Where those leaves of a checkpoint lie: name -> sharding."""
    every = checkpoint.leaves({"state": saved_tree(shardings(ABSTRACT, mesh_of(layout)), TASK)})
    return {n: every[n] for n in names}


def one_of_each_kind() -> list[str]:
    """Leaves of which no two are split and shaped alike."""
    kinds = {(x.shape, placed.spec): n for (n, x), placed in zip(LEAVES.items(), placement("1x2").values())}
    return list(kinds.values())


def put(x: np.ndarray, sharding):
    """An array on devices; every process has the whole of it and keeps its part."""
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def save(path: Path, layout: str, names=LEAVES) -> None:
    arrays = {n: put(LEAVES[n], s) for n, s in placement(layout, names).items()}
    checkpoint.save(path, "dense_reg", checkpoint.nested(arrays)["state"], META)


def restore(path: Path, shardings: dict) -> checkpoint.Checkpoint:
    """As the loop does it."""
    folder = checkpoint.locate(path)
    return checkpoint.restore(folder, checkpoint.read_metadata(folder), checkpoint.nested(shardings)["state"])


def restored(path: Path, layout: str, names=LEAVES) -> tuple[dict, list[str]]:
    """A checkpoint's leaves on a layout, and what is wrong with them."""
    wanted = placement(layout, names)
    try:
        state = restore(path, wanted).state
    except UserError as e:
        return {}, [str(e)]
    flat = checkpoint.leaves({"state": state})
    wrong = [f"{n} is {'here' if n in flat else 'there'} alone" for n in flat.keys() ^ wanted.keys()]
    for name, x in flat.items():
        if x.sharding != wanted[name]:
            wrong.append(f"{name} lies as {x.sharding}")
        if any(np.asarray(s.data).tobytes() != LEAVES[name][s.index].tobytes() for s in x.addressable_shards):
            wrong.append(f"{name} has other bits")
    return flat, wrong


# ---- one process


def one(folder: Path) -> dict:
    sys.setswitchinterval(1e-5)  # seconds; threads take turns so often that what they must not share would show
    some = one_of_each_kind()
    for layout in WHOLE:
        save(folder / layout, layout)
    for layout in ONE:
        save(folder / "some" / layout, layout, some)
    pairs = {
        f"{source} on {target}": restored(folder / "some" / source, target, some)[1] for source in ONE for target in ONE
    }
    whole, shards = {}, {}
    for source, target in zip(2 * WHOLE, ONE):
        flat, whole[f"{source} on {target}"] = restored(folder / source, target)
        shards[target] = {n: x.addressable_shards[0].data.shape for n, x in flat.items()}
    return {"some": len(some), "pairs": pairs, "whole": whole, "shards": shards}


def steps(folder: Path) -> dict:
    """One training step on each layout: how far from that on the first, and how far from the state before, each
    leaf's largest difference divided by its largest value."""
    y, x = np.mgrid[: CONFIG.canvas_size, : CONFIG.canvas_size]
    ridges = np.stack([128 + 100 * np.sin(np.hypot(y + 40 * n, x - 30 * n) * 2 * np.pi / 9) for n in range(4)]).astype(
        np.uint8
    )
    mask = np.ones((4, CONFIG.canvas_size // 8, CONFIG.canvas_size // 8), bool)
    batch = {
        "canvas0": ridges,
        "canvas1": ridges[[0, 1, 2, 0]],
        "mask0": mask,
        "mask1": mask,
        "genuine": np.array([True, True, True, False]),
    }
    # The first moment begins at zero: after the step it is a tenth of the gradient. The rate makes parameters move.
    before = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if jax.tree_util.GetAttrKey("mu") in path else x, STATE
    )
    rate = learning_rate(CONFIG.replace(learning_rate=10.0), 10)(int(STATE.step))
    after = {}
    for layout in STEPS:
        mesh = mesh_of(layout)
        where = shardings(ABSTRACT, mesh)
        with jax.set_mesh(mesh):
            step = jax.jit(
                dense_step(NET, CONFIG),
                out_shardings=(where, None),
                compiler_options={"xla_cpu_use_fusion_emitters": False},  # compiles in two thirds of the time
            )
            state, metrics = step(jax.tree.map(put, before, where), put_whole_batch(batch, mesh), rate)
        assert jax.tree.map(lambda x: x.sharding, state) == where
        state, metrics = jax.device_get((state, metrics))
        after[layout] = checkpoint.leaves({"state": saved_tree(state, TASK), "metrics": metrics})
    first = after[STEPS[0]]

    def apart(a, b) -> float:
        return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))

    return {
        "moved": {n: apart(x, LEAVES[n]) for n, x in first.items() if n in LEAVES},
        "apart": {layout: {n: apart(x, after[layout][n]) for n, x in first.items()} for layout in STEPS},
    }


# ---- two processes


def two(folder: Path, rank: int, port: int) -> dict:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    sys.setswitchinterval(1e-5)
    some = one_of_each_kind()
    for layout in TWO:
        save(folder / "of two" / layout, layout)
        save(folder / "of two/some" / layout, layout, some)
    pairs = {
        f"{source} of {of} on {target}": restored(folder / f"of {of}/some" / source, target, some)[1]
        for target in TWO
        for of, sources in (("one", ONE), ("two", TWO))
        for source in sources
    }
    whole = {
        f"{source} of one on {target}": restored(folder / "of one" / source, target)[1]
        for source, target in zip(WHOLE, TWO)
    }
    return {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "pairs": pairs,
        "whole": whole,
        "asked": asked(folder),
        "read": bytes_read(folder),
        "aligner": with_aligner(folder),
        "damaged": damaged(folder, some),
        "failed": failing(folder, some),
    }


def together(what: str) -> None:
    multihost_utils.sync_global_devices(what)


def asked(folder: Path) -> dict:
    """Elements that this process asks the files for, and all there are, of what one process saved on two devices, and
    the layout that it goes to splits in four."""
    elements: dict[str, int] = {}

    class Counting:
        def __init__(self, store, name):
            self.store, self.name, self.shape = store, name, store.shape

        def __getitem__(self, index):
            return Counting(self.store[index], self.name)

        def read(self, into):
            elements[self.name] = elements.get(self.name, 0) + int(np.prod(self.store.shape))
            return into(self.store)

    reader, into = reading._Reader, reading._into_memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reader, "open", lambda self, name, checked, plain=reader.open: Counting(plain(self, name, checked), name)
        )
        patch.setattr(reading, "_into_memory", lambda counting: counting.read(into))
        flat, _ = restored(folder / "of one/some/1x2", "1x4", one_of_each_kind())
    return {n: [elements[n], x.size, x.sharding.is_fully_replicated] for n, x in flat.items()}


def bytes_read(folder: Path) -> dict:
    """Bytes that this process takes out of files for a large leaf, by the way it lies: in four, in two, whole."""
    w = np.random.default_rng(1).random((1024, 2048), np.float32)
    names = {
        "in four": put(w, NamedSharding(mesh_of("1x4"), P(None, "model"))),
        "in two": put(w, NamedSharding(mesh_of("2x2 across"), P(None, "model"))),
        "whole": put(w, NamedSharding(mesh_of("1x4"), P())),
    }
    checkpoint.save(folder / "large", "dense_reg", {"params": {"w": names["in four"]}}, META)
    out = {"size": w.nbytes}
    for name, x in names.items():
        before = _file_bytes()
        restore(folder / "large", {"state/params/w": x.sharding})
        out[name] = _file_bytes() - before
    return out


def _file_bytes() -> int:
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(v["value"] for m in found for v in m["values"])


def with_aligner(folder: Path) -> list[str]:
    """What is wrong with a matcher's checkpoint that comes back, whose aligner every process reads whole."""
    aligner = {"params": {"w": np.arange(6, dtype=np.float32)}}
    w = put(np.arange(8, dtype=np.float32), NamedSharding(mesh_of("1x4"), P("model")))
    checkpoint.save(folder / "matcher", "matcher", {"params": {"w": w}}, META, aligner)
    try:
        found = restore(folder / "matcher", {"state/params/w": w.sharding})
    except UserError as e:
        return [str(e)]
    return list(checkpoint.difference(found.aligner, aligner))


def damaged(folder: Path, names: list[str]) -> dict:
    """What restoring says on this process where the last device's part of one leaf is damaged."""
    name = next(n for n in names if n.endswith("mlp_0/kernel"))
    part = LEAVES[name][:, -LEAVES[name].shape[1] // 4 :].tobytes()
    said = {"leaf": name}
    for harm in ("flipped", "cut"):
        path = folder / harm
        save(path, "1x4", names)
        together(f"{harm}: saved")
        if jax.process_index() == 0:  # which does not read that part
            (file,) = (f for f in (path / "state").rglob("*") if f.is_file() and part in f.read_bytes())
            data = bytearray(file.read_bytes())
            at = data.index(part) + len(part) // 2
            data[at] ^= 1
            file.write_bytes(data if harm == "flipped" else data[:at])
        together(f"{harm}: damaged")
        try:
            restore(path, placement("1x4", names))
            said[harm] = "nothing"
        except Exception as e:
            said[harm] = f"{type(e).__name__}: {e}"
    return said


def failing(folder: Path, names: list[str]) -> dict:
    """What happens on this process where one finds the disk full: the other, itself, or the first at the end."""
    multihost._DEFAULT_BARRIER_TIMEOUT = BARRIER
    path, out = folder / "failing/dense_reg_ckpt", {}
    save(path, "1x4", names)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for where, method, rank in FAILURES:
        with pytest.MonkeyPatch.context() as patch:
            if jax.process_index() == rank:
                patch.setattr(handlers.MetadataHandler, method, full)
            first = attempt(path, names)
        together(f"{where}: failed")
        before = restored(path, "1x4", names)[1]
        together(f"{where}: the one before is read")
        again = attempt(path, names)
        together(f"{where}: tried again")
        out[where] = {"first": first, "before": before, "again": again, "after": restored(path, "1x4", names)[1]}
    return out | {"left": sorted(p.name for p in path.parent.iterdir())}


def attempt(path: Path, names: list[str]) -> str:
    try:
        save(path, "1x4", names)
        return "saved"
    except Exception as e:
        return f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"


# ---- Module 1 into Module 2


def seed(path: Path) -> dict:
    """What is wrong where Module 2 is seeded on two devices that share parameters, and two such copies."""
    transformer = checkpoint.load(path).state["params"]["loftr_transformer"]
    mesh, wrong = mesh_of("2x2"), {}
    shapes = {b: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), transformer) for b in BRANCHES}
    where = shardings(shapes, mesh)
    before = jax.tree.map(lambda x, s: put(np.zeros(x.shape, x.dtype), s), shapes, where)
    for share in (True, False):
        with contextlib.redirect_stdout(io.StringIO()):
            after = load_module1_transformer_weights(path, before, share)
        found = checkpoint.leaves(after)
        bad = [f"{n} lies as {x.sharding}" for n, x in found.items() if x.sharding != checkpoint.leaves(where)[n]]
        bad += [f"{b}/{n}: {how}" for b in BRANCHES for n, how in checkpoint.difference(after[b], transformer).items()]
        if not share:  # what the step does to one, which it donates, is nothing to the other
            jax.tree.map(lambda x: x.delete(), after[BRANCHES[0]])
            bad += [f"copied {n}: {how}" for n, how in checkpoint.difference(after[BRANCHES[1]], transformer).items()]
        wrong[str(share)] = bad
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(before))
    return {"split": split, "wrong": wrong}


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)
    what, where, *rest = sys.argv[1:]
    print(
        json.dumps({"one": one, "steps": steps, "two": two, "seed": seed}[what](Path(where), *map(int, rest))),
        flush=True,
    )
