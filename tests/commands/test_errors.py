"""A user's mistake ends a command with one sentence and its remedy on stderr, exit code 2, and no checkpoint."""

import io
import logging
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cluster.host import Host
from ifvit import checkpoint, cli, train_dense
from ifvit.commands import run_here


def checkpoints(folder: Path) -> list[Path]:
    """Everything under a folder that is named as a checkpoint is."""
    return [p for kind in ("dense_reg_*", "matcher_*") for p in folder.rglob(kind)]


def check(said, *told: str) -> None:
    """One line on stderr, no traceback, exit code 2; each of `told` is in it."""
    assert said.code == 2, said
    assert said.err.startswith("Error: ") and said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
    assert "Traceback" not in said.err + said.out
    assert re.search(r"[;,.:] .*\w", said.err.removeprefix("Error: ")), "a remedy follows what is wrong"
    for words in told:
        assert words in said.err, said.err


@pytest.fixture
def fails(command, tmp_path):
    """fails(TOLD, NAME, *WORDS): the command fails as it should, tells each of TOLD, and leaves no checkpoint."""

    def call(told, name, *words):
        cwd = tmp_path / "cwd"
        cwd.mkdir()
        check(command(name, *words, cwd=cwd), *told)
        assert checkpoints(cwd) == [] and not (cwd / "checkpoints/matcher").exists()

    return call


SMOKE = ("--preset", "smoke")


# ---- the prints


@pytest.mark.parametrize("name", ["train_dense", "train_all"])
def test_a_root_that_does_not_exist(fails, name, tmp_path):
    fails([f"{tmp_path}/nowhere", "--dataset_root"], name, "--dataset_root", tmp_path / "nowhere", *SMOKE)


def test_one_of_several_roots_that_does_not_exist(fails, prints, tmp_path):
    fails([f"{tmp_path}/nowhere"], "train_dense", "--dataset_root", prints, tmp_path / "nowhere", *SMOKE)


def test_an_empty_root(fails, tmp_path):
    (tmp_path / "root/inner").mkdir(parents=True)
    fails([f"{tmp_path}/root is empty"], "train_dense", "--dataset_root", tmp_path / "root", *SMOKE)


def test_a_root_without_a_print_says_what_was_found(fails, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for file in ("a.txt", "b.txt", "c.csv"):
        (root / file).write_text("1")
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(root / "holiday.png")
    fails(["2 .txt", "1 .csv", "1 .png", "holiday.png"], "train_dense", "--dataset_root", root, *SMOKE)


def test_a_root_that_is_a_file(fails, prints):
    fails(["1_1.png"], "train_dense", "--dataset_root", prints / "DB1/1_1.png", *SMOKE)


@pytest.mark.parametrize("name", ["train_dense", "train_all", "evaluate"])
def test_one_finger_only(fails, pipeline, generated, name, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for i in (1, 2, 3):
        shutil.copy(generated[1, i], root)
    more = ("--checkpoint", pipeline.module1) if name == "evaluate" else SMOKE
    fails(["one finger", "two or more"], name, "--dataset_root", root, *more)


def test_an_image_of_more_than_20_megapixels(fails, prints, tmp_path):
    shutil.copytree(prints, tmp_path / "root")
    Image.new("1", (5000, 4001)).save(tmp_path / "root/DB1/4_1.png")
    fails(["4_1.png", "5000 x 4001", "20 million"], "train_dense", "--dataset_root", tmp_path / "root", *SMOKE)


@pytest.fixture
def twelve(generated, tmp_path):
    """A root with 12 prints: six fingers, two impressions."""
    root = tmp_path / "twelve"
    root.mkdir()
    for finger in range(1, 7):
        for i in (1, 2):
            shutil.copy(generated[finger, i], root)
    return root


@pytest.mark.parametrize("content", [b"", b"GIF89a nothing more", "cut"], ids=["zero bytes", "no image", "cut short"])
def test_a_broken_image_among_good_ones_is_skipped_counted_and_named(started, twelve, content, tmp_path):
    bad = twelve / "3_2.png"
    bad.write_bytes(bad.read_bytes()[:2000] if content == "cut" else content)
    said, _, _ = started("train_dense", "--dataset_root", twelve, *SMOKE, cwd=tmp_path, create=False)
    assert said.code == 0, said
    assert "1 of 12 images cannot be read" in said.out and "3_2.png" in said.out
    held_out, trained = (
        int(re.search(p, said.out)[1]) for p in (r"(\d+) prints of \d+ fingers held", r"(\d+) prints of \d+ fingers to")
    )
    assert held_out + trained == 11


def test_past_ten_per_cent_broken_images_stop_the_run(fails, twelve):
    for name in ("3_2.png", "5_1.png"):
        (twelve / name).write_bytes(b"")
    fails(["2 of 12", "3_2.png", "5_1.png"], "train_dense", "--dataset_root", twelve, *SMOKE)


def test_ten_per_cent_are_not_past_it(started, twelve, tmp_path):
    for name in ("1_1.png", "1_2.png"):
        (twelve / name).unlink()
    (twelve / "3_2.png").write_bytes(b"")
    said, _, _ = started("train_dense", "--dataset_root", twelve, *SMOKE, cwd=tmp_path, create=False)
    assert said.code == 0 and "1 of 10 images" in said.out, said


def test_too_few_fingers_to_hold_some_out(fails, generated, tmp_path):
    for n in (1, 2, 3):
        (tmp_path / f"few/{n}").mkdir(parents=True)
        for i in (1, 2):
            shutil.copy(generated[n, i], tmp_path / f"few/{n}/{i}.png")
    fails(
        ["Of 3 fingers 0 are held out", "each needs two or more"],
        "train_dense",
        "--dataset_root",
        tmp_path / "few",
        *SMOKE,
    )


def test_prints_of_which_none_shows_ridges(fails, tmp_path):
    for n in range(6):
        (tmp_path / f"blank/{n}").mkdir(parents=True)
        image = np.full((300, 300), 230, np.uint8)
        image[0, n] = 0  # other bytes
        Image.fromarray(image).save(tmp_path / f"blank/{n}/1.png")
    fails(["None of 6 prints shows ridges", "--ppi"], "train_dense", "--dataset_root", tmp_path / "blank", *SMOKE)


# ---- sizes and values


@pytest.mark.parametrize("classes", [1, 2])
def test_num_classes_below_the_number_of_training_fingers(fails, prints, module1, classes):
    fails(
        [f"--num_classes is {classes}", "3 fingers"],
        "train_match",
        "--dataset_root",
        prints,
        "--num_classes",
        classes,
        "--pretrained_ckpt",
        module1.path,
        *SMOKE,
    )


@pytest.mark.parametrize(
    "words, told",
    [
        (["--batch_size", 0], ["batch_size is 0", "at least 1"]),
        (["--set", "batch_size=-4"], ["batch_size is -4", "at least 1"]),
        (["--num_epochs", 0], ["num_epochs is 0", "at least 1"]),
        (["--set", "learning_rate=nan"], ["learning_rate is nan", "more than 0"]),
        (["--set", "learning_rate=inf"], ["learning_rate is inf"]),
        (["--set", "learning_rate=0"], ["learning_rate is 0", "more than 0"]),
        (["--set", "learning_rate=-1e-3"], ["learning_rate is -0.001"]),
        (["--set", "held_out=1"], ["held_out is 1", "at most 0.9"]),
        (["--seed", -1], ["seed is -1"]),
        (["--ppi", -500], ["ppi is -500"]),
        (["--set", "image_size=60"], ["image_size is 60", "64"]),
        (["--set", "transformer=bert"], ["transformer is 'bert'", "loftr", "siamese"]),
        (["--set", "batch_size=many"], ["batch_size", "many", "int"]),
        (["--set", "temp_bug_fix=perhaps"], ["temp_bug_fix", "perhaps", "bool"]),
        (["--set", "batch_size"], ["batch_size=VALUE"]),
        (["--batch_size", "many"], ["--batch_size", "many"]),
        (["--preset", "tiny"], ["tiny", "smoke", "quick", "cpu", "paper"]),
        (["--set", "learning_rat=1"], ["learning_rat", "did you mean 'learning_rate'"]),
        (["--num_epoch", 3], ["--num_epoch;", "did you mean --num_epochs"]),
        (["--dataset_rot", "x"], ["--dataset_rot;", "did you mean --dataset_root"]),
        (["prints"], ["argument prints"]),
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
    ],
)
def test_a_value_out_of_range_or_an_unknown_name(fails, words, told):
    fails(told, "train_dense", *words, *(() if "--preset" in words else SMOKE))


def test_a_key_of_the_other_module_is_unknown(fails):
    fails(["num_classes"], "train_dense", "--set", "num_classes=3", *SMOKE)


def test_train_alls_keys_name_their_module(fails):
    fails(["dense.learning_rate", "match.learning_rate"], "train_all", "--set", "learning_rate=1e-3", *SMOKE)


def test_train_alls_keys_are_checked_before_anything_is_trained(fails):
    fails(["learning_rat", "did you mean 'learning_rate'"], "train_all", "--set", "match.learning_rat=1", *SMOKE)


def test_a_folder_for_module_2_that_cannot_be_written_is_told_before_module_1_is_trained(fails, prints, tmp_path):
    (tmp_path / "file").write_text("")
    fails(
        ["Checkpoints cannot be written to", "Not a directory"],
        "train_all",
        "--dataset_root",
        prints,
        "--matcher_checkpoint_dir",
        tmp_path / "file/below",
        *SMOKE,
    )


def test_modules_that_do_not_go_together_are_told_before_anything_is_trained(fails):
    fails(
        ["transformer_width is 32 for Module 1 and 16 for Module 2", "--set match.transformer_width=…"],
        "train_all",
        "--set",
        "dense.transformer_width=32",
        *SMOKE,
    )


@pytest.mark.parametrize(
    "text, told",
    [
        ("learning_rat = 1e-3", ["learning_rat", "did you mean 'learning_rate'"]),
        ("batch_size = 0", ["batch_size is 0"]),
        ("batch_size = 'four'", ["batch_size is 'four'", "int"]),
        ("batch_size : 4", ["mine.toml", "TOML"]),
    ],
)
def test_a_config_file_is_checked_like_flags(fails, tmp_path, text, told):
    (tmp_path / "mine.toml").write_text(text + "\n")
    fails(told, "train_dense", "--config", tmp_path / "mine.toml", *SMOKE)


def test_a_batch_that_the_devices_do_not_divide(process, prints, tmp_path):
    said = process(
        "-m",
        "ifvit.train_dense",
        "--dataset_root",
        prints,
        *SMOKE,
        cwd=tmp_path,
        XLA_FLAGS="--xla_force_host_platform_device_count=3",
    )
    check(said, "batch of 4", "3 devices", "--batch_size 3")
    assert checkpoints(tmp_path / "checkpoints") == []


def test_a_checkpoint_directory_that_cannot_be_made(fails, prints, tmp_path):
    (tmp_path / "file").write_text("")
    fails([f"{tmp_path}/file"], "train_dense", "--dataset_root", prints, "--checkpoint_dir", tmp_path / "file", *SMOKE)


# ---- checkpoints that do not serve


def cut_metadata(folder: Path) -> None:
    shutil.rmtree(folder / "metadata")


def cut_state(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def flip(folder: Path) -> None:
    """One bit of a convolution's kernel, where it lies on disk."""
    kernel = checkpoint.load(folder).state["params"]["resnet"]["stem"]["conv"]["kernel"].tobytes()
    file = next(p for p in (folder / "state").rglob("d/*") if kernel in p.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(kernel) + 100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("printed", ["checkpoints/dense_reg/dense_reg_ckpt.pkl", "nowhere", "nowhere/dense_reg_ckpt"])
def test_module_1_that_is_missing(fails, printed):
    fails(
        [f"Module 1 checkpoint not found: {printed}", "--pretrained_ckpt"],
        "train_match",
        "--pretrained_ckpt",
        printed,
        *SMOKE,
    )


def test_the_configured_module_1_that_is_missing(fails):
    fails(["Module 1 checkpoint not found: ./checkpoints/dense_reg/dense_reg_ckpt.pkl"], "train_match", *SMOKE)


@pytest.mark.parametrize(
    "damage, told", [(cut_metadata, "half-written"), (cut_state, "half-written"), (flip, "damaged")]
)
@pytest.mark.parametrize("name", ["train_match", "evaluate"])
def test_a_checkpoint_that_is_half_written_or_damaged(fails, module1, prints, tmp_path, name, damage, told):
    folder = tmp_path / "broken"
    shutil.copytree(module1.path, folder)
    damage(folder)
    more = ("--checkpoint", folder) if name == "evaluate" else ("--pretrained_ckpt", folder, *SMOKE)
    fails([str(folder), told], name, "--dataset_root", prints, *more)


def test_a_matcher_where_module_1_belongs(fails, module2, prints):
    fails(
        ["Module 2 (matcher)", "not of Module 1"],
        "train_match",
        "--dataset_root",
        prints,
        "--pretrained_ckpt",
        module2.path,
        *SMOKE,
    )


@pytest.mark.slow
def test_a_matcher_within_an_epoch_has_no_calibration_and_at_its_end_it_has(
    fails, command, module2, generated, tmp_path
):
    found = checkpoint.load(module2.path)
    within = tmp_path / "matcher_step_3"
    meta = {k: v for k, v in found.metadata.items() if k not in ("fusion", "digest", "digests", "shardings")}
    checkpoint.save(within, "matcher", found.state, meta, found.aligner)
    pair = (generated[1, 1], generated[1, 2])
    fails(["Module 2's final checkpoint"], "verify", *pair, "--checkpoint", within)
    said = command("export", "--checkpoint", within, cwd=tmp_path)
    assert said.code == 2 and "Module 2's final checkpoint" in said.err, said
    for name in ("matcher_epoch_1", "matcher_best"):
        said = command("verify", *pair, "--checkpoint", module2.folder / name, cwd=tmp_path)
        assert said.code == 0 and said.out.startswith("score "), said


@pytest.mark.parametrize(
    "name, words, told",
    [
        ("verify", ["A", "B"], ["no trained matcher at ./checkpoints/matcher/matcher_ckpt"]),
        ("register", ["A", "B"], ["Checkpoint not found: ./checkpoints/dense_reg/dense_reg_ckpt"]),
        ("evaluate", ["--dataset_root", "x"], ["--checkpoint and --dataset_root are both needed"]),
        ("verify", ["A", "B", "--checkpoint", "pretrained"], ["This installation has no packaged weights"]),
    ],
)
def test_nothing_was_trained_and_nothing_came_with_the_package(fails, no_weights, generated, name, words, told):
    prints = {"A": generated[1, 1], "B": generated[1, 2]}
    fails(told, name, *(prints.get(word, word) for word in words))


def test_a_module_1_without_a_transformer(fails, module1, prints, tmp_path):
    found = checkpoint.load(module1.path)
    params = {k: v for k, v in found.state["params"].items() if k != "loftr_transformer"}
    meta = {k: found.metadata[k] for k in ("epoch", "config")}
    checkpoint.save(tmp_path / "bare", "dense_reg", {**found.state, "params": params}, meta)
    fails(
        ["No transformer found in Module 1 checkpoint", "train Module 1 again"],
        "train_match",
        "--dataset_root",
        prints,
        "--pretrained_ckpt",
        tmp_path / "bare",
        *SMOKE,
    )


def test_a_module_1_of_another_size(fails, module1, prints):
    fails(
        ["transformer_width", "16", "32"],
        "train_match",
        "--dataset_root",
        prints,
        "--pretrained_ckpt",
        module1.path,
        *SMOKE,
        "--set",
        "transformer_width=32",
    )


def test_a_pickle_that_is_none_is_refused(fails, tmp_path):
    (tmp_path / "old.pkl").write_bytes(b"\x80\x04.")
    fails([f"{tmp_path}/old.pkl", "no pickle"], "train_match", "--pretrained_ckpt", tmp_path / "old.pkl", *SMOKE)


def test_a_remote_path_is_refused(fails):
    fails(["s3://bucket/dense_reg_ckpt"], "train_match", "--pretrained_ckpt", "s3://bucket/dense_reg_ckpt", *SMOKE)


def test_a_checkpoint_to_resume_from_that_is_missing(fails, prints):
    fails(["not found: nowhere"], "train_dense", "--dataset_root", prints, "--resume", "nowhere", *SMOKE)


def test_resuming_train_all_from_one_path(fails, module1):
    fails(["auto or never"], "train_all", "--resume", module1.path, *SMOKE)


# ---- evaluate, verify


@pytest.mark.parametrize(
    "words, told",
    [
        ([], ["--checkpoint", "--dataset_root"]),
        (["--chekpoint", "x"], ["--chekpoint", "did you mean --checkpoint"]),
        (["--checkpoint", "nowhere", "--dataset_root", "x"], ["Checkpoint not found: nowhere"]),
        (["--checkpoint", "nowhere", "--dataset_root", "x", "--protocol", "mine"], ["mine", "fvc", "all"]),
        (["--checkpoint", "nowhere", "--dataset_root", "x", "--batch_size", "0"], ["--batch_size is 0", "at least 1"]),
    ],
)
def test_evaluates_flags(fails, words, told):
    fails(told, "evaluate", *words)


def test_evaluating_a_root_that_is_empty(fails, module1, tmp_path):
    (tmp_path / "root").mkdir()
    fails([f"{tmp_path}/root is empty"], "evaluate", "--checkpoint", module1.path, "--dataset_root", tmp_path / "root")


def test_evaluating_prints_without_a_second_impression(fails, module1, generated, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for finger in (1, 2, 3):
        shutil.copy(generated[finger, 1], root)
    fails(["genuine", "two impressions"], "evaluate", "--checkpoint", module1.path, "--dataset_root", root)
    assert not (tmp_path / "cwd/evaluation/metrics.json").exists()


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
def test_verifying_an_image_that_cannot_be_read(fails, module2, generated, tmp_path, content):
    if content is not None:
        (tmp_path / "b.png").write_bytes(content)
    fails([f"{tmp_path}/b.png"], "verify", generated[1, 1], tmp_path / "b.png", "--checkpoint", module2.path)


@pytest.mark.parametrize("fmr", [0, 1, -1, "nan"])
def test_verifying_at_a_rate_that_is_none(fails, module2, generated, fmr):
    fails(["--fmr is"], "verify", generated[1, 1], generated[1, 2], "--checkpoint", module2.path, "--fmr", fmr)


# ---- help


@pytest.mark.parametrize(
    "name, flags",
    [
        ("train_dense", ["--checkpoint_dir", "--batch_size", "--num_epochs", "--loftr_ckpt"]),
        ("train_match", ["--pretrained_ckpt", "--checkpoint_dir", "--num_classes", "--batch_size", "--num_epochs"]),
        ("train_all", ["--dense_checkpoint_dir", "--matcher_checkpoint_dir", "--num_classes", "--loftr_ckpt"]),
        ("evaluate", ["--checkpoint", "--dataset_root", "--out", "--protocol"]),
        ("verify", ["--checkpoint", "--fmr", "--picture", "--json"]),
        ("prints", ["--ppi", "--ridges", "--names", "--held_out", "--sheet", "--json"]),
        ("load_module1_weights", ["--module1_ckpt"]),
    ],
)
def test_help_names_the_flags(command, name, flags, tmp_path):
    common = ["--dataset_root", "--preset", "--config", "--set", "--resume", "--seed"] if "train" in name else []
    said = command(name, "--help", cwd=tmp_path)
    assert said.code == 0 and said.err == ""
    assert [f for f in flags + common if not re.search(rf"{f}\b", said.out)] == []


def test_a_terminal_that_has_no_such_sign_gets_another(process, tmp_path):
    said = process(
        "-m", "ifvit.load_module1_weights", "--module1_ckpt", "nowhere", cwd=tmp_path, PYTHONIOENCODING="ascii"
    )
    assert said.code == 2 and "? Module 1 checkpoint not found: nowhere" in said.out and "Traceback" not in said.err


def test_a_jax_without_the_gpu_that_ray_gave_its_process_is_told(monkeypatch):
    """It would train what is meant for a GPU on its cores."""
    monkeypatch.delenv("JAX_PLATFORMS")
    args, host = train_dense.Args(preset="smoke"), Host()
    host.name = "host 10.0.0.7, process 3"
    code, message = run_here("ifvit.train_dense", asdict(args), "GPU", "smoke", args.configs("smoke"), host)
    assert code == 2 and "host 10.0.0.7, process 3 has a GPU from Ray, and JAX finds none there; install" in message


@pytest.mark.parametrize("index", [0, 1])
def test_of_several_processes_jaxs_first_one_prints(monkeypatch, index):
    """Ray's ranks are others: a TPU slice numbers its hosts itself."""
    out, trained, args = io.StringIO(), [], train_dense.Args(preset="smoke")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(
        train_dense.Args, "train", lambda self, configs, host: print(trained.append(configs) or "trained")
    )
    assert run_here("ifvit.train_dense", asdict(args), "", "smoke", args.configs("smoke"), Host()) == (0, "")
    assert (
        trained and ("trained" in out.getvalue()) == (not index) and ("train_dense: " in out.getvalue()) == (not index)
    )


def test_a_device_whose_memory_is_full_is_told_with_what_helps():
    code, message = cli.outcome(lambda: jax.block_until_ready(jax.numpy.zeros((2**24, 2**24))))
    assert code == 1 and message.startswith("The memory of the device is full")
    assert all(f"--set {what}" in message for what in ("accumulate=4", "compute_dtype=bfloat16", "remat=true"))


def test_what_else_goes_wrong_in_jax_is_a_defect():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        cli.outcome(lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: something")))


def test_jax_tells_of_no_platform_that_is_not_there():
    """Ray gives its workers' root logger INFO; then jax says on every GPU host that it found no TPU."""
    root, before = logging.getLogger(), logging.getLogger().level
    try:
        root.setLevel(logging.INFO)
        cli.prepare_output()
        assert not logging.getLogger("jax._src.xla_bridge").isEnabledFor(logging.INFO)
    finally:
        root.setLevel(before)
