"""Checkpoints and pickles that other software has made, or that are damaged: sound ones are used, others refused."""

import os
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ifvit import checkpoint
from ifvit.checkpoint.places import replace
from ifvit.config import DenseConfig, preset
from ifvit.errors import UserError
from ifvit.load_module1_weights import BRANCHES, load_module1_transformer_weights, verify_module1_loading

WIDTH = 16
SHAPES = {"q_proj": (1, 1), "k_proj": (1, 1), "v_proj": (1, 1), "merge": (1, 1), "mlp_0": (2, 2), "mlp_2": (2, 1)}


def layers(dtype=np.float32, layer: str = "layer_{}") -> dict:
    """A transformer of LoFTR's layers, one pair of self and cross."""
    rng = np.random.default_rng(0)
    made = {
        module: {"kernel": rng.standard_normal([WIDTH * n for n in shape]).astype(np.float32)}
        for module, shape in SHAPES.items()
    }
    made |= {
        norm: {"scale": np.ones(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)} for norm in ("norm1", "norm2")
    }
    return {
        layer.format(n): {m: {k: x.astype(dtype) for k, x in leaf.items()} for m, leaf in made.items()} for n in (0, 1)
    }


PARAMS = {"loftr_transformer": layers()}
MODULE2 = {branch: layers() for branch in BRANCHES}


def by_orbax(path, params: dict, metadata: dict | None = None, **how):
    """What Orbax's own writer leaves."""
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(**how), metadata=ocp.JsonCheckpointHandler())
    ) as to:
        to.save(
            path,
            ocp.args.Composite(
                state=ocp.args.PyTreeSave({"params": params}),
                metadata=ocp.args.JsonSave({"epoch": 4, "config": {"lr": 0.1}} | (metadata or {})),
            ),
        )
    return path


def sentence(said, *words: str) -> None:
    assert said.code == 2 and said.err.startswith("Error: ") and said.err.count("\n") == 1, said
    assert "Traceback" not in said.err and all(w in said.err for w in words), said.err


# ---- Orbax's own


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("zarr3", [True, False])
def test_what_orbax_writes_is_read_zeros_too(tmp_path, ocdbt, zarr3):
    path = by_orbax(tmp_path / "theirs", PARAMS, use_ocdbt=ocdbt, use_zarr3=zarr3)
    assert checkpoint.difference(checkpoint.load(path).state["params"], PARAMS) == {}
    assert verify_module1_loading(str(path))
    found = load_module1_transformer_weights(str(path), MODULE2)
    assert checkpoint.difference(found[BRANCHES[0]], PARAMS["loftr_transformer"]) == {}


@pytest.mark.parametrize("zarr3", [True, False])
def test_a_chunk_that_is_missing_is_no_zeros(tmp_path, command, zarr3):
    path = by_orbax(tmp_path / "theirs", PARAMS, use_ocdbt=False, use_zarr3=zarr3)
    leaf = path / "state/params.loftr_transformer.layer_0.q_proj.kernel"
    shutil.rmtree(leaf / "c") if zarr3 else (leaf / "0.0").unlink()
    assert not verify_module1_loading(str(path))
    with pytest.raises(UserError, match="layer_0/q_proj/kernel"):
        load_module1_transformer_weights(str(path), MODULE2)
    said = command("checkpoint", "verify", path, cwd=tmp_path)
    assert said.code == 1 and "BAD" in said.out


def test_other_types_become_float32_and_it_is_said(tmp_path, capsys):
    path = by_orbax(tmp_path / "half", {"loftr_transformer": layers(jnp.bfloat16)})
    found = load_module1_transformer_weights(str(path), MODULE2)
    assert {x.dtype.name for x in checkpoint.leaves(found).values()} == {"float32"}
    assert "was converted to float32 from bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "params, why",
    [
        ({"loftr_transformer": layers(np.int32)}, "is of type int32"),
        (
            {
                "loftr_transformer": {
                    k: {m: {n: np.full_like(x, np.nan) for n, x in p.items()} for m, p in v.items()}
                    for k, v in layers().items()
                }
            },
            "not finite",
        ),
        (
            {"loftr_transformer": {"self_attn_0_layer_0": {"kernel": np.ones((4, 4), np.float32)}}},
            "another architecture",
        ),
        ({"loftr_transformer": np.ones((4, 4), np.float32)}, "no layers"),
        ({"dense": {"kernel": np.ones((4, 4), np.float32)}}, "No transformer found"),
    ],
)
def test_what_cannot_seed_module_2_is_refused_by_the_check_too(tmp_path, params, why, capsys):
    path = by_orbax(tmp_path / "theirs", params)
    assert not verify_module1_loading(str(path))
    assert why in capsys.readouterr().out
    with pytest.raises(UserError, match=why):
        load_module1_transformer_weights(str(path), MODULE2)


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": None},
        {"module": ["x"]},
        {"history": 5},
        {"history": [1], "epoch": "two", "step": [1]},
        {"best": 3, "value": "good", "note": "\x1b[2J"},
    ],
)
def test_what_others_say_of_a_checkpoint_does_not_lead_astray(tmp_path, command, metadata):
    path = by_orbax(tmp_path / "theirs", PARAMS, metadata)
    for words in (
        ("inspect", path),
        ("verify", path),
        ("export", path, "out.pkl"),
        ("inspect", "out.pkl"),
        ("verify", "out.pkl"),
    ):
        said = command("checkpoint", *words, cwd=tmp_path)
        assert said.code == 0 and "\x1b" not in said.out, said


def test_a_run_does_not_go_on_from_what_nothing_can_check(module1, prints, command, tmp_path):
    found = checkpoint.load(module1.path)
    config = preset("smoke", DenseConfig).to_dict()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as to:
        to.save(
            tmp_path / "theirs",
            ocp.args.Composite(
                state=ocp.args.PyTreeSave(found.state), metadata=ocp.args.JsonSave({"epoch": 1, "config": config})
            ),
        )
    said = command(
        "train_dense", "--dataset_root", prints, "--preset", "smoke", "--resume", tmp_path / "theirs", cwd=tmp_path
    )
    sentence(said, "has no digests")


# ---- pickles


def pickled(path, state: dict, metadata: dict | None = None):
    path.write_bytes(pickle.dumps({"state": state, "metadata": metadata or {}, "timestamp": "2025-01-01T00:00:00"}, 4))
    return path


def test_a_pickle_is_inspected_and_verified(tmp_path, command):
    pickled(tmp_path / "theirs.pkl", {"params": PARAMS, "step": 3}, {"digests": 5, "shardings": 5, "history": [1]})
    said = command("checkpoint", "inspect", "theirs.pkl", cwd=tmp_path)
    assert said.code == 0 and "21 leaves" in said.out, said
    said = command("checkpoint", "verify", "theirs.pkl", cwd=tmp_path)
    assert said.code == 0 and "no digests: not checked" in said.out, said


@pytest.mark.parametrize(
    "part",
    [
        {"step": np.array([3, 3])},
        {"step": {"a": np.ones(2)}},
        {"step": float("nan")},
        {"opt_state": np.ones(3)},
        {"params": np.ones(3)},
        {"batch_stats": np.ones(3)},
        {"aligner": np.ones(3)},
    ],
)
def test_a_state_of_another_form_is_told(tmp_path, command, part):
    pickled(tmp_path / "theirs.pkl", {"params": PARAMS} | part)
    for words in (("import", "theirs.pkl", "out"), ("inspect", "theirs.pkl"), ("verify", "theirs.pkl")):
        said = command("checkpoint", *words, cwd=tmp_path)
        assert next(iter(part)) in said.err + said.out and "Traceback" not in said.err, said
        assert said.code == (1 if words[0] == "verify" else 2), said
    assert not verify_module1_loading(str(tmp_path / "theirs.pkl")) or "params" not in part
    sentence(
        command("train_match", "--preset", "smoke", "--pretrained_ckpt", "theirs.pkl", cwd=tmp_path), next(iter(part))
    )


def test_a_pickle_comes_back_as_it_was_its_optimiser_too(tmp_path, command):
    moments = optax.adamw(1e-3).init(PARAMS)
    pickled(tmp_path / "theirs.pkl", {"params": PARAMS, "opt_state": moments, "step": 7})
    for words in (("import", "theirs.pkl", "ours"), ("export", "ours", "back.pkl"), ("diff", "theirs.pkl", "back.pkl")):
        said = command("checkpoint", *words, cwd=tmp_path)
        assert said.code == 0, said
    assert "equal to the bit" in said.out
    assert any(n.startswith("opt_state/") for n in checkpoint.leaves(checkpoint.load(tmp_path / "back.pkl").state))


def test_parameters_of_anything_are_imported_and_exported(tmp_path, command):
    pickled(tmp_path / "theirs.pickle", {"params": {"dense": {"kernel": np.ones((2, 3), np.float32)}}})
    said = command("checkpoint", "import", "theirs.pickle", "ours.pkl", cwd=tmp_path)
    assert said.code == 0 and "cannot seed Module 2" in said.out, said
    said = command("checkpoint", "verify", "ours.pkl", cwd=tmp_path)
    assert said.code == 0 and "good" in said.out, said
    said = command("checkpoint", "export", "ours", "back.pkl", cwd=tmp_path)
    assert said.code == 0, said


@pytest.mark.parametrize(
    "extra, told",
    [
        ({"a.b": np.ones(2, np.float32), "a": {"b": np.zeros(2, np.float32)}}, "are one name on the disk"),
        ({"none": np.ones((0, 3), np.float32)}, "an array without elements"),
        ({"odd": np.ones(4, jnp.float8_e4m3)}, "Cannot write"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named(tmp_path, command, extra, told):
    pickled(tmp_path / "theirs.pkl", {"params": PARAMS | extra})
    sentence(command("checkpoint", "import", "theirs.pkl", "ours", cwd=tmp_path), told)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("to", ["file/x", "n" * 300, "/proc/x", "back\\s"])
def test_an_import_that_cannot_be_written_says_why(tmp_path, command, to):
    (tmp_path / "file").write_text("")
    pickled(tmp_path / "theirs.pkl", {"params": PARAMS})
    sentence(command("checkpoint", "import", "theirs.pkl", to, cwd=tmp_path), "annot write")


# ---- trees of checkpoints, and links


def test_verify_of_a_tree_misses_nothing_and_ends(tmp_path, command):
    good = tmp_path / "run/dense_reg_ckpt"
    checkpoint.save(good, "dense_reg", {"params": {"w": np.ones(2, np.float32)}}, {"epoch": 1, "config": {}})
    shutil.copytree(good, tmp_path / "run/dense_reg_epoch_1.damaged")
    os.symlink(tmp_path, tmp_path / "run/loop")
    said = command("checkpoint", "verify", tmp_path, cwd=tmp_path)
    assert said.code == 0 and said.out.count("good ") == 1 and "aside " in said.out, said
    (tmp_path / "run/dense_reg_epoch_5").mkdir()
    (tmp_path / "run/some/aligner").mkdir(parents=True)
    said = command("checkpoint", "verify", tmp_path, cwd=tmp_path)
    assert said.code == 1 and said.out.count("BAD ") == 2 and "dense_reg_epoch_5" in said.out, said


def test_a_checkpoint_that_was_moved_and_linked_is_replaced_as_any_other(tmp_path):
    state, meta = {"params": {"w": np.ones(2, np.float32)}}, {"epoch": 1, "config": {}}
    here, there = tmp_path / "dense_reg_ckpt", tmp_path / "elsewhere/dense_reg_ckpt"
    checkpoint.save(there, "dense_reg", state, meta)
    os.symlink(there, here)
    for epoch in (2, 3):
        checkpoint.save(here, "dense_reg", state, meta | {"epoch": epoch})
        assert checkpoint.load(here).metadata["epoch"] == epoch
    assert checkpoint.load(there).metadata["epoch"] == 1  # what was linked to is not touched
    assert replace and sorted(p.name for p in tmp_path.iterdir()) == ["dense_reg_ckpt", "elsewhere"]
