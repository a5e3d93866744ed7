"""Module 2 begins with the transformer of Module 1, of which no more is read than it takes; or it is said why not."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import layouts
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import serialization
from guide import LOG

from ifvit import checkpoint, legacy
from ifvit.config import DenseConfig, MatchConfig, preset
from ifvit.errors import CheckpointNotFound, UserError
from ifvit.load_module1_weights import BRANCHES, check_module1, load_module1_transformer_weights, verify_module1_loading
from ifvit.models.networks import dense_network
from ifvit.training.match import checkpoint_of_module1
from ifvit.training.state import init_state, optimizer

WIDTH, LAYERS = 64, 2 * 2  # self and cross
CONFIG = preset("smoke", DenseConfig).replace(
    transformer_width=WIDTH, transformer_heads=4, transformer_layers=LAYERS // 2
)
PARAMETERS = LAYERS * (10 * WIDTH**2 + 4 * WIDTH)  # as test_guide counts them
KERNEL = "loftr_transformer/layer_3/mlp_2/kernel"


def drawn(tree, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), tree)


@pytest.fixture(scope="module")
def state():
    """Module 1's, moments and all, as a checkpoint has it."""
    tx = optimizer(CONFIG, 0.0)
    net = dense_network(CONFIG)
    made = drawn(jax.eval_shape(lambda: init_state(net, tx, 0)))
    return layouts.saved_tree(made, layouts.TASK) | {"step": np.int32(7)}


@pytest.fixture(scope="module")
def transformer(state):
    return state["params"]["loftr_transformer"]


@pytest.fixture(scope="module")
def good(state, tmp_path_factory):
    """Module 1's checkpoint; not to be touched."""
    path = tmp_path_factory.mktemp("module1") / "dense_reg_ckpt"
    checkpoint.save(path, "dense_reg", state, {"epoch": 2, "config": CONFIG.to_dict()})
    return path


@pytest.fixture
def module2(transformer):
    """Parameters of Module 2 as they are before."""
    return {b: drawn(transformer, 1 + n) for n, b in enumerate(BRANCHES)} | {"head_global": {"kernel": np.ones((2, 3))}}


def equal(a, b) -> bool:
    return checkpoint.difference(a, b) == {}


def flip(folder: Path, array: np.ndarray) -> None:
    """One bit of an array, where it lies on disk."""
    raw = array.tobytes()
    (file,) = (p for p in (folder / "state").rglob("*") if p.is_file() and raw in p.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(raw) + len(raw) // 2] ^= 1
    file.write_bytes(data)


@pytest.fixture
def own(state, tmp_path):
    """The same checkpoint, to be harmed."""
    checkpoint.save(tmp_path / "own", "dense_reg", state, {"epoch": 2, "config": CONFIG.to_dict()})
    return tmp_path / "own"


# ---- what is loaded


@pytest.mark.parametrize("share", [True, False])
def test_both_branches_get_it_to_the_bit_and_nothing_else_changes(good, module2, transformer, share):
    before = jax.tree.map(np.copy, module2)
    after = load_module1_transformer_weights(str(good), module2, share)
    assert all(equal(after[b], transformer) for b in BRANCHES)
    assert after["head_global"] is module2["head_global"] and set(after) == set(module2)
    assert equal(module2, before)


def test_branches_that_share_nothing_are_copies_that_change_apart(good, module2, transformer):
    one, other = (load_module1_transformer_weights(str(good), module2, False)[b] for b in BRANCHES)
    for x in jax.tree.leaves(one):
        x[:] = 0
    assert equal(other, transformer)


@pytest.mark.parametrize("name", ["{}", "{}.pkl", "{}/"])
@pytest.mark.parametrize("absolute", [True, False])
def test_the_path_may_end_in_pkl_and_be_relative(good, module2, transformer, monkeypatch, name, absolute):
    monkeypatch.chdir(good.parent)
    path = name.format(good if absolute else f"./{good.name}")
    assert equal(load_module1_transformer_weights(path, module2)[BRANCHES[0]], transformer)


def test_what_is_printed_is_the_guides_block(good, module2, capsys):
    load_module1_transformer_weights(f"{good}.pkl", module2)
    assert capsys.readouterr().out == LOG.format(source=f"{good}.pkl", count=f"{PARAMETERS:,}")


def test_the_check_says_that_it_can_serve(good, capsys):
    assert verify_module1_loading(str(good))
    assert f"✓ 40 arrays, {PARAMETERS:,} parameters, every digest right" in capsys.readouterr().out


@pytest.mark.parametrize("share", [True, False])
def test_no_more_is_read_than_the_transformer_and_the_names(good, module2, transformer, share, capsys):
    def read() -> int:
        found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(v["value"] for m in found for v in m["values"])

    before = read()
    load_module1_transformer_weights(str(good), module2, share)
    metadata = (good / "metadata/metadata").stat().st_size  # not by TensorStore
    assert read() - before + metadata < 1.2 * sum(x.nbytes for x in jax.tree.leaves(transformer))


@pytest.mark.process
def test_arrays_come_to_lie_where_module_2s_did(good):
    ended = subprocess.run(
        [sys.executable, layouts.__file__, "seed", good],
        text=True,
        capture_output=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    said = json.loads(ended.stdout.splitlines()[-1])
    assert said["split"] == 2 * LAYERS * 6  # every linear map, in both branches
    assert said["wrong"] == {"True": [], "False": []}


# ---- what is refused


@pytest.mark.parametrize("url", ["s3://bucket/dense_reg_ckpt", "https://host/dense_reg_ckpt.pkl"])
def test_other_stores_are_refused_in_a_sentence(module2, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load_module1_transformer_weights(url, module2)
    sentence = f"{url}: {url.split(':')[0]}:// is not supported; checkpoints are local directories or gs:// URLs."
    assert str(refused.value) == sentence
    assert not verify_module1_loading(url)
    assert f"✗ {sentence}\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_every_mismatch_is_listed_and_nothing_is_loaded(good, module2):
    one, other = (module2[b] for b in BRANCHES)
    one["layer_0"]["q_proj"]["kernel"] = np.zeros((WIDTH, 32))
    del one["layer_2"]["norm1"]["bias"]
    other["layer_9"] = {"merge": {"kernel": np.zeros((3, 4))}}
    before = jax.tree.map(np.copy, module2)
    with pytest.raises(UserError) as refused:
        load_module1_transformer_weights(str(good), module2)
    listed = (
        str(refused.value).removeprefix("Module 1's transformer does not fit Module 2: ").split(". Give")[0].split("; ")
    )
    assert sorted(listed) == [
        "loftr_transformer_global/layer_0/q_proj/kernel: (64, 64) in Module 1, (64, 32) in Module 2",
        "loftr_transformer_global/layer_2/norm1/bias: (64,) in Module 1, missing in Module 2",
        "loftr_transformer_local/layer_9/merge/kernel: missing in Module 1, (3, 4) in Module 2",
    ]
    assert equal(module2, before)


def test_a_damaged_leaf_of_the_transformer_is_refused_by_name(own, transformer, module2, capsys):
    flip(own, transformer["layer_3"]["mlp_2"]["kernel"])
    with pytest.raises(UserError, match=f"is damaged: 1 of 40 leaves, e.g. state/params/{KERNEL} "):
        load_module1_transformer_weights(str(own), module2)
    assert not verify_module1_loading(str(own))
    assert f"state/params/{KERNEL}" in capsys.readouterr().out


def test_damage_to_what_is_not_needed_does_not_matter(own, state, transformer, module2):
    moments = checkpoint.leaves(state["opt_state"])
    flip(own, next(x for n, x in moments.items() if n.endswith(f"mu/{KERNEL}")))
    with pytest.raises(UserError, match="1 of .* leaves, e.g. state/opt_state/.*/mu/"):
        checkpoint.load(own)
    assert equal(load_module1_transformer_weights(str(own), module2)[BRANCHES[0]], transformer)


# ---- pickles


def original(transformer: dict) -> dict:
    """As the original's code (flax linen) has it: layers of its own for each print, biases, dots in names."""
    layers = {}
    for i in range(LAYERS):
        for p in range(2):
            layer = {
                n.replace("_", ".") if n.startswith("mlp") else n: dict(leaves)
                for n, leaves in transformer[f"layer_{i}"].items()
            }
            for leaves in layer.values():
                if "kernel" in leaves:
                    leaves["bias"] = np.full(leaves["kernel"].shape[1], 0.5, np.float32)
            layers[f"layers.{i}.{p}"] = jax.tree.map(lambda x: x + np.float32(p), layer)
    return {"loftr_transformer": layers}


def test_a_pickle_of_the_original_seeds_module_2_and_what_was_left_out_is_said(transformer, module2, tmp_path, capsys):
    file = tmp_path / "dense_reg_ckpt.pkl"
    saved = {
        "state": {"params": original(transformer), "opt_state": {}, "step": 5},
        "metadata": {"epoch": 1, "config": {}},
        "timestamp": "2025-01-01T00:00:00",
    }
    file.write_bytes(pickle.dumps(saved))
    after = load_module1_transformer_weights(str(file), module2)
    assert all(equal(after[b], transformer) for b in BRANCHES)  # print 0's
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("⚠ ")]
    assert len(notes) == 3
    assert f"{2 * LAYERS * 6} biases" in notes[0] and "left out; their largest value is 1.5" in notes[0]
    assert "print 0's were taken" in notes[1] and "not the same function" in notes[2]
    assert verify_module1_loading(str(file))
    assert f"✓ 40 arrays, {PARAMETERS:,} parameters, without digests" in capsys.readouterr().out


@pytest.mark.run
def test_a_checkpoint_that_goes_out_as_a_pickle_and_comes_back_is_equal(command, good, tmp_path):
    file, back = tmp_path / "dense_reg_ckpt.pkl", tmp_path / "back"
    for words in (["export", good, file], ["import", file, back], ["diff", good, back]):
        said = command("checkpoint", *words, cwd=tmp_path)
        assert (said.code, said.err) == (0, ""), said
    assert "equal to the bit" in said.out
    ours, theirs = (checkpoint.load(p).metadata for p in (good, back))
    assert {k: theirs[k] for k in ("epoch", "config", "module", "timestamp")} == {
        k: ours[k] for k in ("epoch", "config", "module", "timestamp")
    }


@pytest.mark.run
def test_a_matcher_takes_its_aligner_along(command, state, tmp_path):
    aligner = {k: state[k] for k in ("params", "batch_stats")}
    matcher = {"params": dict.fromkeys(BRANCHES, aligner["params"]), "step": np.int32(1)}
    checkpoint.save(
        tmp_path / "matcher",
        "matcher",
        matcher,
        {"epoch": 1, "config": preset("smoke", MatchConfig).to_dict()},
        aligner,
    )
    for words in (["export", "matcher", "matcher.pkl"], ["import", "matcher.pkl", "back"], ["diff", "matcher", "back"]):
        said = command("checkpoint", *words, cwd=tmp_path)
        assert said.code == 0, said
    found = checkpoint.load(tmp_path / "back", "matcher")
    assert equal(found.aligner, aligner)


def test_a_file_that_went_out_is_the_guides_for_anyone_who_unpickles_it(command, good, state, tmp_path):
    said = command("checkpoint", "export", good, "out.pkl", cwd=tmp_path)
    assert said.code == 0, said
    anyone = """
import json, pickle, sys
d = pickle.load(open("out.pkl", "rb"))
assert not {"ifvit", "jax"} & set(sys.modules)
print(json.dumps([sorted(d), sorted(d["state"]), d["metadata"], d["timestamp"], int(d["state"]["step"])]))"""
    ended = subprocess.run([sys.executable, "-c", anyone], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    names, parts, metadata, timestamp, step = json.loads(ended.stdout)
    assert names == ["metadata", "state", "timestamp"] and {"params", "opt_state", "step"} <= set(parts)
    assert metadata["epoch"] == 2 and metadata["config"] == CONFIG.to_dict() and step == 7
    assert timestamp == checkpoint.load(good).metadata["timestamp"]
    with open(tmp_path / "out.pkl", "rb") as file:
        assert equal(pickle.load(file)["state"]["params"], state["params"])


def test_importing_over_something_is_a_mistake(command, good, tmp_path):
    legacy.write(tmp_path / "a.pkl", {"params": {"w": np.ones(1)}}, {}, None)
    said = command("checkpoint", "import", "a.pkl", good, cwd=tmp_path)
    assert said.code == 2 and "is there already" in said.err


# ---- checkpoints that Orbax wrote without us


@pytest.fixture(params=[True, False], ids=["ocdbt", "a file a leaf"])
def plain(request, state, tmp_path):
    """Module 1 as any program with Orbax and optax would save it."""
    theirs = {"params": state["params"], "opt_state": optax.adamw(1e-3).init(state["params"]), "step": 7}
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(use_ocdbt=request.param), metadata=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as writer:
        writer.save(
            tmp_path / "plain",
            ocp.args.Composite(
                state=ocp.args.StandardSave(theirs),
                metadata=ocp.args.JsonSave({"epoch": 4, "config": {"lr": 0.1}, "timestamp": "2025-01-01T00:00:00"}),
            ),
        )
    assert (tmp_path / "plain/state/manifest.ocdbt").exists() == request.param
    return tmp_path / "plain"


def test_a_checkpoint_without_digests_is_read_with_a_warning(plain, state, capsys):
    found = checkpoint.load(plain, "dense_reg")
    assert "no digests" in capsys.readouterr().out
    assert equal(found.state["params"], state["params"]) and int(found.state["step"]) == 7
    moments = serialization.to_state_dict(optax.adamw(1e-3).init(state["params"]))["0"]
    assert equal(found.state["opt_state"]["0"], moments)  # named by place, as ours
    assert found.metadata["epoch"] == 4 and found.metadata["config"] == {"lr": 0.1}


def test_it_seeds_module_2(plain, transformer, module2, capsys):
    assert equal(load_module1_transformer_weights(str(plain), module2)[BRANCHES[1]], transformer)
    assert "no digests" in capsys.readouterr().out
    assert verify_module1_loading(str(plain))
    assert f"✓ 40 arrays, {PARAMETERS:,} parameters, without digests" in capsys.readouterr().out


def test_the_commands_say_that_it_is_not_checked(command, plain, tmp_path):
    said = command("checkpoint", "verify", plain, cwd=tmp_path)
    assert said.code == 0 and "no digests: not checked" in said.out
    said = command("checkpoint", "inspect", plain, cwd=tmp_path)
    assert said.code == 0 and f"state/params/{KERNEL}" in said.out


def test_of_another_configuration_it_aligns_no_pairs(plain, capsys):
    config = preset("smoke", MatchConfig).replace(dense_reg_ckpt=str(plain))
    assert checkpoint_of_module1(config) is None
    assert "made by other code" in capsys.readouterr().out


def test_a_checkpoint_that_is_missing_is_told_apart_by_its_errors_class_not_by_its_text(tmp_path):
    with pytest.raises(CheckpointNotFound, match="^Module 1 checkpoint not found: .*nowhere; train Module 1 first"):
        check_module1(str(tmp_path / "nowhere"))
    (tmp_path / "not found.pkl").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="is truncated, corrupt or no pickle") as caught:
        check_module1(str(tmp_path / "not found.pkl"))
    assert not isinstance(caught.value, CheckpointNotFound)
