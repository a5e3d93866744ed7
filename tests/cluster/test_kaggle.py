"""The Kaggle notebook, its cells run as Kaggle runs them: in order, in a fresh process that has a /kaggle of its own.

That /kaggle is seen by this process alone: it lives in a mount namespace, under a root directory that is put together
for it, so that the machine's own gets none (which would make a Kaggle notebook of everything else that runs on it).
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from ifvit import checkpoint, train_all

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "cluster/kaggle.ipynb").read_text())
EPOCHS = 10  # of Module 1, 20 steps
EXTRA = ["--preset", "smoke", "--num_classes", "100", "--set", f"dense.num_epochs={EPOCHS}"]

# $1: an empty directory, the new root; $2: what is to be /kaggle; then the command
ROOM = """
set -e
root=$1 kaggle=$2
shift 2
mount -t tmpfs tmpfs "$root"
for place in /*; do
  if [ "$place" = /kaggle ]; then continue
  elif [ -L "$place" ]; then cp -P "$place" "$root$place"
  elif [ -d "$place" ]; then mkdir "$root$place"; mount --rbind "$place" "$root$place"; fi
done
mkdir "$root/kaggle"
mount --bind "$kaggle" "$root/kaggle"
mount --bind "$kaggle/input" "$root/kaggle/input"
mount -o remount,bind,ro "$root/kaggle/input"
exec chroot "$root" "$@"
"""

# Nine hours pass as soon as the first epoch has been saved: so the training is stopped in its middle, on any machine.
NINE_HOURS_LATER = """
import os, time
def later(now=time.time):
    return now() + 9 * 3600 * os.path.isdir("/kaggle/working/IFViT/checkpoints/dense_reg/dense_reg_epoch_1")
time.time = later
"""


class Session:
    """One Kaggle session: `input` and `working` of its /kaggle, and how its notebook ended."""

    def __init__(self, folder: Path, machine: SimpleNamespace):
        self.kaggle, self.root, self.machine = folder / "kaggle", folder / "root", machine
        self.input, self.working = self.kaggle / "input", self.kaggle / "working"
        for place in (self.root, self.input, self.working):
            place.mkdir(parents=True)

    def attach(self, what: Path, name: str) -> Path:
        return shutil.copytree(what, self.input / name)

    def inside(self, *words, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                "unshare",
                "--mount",
                *(["--map-root-user"] if os.geteuid() else []),
                "sh",
                "-c",
                ROOM,
                "sh",
                self.root,
                self.kaggle,
                *words,
            ],
            env=os.environ | self.machine.environment | environment,
            text=True,
            timeout=900,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, before: str = "", gpus: int = 0, **parameters) -> subprocess.CompletedProcess:
        """Runs all code cells, `parameters` in place of those that the first one sets."""
        first, *others = ("".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code")
        for name, value in parameters.items():
            first, count = re.subn(rf"^{name} = [^#]*", lambda _: f"{name} = {value!r}  ", first, flags=re.M)
            assert count == 1, name
        script = self.kaggle / "cells.py"
        script.write_text("\n".join([before, first, *others]))
        smi = self.kaggle / "bin/nvidia-smi"  # says what the test wants, whatever this machine has
        smi.parent.mkdir()
        smi.write_text("#!/bin/sh\n" + (f"seq -f 'GPU %g: Tesla T4' 0 {gpus - 1}\n" if gpus else "exit 9\n"))
        smi.chmod(0o755)
        return self.inside(
            self.machine.python,
            "/kaggle/cells.py",
            KAGGLE_KERNEL_RUN_TYPE="Batch",
            PATH=f"/kaggle/bin:{os.environ['PATH']}",
        )


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A Python with everything but ifvit, and ifvit's source."""
    folder = tmp_path_factory.mktemp("machine")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip())
    # As a plain entry of sys.path: the .pth files in there, such as that of an editable ifvit, are not followed.
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(pytest.__file__).parents[1])}
    (site / "ours.pth").write_text("\n".join(sorted(ours)))
    shutil.copytree(
        ROOT,
        folder / "source",
        ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "checkpoints", "runs", "tests"),
    )
    return SimpleNamespace(python=python, source=folder / "source", environment=_builds_without_network())


def _builds_without_network() -> dict[str, str]:
    """pip's environment; virtualenv, which comes with Ray, has the setuptools that the build needs in its luggage."""
    try:
        from virtualenv.seed.wheels.embed import BUNDLE_FOLDER
    except ImportError:
        return {}
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(BUNDLE_FOLDER)}


@pytest.fixture(scope="module")
def new_session(machine, tmp_path_factory):
    """new_session() -> a session with nothing attached; skips where a process cannot have a /kaggle of its own."""

    def new() -> Session:
        return Session(tmp_path_factory.mktemp("session"), machine)

    try:
        ended = new().inside("test", "-d", "/kaggle/working")
    except OSError as e:
        pytest.skip(f"a process cannot have a /kaggle of its own here: {e}")
    if ended.returncode:
        pytest.skip(f"a process cannot have a /kaggle of its own here: {ended.stdout.strip()}")
    return new


@pytest.fixture(scope="module")
def stopped(new_session, machine, prints):
    """A first session on prints, which nine hours end in the middle of Module 1."""
    session = new_session()
    session.attach(machine.source, "ifvit-source")
    session.attach(prints, "fingerprints")
    session.said = session.run(NINE_HOURS_LATER, EXTRA=EXTRA)
    assert session.said.returncode == 0, session.said.stdout
    return session


@pytest.fixture(scope="module")
def hung(new_session, machine):
    """What a session without data set and without time says, whose training is deaf to SIGTERM."""
    session = new_session()
    session.attach(machine.source, "ifvit-source")
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"  # which processes hand on to those they start
    return session.run(deaf, EXTRA=EXTRA, HOURS=0, SPARE_MINUTES=0.01)


def step_of(session: Session) -> int:
    return int(re.search(r"Stopped at step (\d+) of 20", session.said.stdout)[1])


def of(step: int) -> str:
    """A pattern of the checkpoints of a step: the interruption's, and where an epoch has just ended its own too."""
    return rf"dense_reg_(step_{step}|epoch_{step // 2})"


# ---- the file


def test_the_notebook_is_nbformat_4_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] >= 5
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", i) for i in ids)
    for cell in NOTEBOOK["cells"]:
        assert isinstance(cell["metadata"], dict)
        assert isinstance(cell["source"], list) and all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown" and not {"outputs", "execution_count"} & set(cell)


def test_every_code_cell_is_plain_python_and_the_first_holds_the_parameters():
    first, *others = (cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    for cell in (first, *others):
        compile("".join(cell["source"]), cell["id"], "exec")  # a magic is a SyntaxError
    assert first["metadata"]["tags"] == ["parameters"]
    assert not any(cell["metadata"].get("tags") for cell in others)
    assigned: dict = {}
    exec("".join(first["source"]), assigned)
    assert {k: v for k, v in assigned.items() if k.isupper()} == {
        "SOURCE": None,
        "DATASET_ROOTS": None,
        "EXTRA": [],
        "HOURS": 9,
        "SPARE_MINUTES": 20,
    }


# ---- sessions


def test_a_session_trains_on_the_prints_that_are_attached(stopped):
    assert "/kaggle/input/fingerprints: 18 prints of 6 fingers\n" in stopped.said.stdout
    assert "ifvit.train_all --dataset_root /kaggle/input/fingerprints --preset smoke" in stopped.said.stdout
    assert "train_all: dataset_root /kaggle/input/fingerprints; preset smoke" in stopped.said.stdout


def test_a_session_whose_time_is_up_saves_and_says_what_to_do(stopped):
    step, folder = step_of(stopped), "checkpoints/dense_reg"
    assert 2 <= step < 20
    assert checkpoint.load(stopped.working / f"IFViT/{folder}/dense_reg_step_{step}").metadata["step"] == step
    assert not (stopped.working / f"IFViT/{folder}/dense_reg_ckpt").exists()
    told = stopped.said.stdout[stopped.said.stdout.index("The session is over") :]
    assert re.search(rf"^/kaggle/working/IFViT/{folder}/{of(step)}: Module 1, step {step} of 20", told, re.M)
    assert "Add Input" in told and "Save & Run All" in told
    assert {place.name for place in stopped.working.iterdir()} == {"IFViT"}  # and the cache is elsewhere
    assert {place.name for place in (stopped.working / "IFViT").iterdir()} == {"checkpoints"}


def test_the_next_session_goes_on_from_the_output_of_the_one_before_and_finishes(new_session, machine, stopped, prints):
    session = new_session()
    # Kaggle's newer places: nothing may hang on where the inputs lie
    session.attach(machine.source, "datasets/somebody/ifvit-source")
    session.attach(prints, "datasets/somebody/fingerprints")
    output = session.attach(stopped.working, "notebooks/somebody/ifvit")
    pictures = output / "__results___files"  # Kaggle's, of a notebook's own pictures
    pictures.mkdir()
    shutil.copy(next(prints.rglob("*.png")), pictures / "1_1.png")
    older = session.attach(stopped.working, "notebooks/somebody/an-older-version")
    for later in (older / "IFViT/checkpoints/dense_reg").glob("dense_reg_*"):
        if later.name != "dense_reg_epoch_1":
            shutil.rmtree(later)

    said = session.run(EXTRA=EXTRA)
    assert said.returncode == 0, said.stdout
    step = step_of(stopped)
    assert "Copied /kaggle/input/notebooks/somebody/ifvit/IFViT/checkpoints to" in said.stdout
    assert "--dataset_root /kaggle/input/datasets/somebody/fingerprints --preset" in said.stdout
    assert re.search(
        rf"^Going on from /kaggle/working/IFViT/checkpoints/dense_reg/{of(step)}, step {step} of 20$", said.stdout, re.M
    )
    left = session.working / "IFViT/checkpoints"
    for name, epochs in (("dense_reg", EPOCHS), ("matcher", 2)):
        metadata = checkpoint.load(left / name / f"{name}_ckpt").metadata
        assert metadata["finished"] and metadata["epoch"] == epochs
    end = said.stdout[said.stdout.rindex("Evaluation on") :]  # shown again by the last cell
    assert len(re.findall(r"^macro +\d+\.\d\d% ", end, re.M)) == 2
    for picture in re.findall(r"^/kaggle/(.*\.png)$", end, re.M):
        assert (session.kaggle / picture).is_file()
    assert end.count("curves.png\n") == 4  # of each module, in the command's words and in the notebook's


def test_without_a_data_set_prints_are_generated(hung):
    assert "No data set is attached: prints are generated (synthetic).\n" in hung.stdout
    assert "ifvit.train_all --dataset_root synthetic --preset smoke" in hung.stdout


def test_a_training_that_does_not_stop_is_killed_and_the_session_ends_all_the_same(hung):
    assert hung.returncode == 0, hung.stdout
    assert "Stopping: the training saves what it has.\n" in hung.stdout
    assert "The session is over" in hung.stdout and "no checkpoint yet" in hung.stdout


def test_a_mistake_in_the_parameters_ends_the_notebook_with_a_sentence(new_session, machine):
    session = new_session()
    session.attach(machine.source, "ifvit-source")
    said = session.run(EXTRA=["--preset", "tiny"])
    assert said.returncode == 1 and "Error: invalid choice 'tiny'" in said.stdout
    assert said.stdout.splitlines()[-1] == "RuntimeError: The training ended with exit code 2; its last lines say why."


def test_gpus_and_wsq_images_ask_for_their_extras(new_session):
    session = new_session()
    (session.input / "1_1.wsq").touch()
    said = session.run(gpus=2, SOURCE="file:///nowhere/ifvit.zip")
    assert "installing ifvit[cuda,wsq] @ file:///nowhere/ifvit.zip\n" in said.stdout
    assert said.returncode == 1
    assert said.stdout.splitlines()[-1].startswith("RuntimeError: pip could not install ifvit; its last lines say why.")


def test_without_the_source_the_notebook_says_what_to_attach(new_session):
    said = new_session().run()
    assert said.returncode == 1
    assert said.stdout.splitlines()[-1].startswith("RuntimeError: The source of ifvit is not attached: add the project")


@pytest.mark.parametrize(
    "gpu, extra, words",
    [
        (True, [], ["--set", "dense.accumulate=4", "--set", "match.accumulate=4"]),
        (True, ["--set", "dense.num_epochs=20"], ["--set", "dense.accumulate=4", "--set", "match.accumulate=4"]),
        (True, ["--preset", "cpu"], []),
        (True, ["--preset=cpu"], []),
        (True, ["--batch_size", "32"], []),
        (True, ["--set", "dense.accumulate=2"], []),
        (False, [], []),
    ],
)
def test_a_gpu_of_15_gb_gets_the_batch_in_parts(gpu, extra, words):
    cell = ast.parse(next("".join(c["source"]) for c in NOTEBOOK["cells"] if "def fitting" in "".join(c["source"])))
    names = {"has_gpu": lambda: gpu}
    exec(
        compile(
            ast.Module([f for f in cell.body if isinstance(f, ast.FunctionDef) and f.name == "fitting"], []),
            "fitting",
            "exec",
        ),
        names,
    )
    assert names["fitting"](extra) == words
    assert [c.micro_batch for c in train_all.Args(set=tuple(words[1::2])).configs("paper")] == [
        32 if words else 128
    ] * 2
