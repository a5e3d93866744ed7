"""LoFTR's weights, whole or not at all, by whatever names a training has wrapped them in; and back out again."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from torch_files import call, loftr_state, mapping, name, refusal, value, write_safetensors, write_torch

from ifvit import checkpoint, legacy
from ifvit.config import DenseConfig, preset
from ifvit.loftr import load_loftr, loftr_from_transformer, transformer_from_loftr
from ifvit.training.dense import with_loftr


def test_all_80_arrays_arrive_transposed_where_torch_has_out_by_in(tmp_path):
    state = loftr_state()
    path = write_torch(tmp_path / "outdoor_ds.ckpt", state | {"matcher.backbone.conv1.weight": np.ones(3)}, unwrap=True)
    params = transformer_from_loftr(path)
    flat = flatten_dict(params, sep="/")
    assert len(flat) == 80
    assert sum(array.size for array in flat.values()) == 5_251_072
    assert all(array.dtype == np.float32 for array in flat.values())

    coarse = "matcher.loftr_coarse.layers."
    np.testing.assert_array_equal(params["layer_3"]["q_proj"]["kernel"], state[coarse + "3.q_proj.weight"].T)
    np.testing.assert_array_equal(params["layer_7"]["norm2"]["scale"], state[coarse + "7.norm2.weight"])
    np.testing.assert_array_equal(params["layer_0"]["norm1"]["bias"], state[coarse + "0.norm1.bias"])
    assert params["layer_0"]["mlp_2"]["kernel"].shape == (512, 256)

    target = unflatten_dict({key: np.zeros_like(array) for key, array in flat.items()}, sep="/")
    loaded = flatten_dict(load_loftr(path, target), sep="/")
    assert loaded.keys() == flat.keys()
    assert all(np.array_equal(array, flat[key]) for key, array in loaded.items())


@pytest.mark.parametrize("fix, told", [(True, 1), (False, 0)])
def test_the_position_encoding_that_published_weights_want_is_told(tmp_path, capsys, fix, told):
    path = write_torch(tmp_path / "outdoor_ds.ckpt", loftr_state(), unwrap=True)
    target = jax.tree.map(np.zeros_like, transformer_from_loftr(path))
    config = preset("smoke", DenseConfig).replace(loftr_ckpt=str(path), temp_bug_fix=fix)
    with_loftr({"loftr_transformer": target}, config)
    assert capsys.readouterr().out.count("--set temp_bug_fix=false") == told


@pytest.mark.parametrize("prefix", ["matcher.", ""])
def test_there_and_back_again(tmp_path, prefix):
    state = loftr_state(layers=2, width=8, prefix=prefix)
    there = transformer_from_loftr(write_torch(tmp_path / "a.ckpt", state))
    back = loftr_from_transformer(there)
    assert back.keys() == {f"matcher.{key.removeprefix('matcher.')}" for key in state}
    for key, array in state.items():
        np.testing.assert_array_equal(back[f"matcher.{key.removeprefix('matcher.')}"], array)
    again = transformer_from_loftr(write_safetensors(tmp_path / "b.safetensors", back))
    for ours, first in flatten_dict(there, sep="/").items():
        np.testing.assert_array_equal(flatten_dict(again, sep="/")[ours], first)


def test_of_more_layers_the_first_are_taken_and_it_is_said(tmp_path, capsys):
    state = loftr_state(layers=8, width=8)
    path = write_torch(tmp_path / "a.ckpt", state)
    target = transformer_from_loftr(write_torch(tmp_path / "b.ckpt", loftr_state(layers=4, width=8)))
    loaded = load_loftr(path, target)
    assert set(loaded) == {"layer_0", "layer_1", "layer_2", "layer_3"}
    np.testing.assert_array_equal(
        loaded["layer_3"]["mlp_0"]["kernel"], state["matcher.loftr_coarse.layers.3.mlp.0.weight"].T
    )
    said = capsys.readouterr().out
    assert (
        "has 8 encoder layers and the transformer 4: the first 4 were taken" in said
        and "--set transformer_layers=4" in said
    )


def test_each_array_of_a_layer_that_is_left_out_is_checked_all_the_same(tmp_path):
    state = loftr_state(layers=4, width=8)
    del state["matcher.loftr_coarse.layers.3.merge.weight"]
    target = transformer_from_loftr(write_torch(tmp_path / "b.ckpt", loftr_state(layers=2, width=8)))
    assert "layer_3/merge/kernel is missing" in refusal(load_loftr, write_torch(tmp_path / "a.ckpt", state), target)


def test_a_transformer_of_more_layers_takes_no_half(tmp_path):
    path = write_torch(tmp_path / "a.ckpt", loftr_state(layers=4, width=8))
    wide = transformer_from_loftr(write_torch(tmp_path / "b.ckpt", loftr_state(layers=8, width=8)))
    message = refusal(load_loftr, path, wide)
    assert "file has 4 encoder layers, the transformer 8" in message and "--set transformer_layers=2" in message
    assert "layer_7 is not in the file" in message and "layer_3" not in message


def test_every_mismatch_stands_in_the_one_message(tmp_path):
    state = loftr_state(layers=2, width=8)
    target = transformer_from_loftr(write_torch(tmp_path / "a.ckpt", state))
    target["layer_0"]["q_proj"]["bias"] = np.zeros(8)
    target["layer_1"]["merge"]["kernel"] = np.zeros((8, 4))
    del state["matcher.loftr_coarse.layers.1.norm1.bias"]
    state["matcher.loftr_coarse.layers.0.attention.weight"] = np.zeros(3)
    state["matcher.loftr_coarse.module.layers.0.norm1.bias"] = np.zeros(8)
    message = refusal(load_loftr, write_torch(tmp_path / "b.ckpt", state), target)
    assert "layer_0/q_proj/bias is not in the file" in message
    assert "layer_1/merge/kernel is (8, 8) in the file and (8, 4) in the transformer" in message
    assert "layer_1/norm1/bias is not in the file" in message
    assert "matcher.loftr_coarse.layers.0.attention.weight is not one of LoFTR's arrays" in message
    assert "matcher.loftr_coarse.module.layers.0.norm1.bias is there twice" in message
    message = refusal(transformer_from_loftr, tmp_path / "b.ckpt")
    assert "attention.weight" in message and "layer_1/norm1/bias is missing" in message


def test_a_file_without_loftrs_coarse_transformer_is_refused(tmp_path):
    fine = {"matcher.loftr_fine.layers.0.q_proj.weight": np.ones((2, 2), np.float32)}
    assert "holds no LoFTR" in refusal(transformer_from_loftr, write_torch(tmp_path / "a.ckpt", fine))


def test_an_array_that_loftr_has_not_is_not_exported():
    assert "layer_0/q_proj/bias" in refusal(loftr_from_transformer, {"layer_0": {"q_proj": {"bias": np.zeros(2)}}})


PREFIXES = [
    "module.matcher.",
    "_orig_mod.matcher.",
    "matcher._orig_mod.",
    "model.",
    "net.",
    "ema_model.module.",
    "module._orig_mod.model.net.matcher.",
    "my_own_name.",
    "student.backbone.matcher.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("unwrap", [True, False])
def test_the_names_before_loftrs_are_no_matter(tmp_path, prefix, unwrap):
    state = loftr_state(layers=2, width=8, prefix=prefix)
    found = transformer_from_loftr(write_torch(tmp_path / "a.ckpt", state, unwrap=unwrap))
    np.testing.assert_array_equal(
        found["layer_1"]["merge"]["kernel"], state[f"{prefix}loftr_coarse.layers.1.merge.weight"].T
    )
    again = transformer_from_loftr(write_safetensors(tmp_path / "a.safetensors", state))
    np.testing.assert_array_equal(again["layer_1"]["merge"]["kernel"], found["layer_1"]["merge"]["kernel"])


@pytest.mark.parametrize(
    "within",
    [
        "loftr_coarse._orig_mod.layers.{}",
        "loftr_coarse.layers.{}.module",
        "loftr_coarse.layers.{}._fsdp_wrapped_module",
        "loftr_coarse.module.layers.{}._checkpoint_wrapped_module._orig_mod",
    ],
)
def test_wrappers_within_the_transformer_are_no_matter(tmp_path, within):
    plain = loftr_state(layers=2, width=8)
    state = {
        key.replace(f"loftr_coarse.layers.{key.split('.')[3]}", within.format(key.split(".")[3])): x
        for key, x in plain.items()
    }
    found, wanted = (
        flatten_dict(transformer_from_loftr(write_torch(tmp_path / "a.ckpt", s)), sep="/") for s in (state, plain)
    )
    assert found.keys() == wanted.keys() and all(np.array_equal(found[k], wanted[k]) for k in wanted)


def test_what_lightning_saves_beside_the_weights_is_no_matter(tmp_path):
    beside = {
        "callbacks": mapping({"ModelCheckpoint": mapping({"dirpath": call(name("pathlib", "PosixPath"), value("x"))})}),
        "loops": mapping({"fit_loop": call(name("pytorch_lightning.loops.progress", "BatchProgress"))}),
        "hyper_parameters": mapping(
            {
                "config": call(name("yacs.config", "CfgNode")) + value("LR") + value(0.1) + b"s",
                "act": call(name("functools", "partial"), name("torch.nn", "GELU")),
                "stage": call(name("pytorch_lightning.trainer.states", "RunningStage"), value("train")),
            }
        ),
    }
    more = b"".join(value(key) + item for key, item in beside.items())
    state = loftr_state(layers=2, width=8)
    found = transformer_from_loftr(write_torch(tmp_path / "last.ckpt", state, unwrap=True, more=more))
    np.testing.assert_array_equal(
        found["layer_0"]["q_proj"]["kernel"], state["matcher.loftr_coarse.layers.0.q_proj.weight"].T
    )


def test_of_two_transformers_in_a_file_one_is_to_be_chosen(tmp_path):
    one = loftr_state(layers=2, width=8)
    other = {f"ema.{key}": x + 1 for key, x in one.items()}
    path = write_torch(tmp_path / "a.ckpt", one | other, unwrap=True)
    said = refusal(transformer_from_loftr, path)
    assert "state_dict.ema.matcher.loftr_coarse, state_dict.matcher.loftr_coarse" in said
    assert f"--loftr_ckpt '{path}#state_dict.ema.matcher.loftr_coarse'" in said
    for choice, wanted in (("state_dict.ema.matcher.loftr_coarse", other), ("state_dict.matcher", one)):
        found = transformer_from_loftr(f"{path}#{choice}")["layer_0"]["norm2"]["bias"]
        np.testing.assert_array_equal(found, next(x for k, x in wanted.items() if k.endswith("layers.0.norm2.bias")))
    assert "Choose one" in refusal(transformer_from_loftr, f"{path}#elsewhere")


def test_two_transformers_that_are_equal_are_one(tmp_path):
    one = loftr_state(layers=2, width=8)
    path = write_torch(tmp_path / "a.ckpt", one | {f"ema.{key}": x for key, x in one.items()})
    assert set(transformer_from_loftr(path)) == {"layer_0", "layer_1"}


@pytest.mark.parametrize(
    "wrong, why", [(np.full((8,), np.nan, np.float32), "not finite"), (np.zeros((8,), np.int8), "is of type int8")]
)
def test_arrays_that_are_no_weights_are_named(tmp_path, wrong, why):
    state = loftr_state(layers=2, width=8) | {"matcher.loftr_coarse.layers.1.norm1.weight": wrong}
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    assert f"layer_1/norm1/scale {'has values that are ' if why == 'not finite' else ''}{why}" in refusal(
        transformer_from_loftr, tmp_path / "a.safetensors"
    )


# ---- back out, by a command


def saved(path, module="dense_reg"):
    params = {
        "loftr_transformer": transformer_from_loftr(write_torch(path / "in.ckpt", loftr_state(layers=2, width=8)))
    }
    checkpoint.save(path / "ours", module, {"params": params}, {"epoch": 1, "config": {"temp_bug_fix": False}})
    return path / "ours"


def test_module_1s_transformer_goes_out_under_loftrs_names(tmp_path, command):
    said = command("loftr", "export", saved(tmp_path), "out.safetensors", cwd=tmp_path)
    assert said.code == 0 and "20 arrays" in said.out and "temp_bug_fix=False" in said.out, said
    found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    state = loftr_state(layers=2, width=8)
    assert found.keys() == state.keys() and all(np.array_equal(found[key], x) for key, x in state.items())
    said = command("loftr", "export", "ours", "out.safetensors", cwd=tmp_path)
    assert said.code == 2 and "is there already" in said.err


def test_a_pickles_transformer_goes_out_too(tmp_path, command):
    params = {
        "loftr_transformer": transformer_from_loftr(write_torch(tmp_path / "in.ckpt", loftr_state(layers=2, width=8)))
    }
    legacy.write(tmp_path / "old.pkl", {"params": params}, {}, None)
    assert command("loftr", "export", "old.pkl", "out.safetensors", cwd=tmp_path).code == 0
    assert set(transformer_from_loftr(tmp_path / "out.safetensors")) == {"layer_0", "layer_1"}


@pytest.mark.parametrize(
    "to, why", [("out.ckpt", "does not end in .safetensors"), ("in.ckpt/out.safetensors", "Cannot write")]
)
def test_an_export_that_cannot_be_written_is_a_sentence(tmp_path, command, to, why):
    said = command("loftr", "export", saved(tmp_path), to, cwd=tmp_path)
    assert said.code == 2 and why in said.err and "Traceback" not in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.ckpt", "ours"]


def test_an_export_of_what_is_not_there_is_a_sentence(tmp_path, command):
    said = command("loftr", "export", "nowhere", "out.safetensors", cwd=tmp_path)
    assert said.code == 2 and said.err.startswith("Error: Checkpoint not found: nowhere")
