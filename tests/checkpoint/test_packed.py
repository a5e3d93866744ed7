"""The packaged weights: packed, and read as a checkpoint; what is missing, damaged or of real prints is refused."""

import fnmatch
import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest

from ifvit import checkpoint, weights
from ifvit.errors import CheckpointNotFound, UserError
from ifvit.load_module1_weights import BRANCHES, load_module1_transformer_weights
from ifvit.scoring.scorer import Scorer

ROOT = Path(__file__).parents[2]


@pytest.mark.run
def test_what_is_packed_is_read_to_the_bit(packed, untrained):
    ours, theirs = checkpoint.load("pretrained", "dense_reg"), checkpoint.load(untrained)
    for part in ("params", "batch_stats"):
        assert checkpoint.difference(ours.state[part], theirs.state[part]) == {}
    assert not ours.state["opt_state"] and ours.path == packed / "dense_reg.safetensors"
    for key in ("module", "epoch", "step", "data", "sample", "best", "value"):
        assert ours.metadata[key] == theirs.metadata[key]
    assert checkpoint.load(ours.path).metadata == ours.metadata


def test_the_file_has_dotted_names_and_its_metadata_in_the_header(packed):
    import safetensors

    with safetensors.safe_open(packed / "dense_reg.safetensors", "np") as file:
        assert {n.split(".")[0] for n in file.keys()} == {"params", "batch_stats"}  # noqa: SIM118 (it is no dictionary)
        assert file.get_tensor("params.resnet.stem.conv.kernel").dtype == np.float32
        told = json.loads(file.metadata()["ifvit"])
    assert told["module"] == "dense_reg" and told["config"]["dataset_root"] == ["synthetic"]


def test_nothing_of_the_machine_is_packed(packed, untrained):
    assert str(untrained.parent) in checkpoint.read_metadata(untrained)["config"]["checkpoint_dir"]
    content = (packed / "dense_reg.safetensors").read_bytes() + (packed / "CARD.md").read_bytes()
    assert str(untrained.parent).encode() not in content


def test_the_card_tells_how_the_weights_were_made(packed):
    card = (packed / "CARD.md").read_text()
    found = checkpoint.load("pretrained")
    assert f"| steps | {found.metadata['step']}" in card and found.metadata["digest"] in card
    assert "--config ifvit/weights/recipe.toml" in card and "--set image_size=64" in card and "Apache-2.0" in card


def test_a_scorer_is_made_of_the_package_as_of_the_checkpoint(packed, untrained):
    ours, theirs = (Scorer.from_checkpoint(path) for path in ("pretrained", untrained))
    assert ours.module == "dense_reg" and ours.trained_on == theirs.trained_on
    assert ours.config == theirs.config.replace(checkpoint_dir=ours.config.checkpoint_dir)


@pytest.mark.parametrize(
    "words, told",
    [
        (("verify", "pretrained"), "good  "),
        (("inspect", "pretrained"), "state/params/resnet/stem/conv/kernel"),
        (("export", "pretrained", "out.pkl"), "out.pkl: "),
    ],
)
def test_commands_on_checkpoints_know_the_package(command, packed, tmp_path, words, told):
    said = command("checkpoint", *words, cwd=tmp_path)
    assert said.code == 0 and told in said.out, said


def test_module_2_takes_its_transformer_from_the_package(packed, untrained, capsys):
    transformer = checkpoint.load(untrained).state["params"]["loftr_transformer"]
    found = load_module1_transformer_weights("pretrained", dict.fromkeys(BRANCHES, transformer))
    for branch in BRANCHES:
        assert checkpoint.difference(found[branch], transformer) == {}


def test_an_installation_without_weights_says_so(no_weights):
    with pytest.raises(CheckpointNotFound, match="no packaged weights .*dense_reg.safetensors is missing"):
        checkpoint.load("pretrained")


@pytest.mark.parametrize("at, told", [(-5, "is damaged: 1 of"), (0, "its header"), (40, "its header")])
def test_a_damaged_file_is_told_in_a_sentence(packed, at, told):
    file = packed / "dense_reg.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 0x41
    file.write_bytes(data)
    with pytest.raises(checkpoint.Damaged, match=told):
        checkpoint.load("pretrained")
    file.write_bytes(data[:1000])
    with pytest.raises(checkpoint.Damaged, match="its header"):
        checkpoint.load("pretrained")


def test_weights_of_other_software_are_no_checkpoint(tmp_path):
    import safetensors.numpy

    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        checkpoint.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("dataset_root", ["prints"], "trained on prints of prints;"),
        ("dataset_root", ["synthetic", "prints"], "trained on prints of synthetic, prints;"),
        ("loftr_ckpt", "outdoor_ds.ckpt", "without loftr_ckpt"),
    ],
)
def test_weights_that_saw_anything_but_generated_prints_are_not_packed(
    command, no_weights, untrained, monkeypatch, key, value, told
):
    found = checkpoint.load(untrained)
    found.metadata["config"][key] = value
    monkeypatch.setattr(checkpoint, "load", lambda *_: found)
    said = command("weights", "pack", untrained, cwd=no_weights)
    assert said.code == 2 and told in said.err and said.err.count("\n") == 1, said
    assert not list(no_weights.iterdir())


@pytest.mark.parametrize("root, code", [("prints", 2), ("synthetic", 0)])
def test_weights_that_began_from_others_are_packed_where_those_saw_generated_prints_alone(
    command, no_weights, untrained, monkeypatch, root, code
):
    shutil.copy(ROOT / "ifvit/weights/longer.toml", no_weights)
    found, first = checkpoint.load(untrained), checkpoint.load(untrained)
    found.metadata["config"]["init"], first.metadata["config"]["dataset_root"] = "first", [root]
    monkeypatch.setattr(checkpoint, "load", lambda path, *_: first if path == "first" else found)
    said = command("weights", "pack", untrained, cwd=no_weights)
    assert said.code == code, said
    if code:
        assert "trained on prints of prints;" in said.err and not (no_weights / "CARD.md").exists()
    else:
        card = (no_weights / "CARD.md").read_text()
        assert "--config ifvit/weights/longer.toml" in card and "--set init=first" in card


def test_no_run_goes_on_from_weights_alone(command, packed, tmp_path):
    said = command("train_dense", "--preset", "smoke", "--resume", "pretrained", cwd=tmp_path)
    assert said.code == 2 and "--set init=pretrained" in said.err, said


def test_a_wheel_holds_every_file_beside_the_code():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "ifvit.weights"
    ]
    files = [f.relative_to(ROOT / "ifvit/weights") for f in (ROOT / "ifvit/weights").rglob("*") if f.is_file()]
    files = [str(f) for f in files if f.suffix not in (".py", ".pyc")]
    assert "recipe.toml" in files and not [f for f in files if not any(fnmatch.fnmatch(f, p) for p in patterns)]
    assert all(any(fnmatch.fnmatch(f, p) for p in patterns) for f in (weights.FILE, weights.CARD))
