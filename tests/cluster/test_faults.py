"""Whatever is done to a run from outside, it ends with the same bits, or says in a sentence what is wrong.

Here in small; tests/faults has the commands that do it at length.
"""

import random
import re
import shutil

import pytest
from faults import bits, checkpoints, differences, no_traceback, one_sentence, resumed, undisturbed
from faults.damage import array_files, damage, damage_everything, flip_in_arrays
from faults.disk import SHOWN, Disk, Unavailable, removed
from faults.kill import default_training, kill_run

from ifvit import checkpoint
from ifvit.errors import UserError

pytestmark = pytest.mark.process
SMOKE = ("--preset", "smoke")


@pytest.fixture(scope="module")
def of(prints, tmp_path_factory):
    """Ten epochs of Module 1, not disturbed, with many checkpoints."""
    return undisturbed(default_training(prints=str(prints), epochs=10), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def run(of, tmp_path):
    """A copy of it to be damaged: its folder, and its checkpoints, the final one first, then the newest."""
    folder = shutil.copytree(of.folder, tmp_path / "run")
    found = [(checkpoint.load(p).metadata, p) for p in checkpoints(folder, "dense_reg") if p.name != "dense_reg_best"]
    return folder, [p for _, p in sorted(found, key=lambda f: (f[0]["finished"], f[0]["step"]), reverse=True)]


def content(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What is done to a checkpoint; each returns what should be said to be wrong.


def cut_metadata(path) -> str:
    damage(path / "metadata/metadata", "cut to half", random.Random(0))
    return "metadata"


def flip_a_bit(path) -> str:
    """One of a parameter."""
    names = _leaves(path)
    flip_in_arrays(path, random.Random(0))
    return names


def delete_arrays(path) -> str:
    """The largest file with parameters in it. Which files hold only the optimizer's state differs from run to run."""
    names = _leaves(path)
    for file in array_files(path):
        content = file.read_bytes()
        file.unlink()
        try:
            checkpoint.load(path, parts=("state/params",))
        except UserError:
            return f"{names}|{re.escape(file.name)}"
        file.write_bytes(content)
    raise AssertionError(f"{path} has no file that its parameters need")


def _leaves(path) -> str:
    """Any of a checkpoint's leaves."""
    return "|".join(re.escape(n).replace("/", "[./]") for n in bits(checkpoint.load(path).state))


# ---- killed


@pytest.mark.slow
def test_a_killed_run_ends_as_if_nothing_had_been(of, tmp_path):
    report = kill_run(count=3, inside=1, seed=1, out=tmp_path, of=of)
    assert report.ok, report.summary()


# ---- damaged


def test_damage_anywhere_is_detected_or_harmless(module1):
    outcomes = list(damage_everything(module1.path, faults=("cut to half", "deleted", "one bit flipped")))
    failures = [f"{o.place}, {o.fault}: {o.said}" for o in outcomes if o.verdict == "FAILURE"]
    assert not failures, "\n".join(failures)
    assert {o.place.split("/")[0] for o in outcomes if o.verdict == "detected"} >= {"state", "metadata"}


def test_damaged_checkpoints_are_set_aside_and_the_newest_good_one_gone_on_from(command, of, run, tmp_path):
    folder, (*bad, good) = run[0], run[1][:4]
    step = checkpoint.load(good).metadata["step"]
    assert step < of.total
    wrong = {path: harm(path) for path, harm in zip(bad, (flip_a_bit, cut_metadata, delete_arrays), strict=True)}
    damaged = [content(path) for path in bad]
    aside = [folder / f"{path.name}.damaged" for path in bad]
    aside[1].mkdir()
    (aside[1] / "kept").write_text("set aside before")
    said = command("train_dense", *of.training.words(folder)[2:], cwd=tmp_path)
    assert said.code == 0, said
    assert not no_traceback(said)
    assert resumed(said.out) == (good.name, step)
    for path, what in wrong.items():
        told = [line for line in (said.out + said.err).splitlines() if path.name in line and "damaged" in line]
        assert re.search(what, "\n".join(told).replace(str(path), "")), (path.name, told)
    assert content(aside[1]) == {"kept": b"set aside before"}
    aside[1] = folder / f"{bad[1].name}.damaged.2"
    assert [content(path) for path in aside] == damaged
    assert not (wrong := differences(folder, of)), "\n".join(wrong)


def test_with_every_checkpoint_damaged_the_run_begins_anew_and_says_so(command, of, run, tmp_path):
    folder, left = run
    for path in left:
        cut_metadata(path)
    delete_arrays(folder / "dense_reg_best")
    said = command("train_dense", *of.training.words(folder)[2:], cwd=tmp_path)
    assert said.code == 0, said
    assert not no_traceback(said)
    assert resumed(said.out) is None
    assert re.search(r"\banew\b|from (the start|the beginning|scratch)", said.out + said.err), said
    assert all((folder / f"{path.name}.damaged").is_dir() for path in left)
    assert not (wrong := differences(folder, of)), "\n".join(wrong)


@pytest.mark.parametrize("harm", [flip_a_bit, delete_arrays])
def test_a_damaged_checkpoint_that_is_named_is_a_mistake(process, of, run, harm, tmp_path):
    _, (path, *_) = run
    what = harm(path)
    said = process(*of.training.words(tmp_path / "another"), "--resume", path, cwd=tmp_path)
    assert said.code == 2, said
    assert not one_sentence(said) and not no_traceback(said)
    assert path.name in said.err and re.search(what, said.err), said.err
    assert not checkpoints(tmp_path / "another", "dense_reg")


def test_verify_tells_the_good_from_the_damaged(process, run, tmp_path):
    folder, (bad, good, *_) = run
    delete_arrays(bad)
    said = process("-m", "ifvit.checkpoint", "verify", folder, cwd=tmp_path)
    assert said.code == 1, said
    assert not no_traceback(said)
    lines = said.out.splitlines()
    assert [line for line in lines if line.startswith("good") and str(good) in line]
    assert [line for line in lines if line.startswith("BAD") and str(bad) in line]


@pytest.mark.parametrize("harm", [flip_a_bit, cut_metadata, delete_arrays])
def test_a_damaged_module_1_is_no_start_of_a_matcher(command, module1, prints, harm, tmp_path):
    copy = shutil.copytree(module1.path, tmp_path / "dense_reg_ckpt")
    harm(copy)
    said = command(
        "train_match",
        "--dataset_root",
        prints,
        "--pretrained_ckpt",
        copy,
        "--checkpoint_dir",
        tmp_path / "matcher",
        *SMOKE,
        cwd=tmp_path,
    )
    assert said.code == 2, said
    assert not one_sentence(said) and str(copy) in said.err, said.err
    assert not (tmp_path / "matcher").exists()


@pytest.mark.parametrize("name", ["evaluate", "verify"])
@pytest.mark.parametrize("harm", [flip_a_bit, cut_metadata])
def test_a_damaged_matcher_scores_nothing(command, module2, prints, generated, name, harm, tmp_path):
    copy = shutil.copytree(module2.path, tmp_path / "matcher_ckpt")
    harm(copy)
    words = {
        "evaluate": ("--dataset_root", prints, "--out", tmp_path / "out"),
        "verify": (generated[1, 1], generated[1, 2]),
    }[name]
    said = command(name, *words, "--checkpoint", copy, cwd=tmp_path)
    assert said.code == 2, said
    assert not one_sentence(said) and str(copy) in said.err, said.err
    assert not (tmp_path / "out/metrics.json").exists()


# ---- the disk taken away


@pytest.fixture
def disk():
    try:
        made = Disk()
    except Unavailable as e:
        pytest.skip(str(e))
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_disk_that_cannot_be_written(disk, of, name, tmp_path):
    try:
        wrong = SHOWN[name](disk, of, tmp_path)
    except Unavailable as e:
        pytest.skip(str(e))
    assert not wrong, "\n".join(wrong)


def test_a_checkpoint_directory_that_is_removed_is_made_anew(of, tmp_path):
    wrong = removed(of, tmp_path)
    assert not wrong, "\n".join(wrong)
