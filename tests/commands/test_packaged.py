"""Commands with the weights of the package: by their name, and where no checkpoint is given or was trained."""

import json

import numpy as np
import pytest
from PIL import Image

from ifvit import weights
from ifvit.config import DenseConfig, preset
from ifvit.data import synthetic
from ifvit.pixels.agreement import threshold
from ifvit.scoring.scorer import Scorer

USED = "the packaged weights are used, a Module 1 that was trained on generated prints alone"


@pytest.fixture
def told(monkeypatch):
    """told(**of the pair): what the network answers on every pair from then on."""

    def tell(**answer):
        def answers(self, prints, pairs, batch_size, real=Scorer.answers):
            return real(self, prints, pairs, batch_size) | {k: [v] * len(pairs) for k, v in answer.items()}

        monkeypatch.setattr(Scorer, "answers", answers)

    return tell


@pytest.mark.run
def test_verify_takes_the_package_and_says_so(command, packed, generated, tmp_path):
    said = command("verify", generated[1, 1], generated[1, 2], cwd=tmp_path)
    assert said.code == 0 and said.out.count("\n") == 2, said
    warning, answer = said.out.splitlines()
    assert USED in warning and "none lies at ./checkpoints/matcher/matcher_ckpt" in warning
    assert answer.startswith("score 0.") and f"(threshold {threshold(0.001):.4f} at FMR 0.001)" in answer


@pytest.mark.run
def test_the_packages_name_is_a_checkpoint_like_another(command, packed, untrained, generated, tmp_path):
    ours, theirs = (
        command("verify", generated[1, 1], generated[1, 1], "--json", "--checkpoint", path, cwd=tmp_path)
        for path in ("pretrained", untrained)
    )
    assert ours.code == 0 and ours == theirs and not ours.err
    found = json.loads(ours.out)
    assert set(found) == {"score", "decision", "matches", "threshold", "probability", "llr", "least_fmr"}


@pytest.mark.run
def test_json_stays_json_where_the_package_is_taken(command, packed, generated, tmp_path):
    said = command("verify", generated[1, 1], generated[1, 2], "--json", cwd=tmp_path)
    assert said.code == 0 and json.loads(said.out) and USED in said.err


@pytest.mark.run
@pytest.mark.parametrize("fmr, decision", [(0.1, "match"), (0.0001, "no match")])
def test_module_1_decides_at_the_rate_that_is_asked_for(command, packed, generated, tmp_path, told, fmr, decision):
    score = threshold(0.003)
    told(score=score, probability=0.75)
    words = (generated[1, 1], generated[1, 2], "--checkpoint", "pretrained", "--fmr", fmr)
    said = command("verify", *words, cwd=tmp_path)
    assert f"score {score:.4f}, {decision} (threshold {threshold(fmr):.4f} at FMR {fmr:g})" in said.out, said


@pytest.mark.run
def test_a_list_is_compared_by_the_package(command, packed, generated, tmp_path):
    (tmp_path / "pairs.csv").write_text(f"a,b\n{generated[1, 1]},{generated[1, 2]}\n")
    said = command("verify", "--pairs", "pairs.csv", "--out", "scores.csv", cwd=tmp_path)
    assert said.code == 0 and USED in said.out and " match at FMR 0.001; scores: scores.csv" in said.out, said


@pytest.mark.run
def test_register_takes_the_package(command, packed, generated, tmp_path):
    said = command("register", generated[1, 1], generated[1, 1], cwd=tmp_path)
    assert (
        said.code in (0, 3) and USED in said.out and "none lies at ./checkpoints/dense_reg/dense_reg_ckpt" in said.out
    )
    assert (tmp_path / "registration/transform.json").is_file()


@pytest.mark.run
def test_evaluate_takes_the_package(command, packed, prints, tmp_path):
    said = command("evaluate", "--dataset_root", prints, "--max_pairs", 20, "--out", "OUT", cwd=tmp_path)
    assert said.code == 0 and USED in said.out, said
    assert json.loads((tmp_path / "OUT/metrics.json").read_text())["databases"]


def test_evaluate_asks_for_the_checkpoint_where_one_was_trained(command, packed, prints, tmp_path):
    (tmp_path / "checkpoints/matcher/matcher_ckpt").mkdir(parents=True)
    said = command("evaluate", "--dataset_root", prints, cwd=tmp_path)
    assert said.code == 2 and "--checkpoint and --dataset_root are both needed" in said.err, said


# ---- training from it


@pytest.mark.parametrize("name", ["pretrained", "auto"])
def test_a_run_starts_from_the_package(started, packed, untrained, tmp_path, name):
    from ifvit import checkpoint

    words = ("train_dense", "--preset", "smoke", "--set")
    said, _, state = started(*words, f"init={name}", cwd=tmp_path)
    assert said.code == 0 and f"Module 1 starts from {packed}/dense_reg.safetensors" in said.out, said
    theirs = checkpoint.load(untrained).state
    assert (
        checkpoint.difference(
            {"p": state.params, "b": state.batch_stats}, {"p": theirs["params"], "b": theirs["batch_stats"]}
        )
        == {}
    )
    assert int(state.step) == 0 and not any(
        x.any() for x in checkpoint.leaves(dict(mu=state.opt_state[1][0].mu)).values()
    )
    said, _, state = started(*words, f"init={untrained}", cwd=tmp_path)
    assert said.code == 0 and checkpoint.difference(state.params, theirs["params"]) == {}


@pytest.mark.parametrize("key", ["init", "teacher"])
def test_a_run_does_not_learn_from_its_own_folder(started, tmp_path, key):
    words = ("--set", f"{key}=checkpoints/dense_reg/dense_reg_ckpt", "--set", "impression_share=0.5")
    said, *_ = started("train_dense", "--preset", "smoke", *words, "--resume", "never", cwd=tmp_path, create=False)
    assert said.code == 2 and "lies in the run's own folder" in said.err and "--checkpoint_dir" in said.err, said


@pytest.mark.run
def test_a_run_of_another_network_names_what_differs(started, packed, tmp_path):
    words = (
        "--preset",
        "smoke",
        "--set",
        "init=pretrained",
        "--set",
        "transformer_width=32",
        "--set",
        "transformer_layers=2",
    )
    said, *_ = started("train_dense", *words, cwd=tmp_path)
    assert said.code == 2 and said.err.count("\n") == 1, said
    assert "transformer_width is 16 there and 32 here; transformer_layers is 1 there and 2 here" in said.err


@pytest.mark.run
def test_where_the_package_does_not_fit_a_run_that_may_do_without_starts_from_nothing(started, packed, tmp_path):
    from ifvit import checkpoint

    words = ("train_dense", "--preset", "smoke", "--set", "transformer_width=32", "--set")
    (said, _, state), (_, _, plain) = (started(*words, f"init={name}", cwd=tmp_path) for name in ("auto", ""))
    assert said.code == 0, said
    assert "starts from nothing, since the package's is another network: transformer_width is 16 there and" in said.out
    assert checkpoint.difference(state.params, plain.params) == {}
    packed.joinpath("dense_reg.safetensors").unlink()
    said, *_ = started("train_dense", "--preset", "smoke", "--set", "init=auto", cwd=tmp_path)
    assert said.code == 0 and "starts from nothing, since no weights came with the package" in said.out, said


@pytest.mark.run
def test_what_is_no_module_1_starts_no_run_and_leaves_no_folder(command, no_weights, tmp_path):
    for init, told in (("pretrained", "no packaged weights"), ("nowhere", "Checkpoint not found: nowhere")):
        said = command("train_dense", "--preset", "smoke", "--set", f"init={init}", cwd=tmp_path)
        assert said.code == 2 and told in said.err and said.err.count("\n") == 1, said
        assert not (tmp_path / "checkpoints").exists()


@pytest.mark.run
def test_module_2_starts_from_the_package(started, packed, untrained, tmp_path):
    """Transformer, ResNets and the learned scale; the rest, and the place of Module 1, as with any other."""
    from ifvit import checkpoint

    words = ("train_match", "--preset", "smoke", "--set", "cosine_scale=3")
    said, task, state = started(*words, "--pretrained_ckpt", "pretrained", cwd=tmp_path)
    assert said.code == 0 and "✓ Found transformer: loftr_transformer" in said.out, said
    theirs = checkpoint.load(untrained).state["params"]
    for ours, name in (("loftr_transformer_global", "loftr_transformer"), ("resnet_local", "resnet")):
        assert checkpoint.difference(state.params[ours], theirs[name]) == {}
    assert state.params["log_scale"] == theirs["log_scale"] != np.log(np.float32(3))
    assert checkpoint.difference(task.aligner["params"], theirs) == {}
    assert task.config.dense_reg_ckpt == "pretrained"


def test_the_package_can_be_checked_like_any_module_1(command, packed, tmp_path):
    said = command("load_module1_weights", "--module1_ckpt", "pretrained", cwd=tmp_path)
    assert said.code == 0 and "every digest right" in said.out, said


def test_a_configuration_from_before_init_is_one_without(tmp_path):
    from ifvit.config import completed

    saved = preset("smoke", DenseConfig).to_dict()
    del saved["init"]
    assert completed(DenseConfig, saved)["init"] == ""


# ---- the weights and prints that this package has


PRINTS = weights.FOLDER / "prints"
HERE = pytest.mark.skipif(not (weights.FOLDER / weights.FILE).is_file(), reason="no weights have been packed")


@pytest.mark.run
@HERE
def test_the_packages_own_weights_tell_its_prints_apart(command, tmp_path):
    found = {}
    for other in ("1_2", "2_1"):
        words = (PRINTS / "1_1.png", PRINTS / f"{other}.png", "--json", "--checkpoint", "pretrained")
        said = command("verify", *words, cwd=tmp_path)
        assert said.code == 0, said
        found[other] = json.loads(said.out)
    assert found["1_2"]["decision"] == "match" and found["1_2"]["score"] > 2 * found["2_1"]["score"]


@HERE
def test_the_packages_own_card_is_of_its_weights():
    from ifvit import checkpoint

    assert checkpoint.load("pretrained").metadata["digest"] in (weights.FOLDER / weights.CARD).read_text()


def test_the_packages_prints_are_small_and_generated():
    files = sorted(PRINTS.iterdir())
    assert [f.name for f in files] == ["1_1.png", "1_2.png", "2_1.png"] and sum(f.stat().st_size for f in files) < 300e3
    for file, (finger, impression) in zip(files, ((2, 2), (2, 3), (1, 3))):
        drawn = synthetic.impression(synthetic.master_finger(2026, finger), 2026, finger, impression)
        with Image.open(file) as picture:
            assert np.abs(np.asarray(picture).astype(int) - drawn).mean() < 0.1  # another CPU rounds otherwise
