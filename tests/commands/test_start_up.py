"""A command begins at once: what takes seconds to import is imported where it is used."""

import sys

import pytest

from ifvit import cli
from ifvit.train_dense import Args

HEAVY = {"flax", "grain", "jax", "matplotlib", "optax", "orbax", "pandas", "pyarrow", "ray", "scipy", "tensorboardX"}
COMMANDS = [
    *(f"ifvit.{name}" for name in "train_dense train_match train_all evaluate verify prints tune".split()),
    *(f"ifvit.{name}" for name in "enroll identify gallery export report".split()),
    *("ifvit.load_module1_weights", "ifvit.loftr", "ifvit.loftr export", "ifvit.checkpoint", "tune"),
    *(f"ifvit.checkpoint {word}" for word in "verify inspect diff import export".split()),
    *("ifvit.weights", "ifvit.weights pack"),
]


@pytest.fixture
def imported(process, tmp_path):
    """The packages that a Python imports: imported(*WORDS after `python`) -> their names."""

    def call(*words) -> set[str]:
        said = process("-X", "importtime", *words, cwd=tmp_path)
        assert said.code == 0, said
        lines = [line for line in said.err.splitlines() if line.startswith("import time:")]
        return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}

    return call


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_the_libraries_of_the_work(imported, command):
    found = imported("-m", *command.split(), "--help")
    assert "tyro" in found and not found & HEAVY


@pytest.mark.process
def test_prints_are_compared_without_what_trains_draws_and_writes_checkpoints(imported):
    found = imported("-c", "import ifvit.scoring.scorer")
    assert "jax" in found and not found & {"grain", "matplotlib", "orbax", "ray", "tensorboardX"}


@pytest.mark.parametrize(
    "words, again", [(["--help"], False), (["--batchsize", "4"], False), (["--batch_size", "4"], True)]
)
def test_a_command_is_started_again_for_huge_pages_when_its_flags_are_right(monkeypatch, words, again):
    started = []
    monkeypatch.setattr(cli, "use_huge_pages", lambda: started.append(True))
    monkeypatch.setattr(Args, "run", lambda self: 0)
    monkeypatch.setattr(sys, "argv", ["train_dense", *words])
    if words == ["--help"]:
        with pytest.raises(SystemExit):
            cli.main(Args, Args.command, huge_pages=True)
    else:
        cli.main(Args, Args.command, huge_pages=True)
    assert bool(started) == again
