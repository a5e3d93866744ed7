"""The commands, paths, log lines and snippets of the checkpoint guide, as printed there.

Only `python ifvit-jax/X.py` has become `python -m ifvit.X`, and the modules' names `ifvit.…`; /path/to/data and
/kaggle/… are temporary directories, and `--preset smoke` is added.
"""

import datetime
import re
import shlex

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from guide import LOG

from ifvit import checkpoint, paths
from ifvit.config import DENSE_CONFIG, MATCH_CONFIG
from ifvit.errors import UserError
from ifvit.load_module1_weights import load_module1_transformer_weights, verify_module1_loading
from ifvit.training.metrics import read_rows

# What the guide says that `train_match` logs. Its X,XXX,XXX is the number of the transformer's parameters. A layer of
# LoFTR of width C has query, key, value and merge (4 C²), two linear maps without bias (2C·2C + 2C·C) and two norms
# (4 C); preset smoke has one self and one cross layer of width 16.
PARAMETERS = 2 * (10 * 16**2 + 4 * 16)

TRAIN_DENSE = """python -m ifvit.train_dense \
    --dataset_root /path/to/data \
    --checkpoint_dir ./checkpoints/dense_reg \
    --batch_size 128 \
    --num_epochs 100"""
TRAIN_MATCH = """python -m ifvit.train_match \
    --dataset_root /path/to/data \
    --pretrained_ckpt ./checkpoints/dense_reg/dense_reg_ckpt.pkl \
    --checkpoint_dir ./checkpoints/matcher \
    --num_classes 100 \
    --batch_size 128 \
    --num_epochs 70"""
TRAIN_MATCH_BY_CONFIG = """python -m ifvit.train_match \
    --dataset_root /path/to/data \
    --checkpoint_dir ./checkpoints/matcher \
    --num_classes 100"""
TRAIN_MATCH_CUSTOM = "python -m ifvit.train_match --pretrained_ckpt /custom/path/to/dense_reg_ckpt.pkl"
TRAIN_MATCH_ABSOLUTE = """python -m ifvit.train_match \
    --pretrained_ckpt $(pwd)/checkpoints/dense_reg/dense_reg_ckpt.pkl"""
VERIFY = """python -m ifvit.load_module1_weights \
    --module1_ckpt ./checkpoints/dense_reg/dense_reg_ckpt.pkl"""
VERIFY_SNIPPET = """
from ifvit.load_module1_weights import verify_module1_loading
verify_module1_loading('./checkpoints/dense_reg/dense_reg_ckpt.pkl')
"""
KAGGLE_TRAIN_DENSE = """python -m ifvit.train_dense \
    --dataset_root /kaggle/input/fvc2002 \
    --checkpoint_dir /kaggle/working/IFViT/checkpoints/dense_reg"""
KAGGLE_TRAIN_MATCH = """python -m ifvit.train_match \
    --dataset_root /kaggle/input/fvc2002 \
    --pretrained_ckpt /kaggle/working/IFViT/checkpoints/dense_reg/dense_reg_ckpt.pkl \
    --checkpoint_dir /kaggle/working/IFViT/checkpoints/matcher \
    --num_classes 100"""
KAGGLE_TRAIN_MATCH_BY_CONFIG = """python -m ifvit.train_match \
    --dataset_root /kaggle/input/fvc2002 \
    --checkpoint_dir /kaggle/working/IFViT/checkpoints/matcher \
    --num_classes 100"""


def words(printed: str, **places) -> list[str]:
    """A printed command as (name, *words), its places replaced, at preset smoke."""
    for place, path in places.items():
        printed = printed.replace(
            {
                "data": "/path/to/data",
                "custom": "/custom/path/to",
                "pwd": "$(pwd)",
                "input": "/kaggle/input",
                "working": "/kaggle/working",
            }[place],
            str(path),
        )
    python, dash_m, module, *rest = shlex.split(printed)
    assert (python, dash_m) == ("python", "-m")
    return [module.removeprefix("ifvit."), *rest, "--preset", "smoke"]


def directories(folder) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_dir()} - {"tensorboard"}


def equal(a: dict, b: dict) -> bool:
    return checkpoint.difference(a, b) == {}


# ---- Module 1


def test_module_1_leaves_the_guides_files(module1):
    assert directories(module1.folder) == {"dense_reg_epoch_1", "dense_reg_epoch_2", "dense_reg_best", "dense_reg_ckpt"}


def test_the_final_checkpoint_is_what_the_command_names_last(module1):
    assert str(module1.path) in module1.said.out.splitlines()[-1]


def test_a_checkpoint_is_an_orbax_directory_with_the_guides_structure(module1):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore(module1.path / "state")
    assert set(state) == {"params", "batch_stats", "opt_state", "step"}
    assert int(state["step"]) == 2 * (8 // 4)  # epochs × (pairs an epoch / pairs a step)
    assert {"resnet", "loftr_transformer"} <= set(state["params"])


def test_metadata_tell_epoch_config_and_time_with_zone(module1):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        metadata = reader.restore(module1.path, ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
    assert metadata["epoch"] == 2
    assert metadata["config"]["batch_size"] == 4
    assert metadata["config"]["checkpoint_dir"] == "./checkpoints/dense_reg"
    written = datetime.datetime.fromisoformat(metadata["timestamp"])
    assert abs(datetime.datetime.now(datetime.UTC) - written) < datetime.timedelta(hours=1)  # needs the zone
    assert set(metadata["digests"]) == set(checkpoint.leaves(checkpoint.load(module1.path).trees))


def test_the_last_periodic_checkpoint_is_the_final_one(module1):
    a, b = (checkpoint.load(module1.folder / n) for n in ("dense_reg_epoch_1", "dense_reg_epoch_2"))
    assert (a.metadata["epoch"], b.metadata["epoch"]) == (1, 2)
    assert equal(b.state, checkpoint.load(module1.path).state)
    assert not equal(a.state, b.state)


def test_the_guides_sizes_reach_the_configuration(started, prints, tmp_path):
    said, task, _ = started(
        *words(TRAIN_DENSE, data=prints), "--set", "pairs_per_epoch=128", cwd=tmp_path, create=False
    )
    assert said.code == 0, said
    assert (task.config.batch_size, task.config.num_epochs, task.steps_per_epoch) == (128, 100, 1)


def test_the_first_log_line_says_that_prints_are_generated(pipeline, module1, prints):
    assert "synthetic" in pipeline.said.out.splitlines()[0]
    assert "synthetic" not in module1.said.out and str(prints) in module1.said.out.splitlines()[0]


# ---- verifying it


def test_the_verify_command_finds_the_transformer(command, module1):
    name, *rest = words(VERIFY)[:-2]  # it has no presets
    said = command(name, *rest, cwd=module1.cwd)
    assert said.code == 0
    assert "✓ Found transformer: loftr_transformer" in said.out and f"{PARAMETERS:,}" in said.out


@pytest.mark.parametrize("snippet", [VERIFY_SNIPPET, VERIFY_SNIPPET.replace("'", '"')], ids=["step 2", "in Python"])
def test_the_verify_snippets_run(process, module1, snippet):
    said = process("-c", snippet, cwd=module1.cwd)
    assert said.code == 0, said
    assert "✓ Found transformer: loftr_transformer" in said.out


def test_verify_module1_loading_answers_yes_or_no(module1, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(module1.cwd)
    assert verify_module1_loading("./checkpoints/dense_reg/dense_reg_ckpt.pkl") is True
    assert verify_module1_loading(str(tmp_path / "dense_reg_ckpt.pkl")) is False
    assert "Module 1 checkpoint not found" in capsys.readouterr().out


# ---- Module 1 -> Module 2


def test_module_2_leaves_the_guides_files(module2):
    assert directories(module2.folder) == {"matcher_epoch_1", "matcher_epoch_2", "matcher_best", "matcher_ckpt"}


def test_the_weight_loading_logs_the_guides_block(module2):
    block = LOG.format(source="./checkpoints/dense_reg/dense_reg_ckpt.pkl", count="5,248")
    assert PARAMETERS == 5248
    assert block in module2.said.out
    assert module2.said.out.count("Loading Module 1 Transformer Weights") == 1


def test_the_configured_path_is_loaded_without_the_flag(started, prints, module1):
    said, task, _ = started(*words(TRAIN_MATCH_BY_CONFIG, data=prints), cwd=module1.cwd)
    assert LOG.format(source="./checkpoints/dense_reg/dense_reg_ckpt.pkl", count="5,248") in said.out
    assert task.aligner is not None


@pytest.mark.parametrize("printed", [TRAIN_MATCH_CUSTOM, TRAIN_MATCH_ABSOLUTE], ids=["custom", "absolute"])
def test_other_places_of_module_1_are_loaded(started, module1, tmp_path, printed):
    said, _, _ = started(*words(printed, custom=module1.folder, pwd=module1.cwd), cwd=tmp_path)
    assert LOG.format(source=f"{module1.folder}/dense_reg_ckpt.pkl", count="5,248") in said.out


def test_the_guides_sizes_reach_module_2(started, prints, module1):
    said, task, state = started(*words(TRAIN_MATCH, data=prints), "--set", "pairs_per_epoch=128", cwd=module1.cwd)
    assert said.code == 0, said
    assert (task.config.batch_size, task.config.num_epochs, task.steps_per_epoch) == (128, 70, 1)
    assert state.params["arcface_global"].shape[-1] == 100


def test_only_the_transformer_comes_from_module_1(module1):
    rng = np.random.default_rng(0)
    transformer = checkpoint.load(module1.path).state["params"]["loftr_transformer"]
    other = {
        k: jax.tree.map(lambda x: rng.random(x.shape, np.float32), transformer)
        for k in ("loftr_transformer_global", "loftr_transformer_local")
    }
    before = {**other, "head_global": {"kernel": np.ones((2, 2))}, "arcface_global": np.ones((2, 3))}
    for shared in (True, False):
        after = load_module1_transformer_weights(
            module1_ckpt_path=str(module1.path) + ".pkl", module2_params=before, share_global_local=shared
        )
        assert set(after) == set(before)
        assert equal(after["loftr_transformer_global"], transformer)
        assert equal(after["loftr_transformer_local"], transformer)
        assert all(after[k] is before[k] for k in ("head_global", "arcface_global"))
    assert before["loftr_transformer_global"] is other["loftr_transformer_global"]  # the argument is left as it was


def test_a_siamese_transformer_is_found_too(module1, tmp_path, capsys):
    found = checkpoint.load(module1.path)
    params = dict(found.state["params"])
    params["siamese_transformer"] = params.pop("loftr_transformer")
    checkpoint.save(tmp_path / "m1", "dense_reg", {**found.state, "params": params}, {"epoch": 1, "config": {}})
    target = {"loftr_transformer_global": params["siamese_transformer"]}
    load_module1_transformer_weights(str(tmp_path / "m1"), target)
    assert "✓ Found transformer: siamese_transformer\n" in capsys.readouterr().out


def test_a_matchers_checkpoint_has_both_transformers_equal_when_tied(module2):
    for name in ("matcher_epoch_1", "matcher_ckpt"):
        params = checkpoint.load(module2.folder / name).state["params"]
        assert equal(params["loftr_transformer_global"], params["loftr_transformer_local"])


def test_transformers_that_are_not_tied_start_alike(started, prints, module1):
    _, task, state = started(
        *words(TRAIN_MATCH_BY_CONFIG, data=prints), "--set", "share_global_local=false", cwd=module1.cwd
    )
    module1s = checkpoint.load(module1.path).state["params"]["loftr_transformer"]
    for branch in ("loftr_transformer_global", "loftr_transformer_local"):  # two sets of parameters, of one origin
        assert equal(state.params[branch], module1s)


def test_a_matchers_checkpoint_holds_the_module_1_that_aligns_its_pairs(module1, module2):
    ours, theirs = checkpoint.load(module2.path), checkpoint.load(module1.path)
    assert equal(ours.aligner, {k: theirs.state[k] for k in ("params", "batch_stats")})
    assert ours.metadata["config"]["dense_reg_ckpt"] == "./checkpoints/dense_reg/dense_reg_ckpt.pkl"
    assert ours.metadata["num_classes"] == 100


@pytest.mark.slow
def test_without_module_1_the_guides_warning_and_a_random_start(command, prints, tmp_path):
    said = command(
        "train_match",
        "--dataset_root",
        prints,
        "--pretrained_ckpt",
        "",
        "--preset",
        "smoke",
        "--num_epochs",
        1,
        cwd=tmp_path,
    )
    assert said.code == 0, said
    assert "⚠ Warning: No Module 1 checkpoint provided!" in said.out.splitlines()
    assert "Loading Module 1" not in said.out
    found = checkpoint.load(tmp_path / "checkpoints/matcher/matcher_ckpt.pkl")
    assert found.aligner is None
    rows = [r for r in read_rows(tmp_path / "checkpoints/matcher/metrics.jsonl") if r["split"] == "train"]
    # No pair is aligned, and impostors alone would teach that nothing matches.
    assert rows and {r["l_d"] for r in rows} == {0.0}
    assert found.metadata["num_classes"] == 3  # 6 fingers, a third of them held out and at least ceil(0.34 · 6)


# ---- configuration


def test_the_configurations_read_by_key():
    assert DENSE_CONFIG["checkpoint_dir"] == "./checkpoints/dense_reg"
    assert MATCH_CONFIG["checkpoint_dir"] == "./checkpoints/matcher"
    assert MATCH_CONFIG["dense_reg_ckpt"] == "./checkpoints/dense_reg/dense_reg_ckpt.pkl"
    assert DENSE_CONFIG["save_every"] == MATCH_CONFIG["save_every"] == 5


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="checkpoint_dir"):
        DENSE_CONFIG["checkpoint_dri"]


def test_the_folders_of_prints_may_stand_in_a_config_file_and_flags_win(started, prints, tmp_path):
    (tmp_path / "mine.toml").write_text(f'dataset_root = ["{prints}"]\n')
    said, task, _ = started("train_dense", "--config", "mine.toml", "--preset", "smoke", cwd=tmp_path, create=False)
    assert task.config.dataset_root == (str(prints),) and f"dataset_root {prints};" in said.out
    said, task, _ = started(
        "train_dense",
        "--config",
        "mine.toml",
        "--dataset_root",
        "synthetic",
        "--preset",
        "smoke",
        cwd=tmp_path,
        create=False,
    )
    assert task.config.dataset_root == ("synthetic",) and "dataset_root synthetic;" in said.out


def test_module_1s_path_may_stand_in_a_config_file(started, prints, module1, tmp_path):
    (tmp_path / "mine.toml").write_text(f'dense_reg_ckpt = "{module1.folder}/dense_reg_ckpt.pkl"\n')
    said, _, _ = started(*words(TRAIN_MATCH_BY_CONFIG, data=prints), "--config", "mine.toml", cwd=tmp_path)
    assert LOG.format(source=f"{module1.folder}/dense_reg_ckpt.pkl", count="5,248") in said.out


def test_a_matcher_does_not_go_on_with_another_module_1(command, prints, module2, pipeline):
    words = [
        "--dataset_root",
        prints,
        "--checkpoint_dir",
        "./checkpoints/matcher",
        "--num_classes",
        100,
        "--preset",
        "smoke",
    ]
    said = command("train_match", *words, "--pretrained_ckpt", pipeline.module1, cwd=module2.cwd)
    assert said.code == 2 and f"was trained with another Module 1 than {pipeline.module1}; give that one" in said.err, (
        said
    )
    said = command(
        "train_match",
        *words,
        "--pretrained_ckpt",
        module2.cwd / "checkpoints/dense_reg/dense_reg_ckpt",
        cwd=module2.cwd,
    )
    assert said.code == 0 and "is finished" in said.out, said  # the same one by another path


# ---- train_all


def test_train_all_trains_module_1_and_seeds_module_2_with_its_final_checkpoint(pipeline):
    source = pipeline.module1.relative_to(pipeline.cwd)
    block = re.escape(LOG.format(source="SOURCE", count="5,248")).replace(
        "SOURCE", rf"\S*{re.escape(str(source))}(\.pkl)?"
    )
    assert re.search(block, pipeline.said.out)
    module1, module2 = checkpoint.load(pipeline.module1), checkpoint.load(pipeline.module2)
    assert str(checkpoint.locate(module2.metadata["config"]["dense_reg_ckpt"])).endswith(str(source))
    assert equal(module2.aligner, {k: module1.state[k] for k in ("params", "batch_stats")})


# ---- Kaggle


@pytest.fixture
def on_kaggle(monkeypatch, tmp_path, prints):
    """A Kaggle notebook whose /kaggle is a temporary directory, with the prints as input."""
    working, given = tmp_path / "kaggle/working", tmp_path / "kaggle/input"
    (working / "IFViT").mkdir(parents=True)
    given.mkdir()
    (given / "fvc2002").symlink_to(prints)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr(paths, "KAGGLE_WORKING", working)
    return {"working": working, "input": given}


@pytest.mark.parametrize(
    "given, there",
    [
        (
            "./checkpoints/dense_reg/dense_reg_ckpt.pkl",
            "/kaggle/working/IFViT/checkpoints/dense_reg/dense_reg_ckpt.pkl",
        ),
        ("./checkpoints/matcher", "/kaggle/working/IFViT/checkpoints/matcher"),
        ("evaluation", "/kaggle/working/IFViT/evaluation"),
        ("/kaggle/working/IFViT/checkpoints/matcher", "/kaggle/working/IFViT/checkpoints/matcher"),
        ("/custom/path/to/dense_reg_ckpt.pkl", "/custom/path/to/dense_reg_ckpt.pkl"),
        ("", ""),
    ],
)
def test_on_kaggle_relative_paths_move(monkeypatch, given, there):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert paths.resolve(given) == there
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    monkeypatch.setattr(paths, "KAGGLE_WORKING", paths.Path("/nowhere"))
    assert paths.resolve(given) == given


def test_kaggles_directory_alone_says_that_it_is_kaggle(monkeypatch, tmp_path):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setattr(paths, "KAGGLE_WORKING", tmp_path)
    assert paths.resolve("./checkpoints/matcher") == f"{tmp_path}/IFViT/checkpoints/matcher"


def test_data_on_kaggle_are_read_where_they_lie(on_kaggle):
    assert paths.resolve_data(f"{on_kaggle['input']}/fvc2002") == f"{on_kaggle['input']}/fvc2002"


def test_the_guides_kaggle_commands(on_kaggle, command, started, tmp_path):
    working = on_kaggle["working"]
    said = command(*words(KAGGLE_TRAIN_DENSE, **on_kaggle), cwd=working / "IFViT")
    assert said.code == 0, said
    assert (working / "IFViT/checkpoints/dense_reg/dense_reg_ckpt").is_dir()
    block = LOG.format(source=f"{working}/IFViT/checkpoints/dense_reg/dense_reg_ckpt.pkl", count="5,248")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for printed in (KAGGLE_TRAIN_MATCH, KAGGLE_TRAIN_MATCH_BY_CONFIG):
        said, task, _ = started(*words(printed, **on_kaggle), cwd=elsewhere)
        assert block in said.out
        assert task.config.checkpoint_dir == f"{working}/IFViT/checkpoints/matcher"
    said = command(
        "load_module1_weights", "--module1_ckpt", "./checkpoints/dense_reg/dense_reg_ckpt.pkl", cwd=elsewhere
    )
    assert said.code == 0
    assert f"Source: {working}/IFViT/checkpoints/dense_reg/dense_reg_ckpt.pkl" in said.out
    assert list(elsewhere.iterdir()) == []


def test_on_kaggle_the_defaults_lie_under_the_working_directory(on_kaggle, started, tmp_path):
    said, task, _ = started(
        "train_dense", "--dataset_root", on_kaggle["input"] / "fvc2002", "--preset", "smoke", cwd=tmp_path, create=False
    )
    assert said.code == 0, said
    assert task.config.checkpoint_dir == f"{on_kaggle['working']}/IFViT/checkpoints/dense_reg"
