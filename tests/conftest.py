"""What the tests share: one cache for the session, commands called in this process, and one smoke run of each."""

import contextlib
import fcntl
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from xla import flags

# Before JAX is imported: programs run for milliseconds here and take half a minute to optimise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", flags())

import pytest
from jaxtyping import install_import_hook

# Arguments and results of every annotated function are checked while the tests run: shapes, dtypes and classes.
# Not where files of other software are read byte by byte: there are no shapes, and a check at each call takes minutes.
CHECKED = "checkpoint data devices models pixels scoring training commands evaluate gallery verify weights".split()
install_import_hook([f"ifvit.{room}" for room in CHECKED], "checking.checked")

SMOKE = ["--preset", "smoke"]
# Long files are begun first, so that no process is left with one of them when the others have nothing more to do; and
# beside the one that trains what many share, some that need none of it.
LONG = "sweeps gs_runs hosts step runs packaged models faults kaggle cluster processes evaluate errors layouts".split()


class Said(NamedTuple):
    """How a command ended."""

    code: int
    out: str  # stdout, the log included
    err: str


# Fixtures that start other processes: what uses them is marked `process`. And those that take minutes: `slow`.
STARTING = {"process", "begun", "bed", "machine", "one_worker"}
LASTING = {"bed", "machine"}  # a cluster of two hosts; Kaggle's machine, with an installation of its own
# And those that train: what uses them, and what the files of TRAINING hold, is marked `run`.
TRAINED = {"module1", "module2", "pipeline"}
TRAINING = [
    f"test_{name}.py"
    for name in "runs gs_runs impression_runs step meter guide profile python_page mistakes teacher".split()
]


def pytest_collection_modifyitems(items):
    for item in items:
        for mark, fixtures in (("process", STARTING), ("slow", LASTING), ("run", TRAINED)):
            if fixtures & set(item.fixturenames) or mark == "run" and item.path.name in TRAINING:
                item.add_marker(mark)
    names = [f"test_{name}.py" for name in LONG]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of this session that pytest's workers have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def once(shared, tmp_path_factory):
    """once(NAME, RUN): what RUN(FOLDER) said, by the first worker that asks; each worker has a copy of the folder."""

    def call(name: str, run) -> tuple[Path, Said]:
        kept, told = shared / "once" / name, shared / "once" / f"{name}.json"
        kept.mkdir(parents=True, exist_ok=True)
        with open(told.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not told.exists():
                told.write_text(json.dumps(run(kept)))
            code, *texts = json.loads(told.read_text())
        cwd = shutil.copytree(kept, tmp_path_factory.mktemp(name), dirs_exist_ok=True)
        return cwd, Said(code, *(text.replace(str(kept), str(cwd)) for text in texts))

    return call


@pytest.fixture(scope="session", autouse=True)
def cache(shared):
    """IFVIT_CACHE of this session, for processes that it starts too; pytest's own workers share it.

    So they share compiled programs, small ones too: together these take longer than the large.
    """
    from ifvit import cli

    folder = shared / "cache"
    cli.use_compilation_cache(folder / "compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IFVIT_CACHE", str(folder))
        patch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
        yield folder


@pytest.fixture(scope="session")
def command():
    """`python -m ifvit.NAME WORDS…` in this process: command(NAME, *WORDS, cwd=DIR) -> Said."""

    def call(name: str, *words, cwd) -> Said:
        from ifvit import cli

        module = importlib.import_module(
            f"ifvit.{name}{'.__main__' if name in ('checkpoint', 'gallery', 'weights') else ''}"
        )
        words = [str(w) for w in words]
        out, err = io.StringIO(), io.StringIO()
        log = logging.StreamHandler(out)  # pytest's own handler keeps the command from making one
        logging.getLogger("ifvit").addHandler(log)
        try:
            with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                if hasattr(module, "Args"):
                    code = cli.main(module.Args, f"ifvit.{name}", words)
                else:
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(sys, "argv", [f"ifvit.{name}", *words])
                        code = cli.main_with_commands(module.COMMANDS, f"ifvit.{name}")
        except SystemExit as e:  # --help
            code = e.code or 0
        finally:
            logging.getLogger("ifvit").removeHandler(log)
        return Said(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def process():
    """The same in a process of its own: process(*WORDS after `python`, cwd=DIR, **environment) -> Said."""

    def call(*words, cwd, **environment) -> Said:
        ended = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=cwd,
            env=os.environ | environment,
            text=True,
            capture_output=True,
            timeout=600,
        )
        return Said(ended.returncode, ended.stdout, ended.stderr)

    return call


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """An installation without packaged weights; the folder that has none."""
    folder = tmp_path / "no weights"
    folder.mkdir()
    monkeypatch.setattr("ifvit.weights.FOLDER", folder)
    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A checkpoint of a smoke Module 1 as it is before its first step, as if generated prints had trained it."""
    import jax
    import numpy as np

    from ifvit import checkpoint
    from ifvit.config import DenseConfig, preset
    from ifvit.models.networks import dense_network

    path = tmp_path_factory.mktemp("untrained") / "dense_reg_ckpt"
    config = preset("smoke", DenseConfig).replace(checkpoint_dir=str(path.parent))
    params, stats = jax.jit(dense_network(config).init)(jax.random.key(7))
    state = {"params": params, "batch_stats": stats, "opt_state": {"count": np.int32(4)}, "step": np.int32(4)}
    told = {"epoch": 2, "step": 4, "finished": True, "best": None, "value": 0.5, "data": "", "history": []}
    checkpoint.save(path, "dense_reg", state, told | {"config": config.to_dict(), "sample": ["of prints"]})
    return path


@pytest.fixture
def packed(command, untrained, no_weights):
    """An installation whose packaged weights are those of `untrained`; the folder that has them."""
    shutil.copy(Path(__file__).parents[1] / "ifvit/weights/recipe.toml", no_weights)
    said = command("weights", "pack", untrained, cwd=no_weights)
    assert said.code == 0, said
    return no_weights


@pytest.fixture(scope="session")
def generated(cache):
    """Files of generated prints: generated[finger, impression], fingers 1 to 6, impressions 1 to 3."""
    from ifvit.data import synthetic
    from ifvit.devices.cores import cores

    files = synthetic.prints(0, 6, 3, cache, workers=cores())
    return {(f, i): files[3 * (f - 1) + i - 1] for f in range(1, 7) for i in range(1, 4)}


@pytest.fixture(scope="session")
def prints(generated, shared):
    """A root with two databases, DB1 and DB2, of 3 fingers with 3 impressions each, named as FVC does."""
    from ifvit.files import whole

    root = shared / "prints"
    for (finger, impression), file in generated.items():
        database = root / ("DB1" if finger <= 3 else "DB2")
        database.mkdir(parents=True, exist_ok=True)
        print_ = database / f"{(finger - 1) % 3 + 1}_{impression}.png"
        if not print_.exists():
            with whole(print_) as part:
                shutil.copy(file, part)
    return root


@pytest.fixture(scope="session")
def module1(command, prints, once):
    """The guide's first command, run in `cwd`: what it `said`, and its `folder` with the checkpoint `path`."""
    words = ("--dataset_root", prints, "--checkpoint_dir", "./checkpoints/dense_reg", *SMOKE)
    return _ran(*once("module1", lambda cwd: command("train_dense", *words, cwd=cwd)), "dense_reg")


@pytest.fixture(scope="session")
def module2(command, prints, module1, once):
    """The guide's second command, run beside the first."""
    words = ("--dataset_root", prints, "--pretrained_ckpt", "./checkpoints/dense_reg/dense_reg_ckpt.pkl")
    words += ("--checkpoint_dir", "./checkpoints/matcher", "--num_classes", 100, *SMOKE)

    def run(cwd):
        shutil.copytree(module1.cwd, cwd, dirs_exist_ok=True)
        return command("train_match", *words, cwd=cwd)

    return _ran(*once("module2", run), "matcher")


@pytest.fixture(scope="session")
def pipeline(command, once):
    """The guide's `train_all`, on generated prints; classes as in `module2`, which spares a compilation."""
    words = ("--dense_checkpoint_dir", "./checkpoints/dense_reg", "--matcher_checkpoint_dir", "./checkpoints/matcher")
    cwd, said = once("pipeline", lambda cwd: command("train_all", *words, "--num_classes", 100, *SMOKE, cwd=cwd))
    assert said.code == 0, said
    return SimpleNamespace(
        cwd=cwd,
        said=said,
        folder=cwd / "checkpoints",
        module1=cwd / "checkpoints/dense_reg/dense_reg_ckpt",
        module2=cwd / "checkpoints/matcher/matcher_ckpt",
    )


def _ran(cwd: Path, said: Said, name: str) -> SimpleNamespace:
    assert said.code == 0, said
    folder = cwd / "checkpoints" / name
    return SimpleNamespace(cwd=cwd, said=said, folder=folder, path=folder / f"{name}_ckpt")


@pytest.fixture
def started(monkeypatch, command):
    """A training command up to its first step: started(NAME, *WORDS, cwd=DIR) -> (Said, task, state to start from).

    With create=False up to the task, which takes a second instead of five.
    """

    import jax

    from ifvit.devices import sharding
    from ifvit.training.resume import begin

    def call(name: str, *words, cwd, create=True):
        made = {}

        def train(task, resume, host, *_, **__):
            made.update(task=task)
            if create:
                mesh = sharding.make_mesh(task.config.micro_batch)
                made.update(state=begin(task, sharding.shardings(jax.eval_shape(task.init, 0), mesh)))
            return Path("nowhere")

        monkeypatch.setattr("ifvit.training.loop.train", train)
        said = command(name, *words, cwd=cwd)
        return said, made.get("task"), made.get("state")

    return call
