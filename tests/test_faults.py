"""Whatever is done to a run from outside, it ends with the same bits, or says in a sentence what is wrong.

Here in small; tests/faults has the commands that do it at length.
"""

import random
import re
import shutil

import pytest

from faults import bits, checkpoints, differences, no_traceback, one_sentence, resumed, undisturbed
from faults.damage import damage, damage_everything, flip_in_arrays
from faults.disk import SHOWN, Disk, Unavailable, removed
from faults.kill import default_training, kill_run
from ifvit import checkpoint

SMOKE = ("--preset", "smoke")


@pytest.fixture(scope="module")
def of(prints, tmp_path_factory):
    """Ten epochs of Module 1, not disturbed, with many checkpoints."""
    return undisturbed(default_training(prints=str(prints), epochs=10), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def stopped(of, tmp_path):
    """The same run as if it had been stopped: its folder, and its checkpoints (epoch and step), the newest last."""
    folder = tmp_path / "run"
    shutil.copytree(of.folder, folder)
    left = []
    for path in checkpoints(folder, "dense_reg"):
        step = checkpoint.load(path).metadata["step"]
        if path.name == "dense_reg_ckpt" or step == of.total and path.name != "dense_reg_best":
            shutil.rmtree(path)
        elif path.name != "dense_reg_best":
            left.append((step, path))
    left = [path for _, path in sorted(left)]
    assert len(left) > 1
    return folder, left


def content(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def cut_metadata(path) -> str:
    damage(path / "metadata/metadata", "cut to half", random.Random(0))
    return "metadata"


def flip_a_bit(path) -> str:
    names = bits(checkpoint.load(path).state)
    flip_in_arrays(path, random.Random(0))
    return "|".join(re.escape(n).replace("/", "[./]") for n in names)  # it is one of these leaves


def delete_arrays(path) -> str:
    """Whatever arrays it holds: a leaf that cannot be read, or the file that is not there."""
    names = "|".join(re.escape(n).replace("/", "[./]") for n in bits(checkpoint.load(path).state))
    file = max((p for p in (path / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damage(file, "deleted", random.Random(0))
    return f"{names}|{re.escape(file.name)}"


# ---- killed


def test_a_killed_run_ends_as_if_nothing_had_been(of, tmp_path):
    report = kill_run(count=3, inside=1, seed=1, out=tmp_path, of=of)
    assert report.ok, report.summary()


# ---- damaged


def test_damage_anywhere_is_detected_or_harmless(module1):
    outcomes = list(damage_everything(module1.path, faults=("cut to half", "deleted", "one bit flipped")))
    assert not [o for o in outcomes if o.verdict == "FAILURE"]
    assert {o.place.split("/")[0] for o in outcomes if o.verdict == "detected"} >= {"state", "metadata"}


@pytest.mark.parametrize("harm", [flip_a_bit, cut_metadata, delete_arrays])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_gone_on_from(command, of, stopped, harm, tmp_path):
    folder, (*_, before, newest) = stopped
    step = checkpoint.load(before).metadata["step"]
    what = harm(newest)
    damaged = content(newest)
    said = command("train_dense", *of.training.words(folder)[2:], cwd=tmp_path)
    assert said.code == 0, said
    assert not no_traceback(said)
    assert resumed(said.out) == (before.name, step)
    told = [line for line in (said.out + said.err).splitlines() if newest.name in line and "damaged" in line]
    assert re.search(what, "\n".join(told)), (told, said)
    assert content(folder / f"{newest.name}.damaged") == damaged
    assert differences(folder, of) == []


def test_what_was_set_aside_before_stays(command, of, stopped, tmp_path):
    folder, (*_, newest) = stopped
    (folder / f"{newest.name}.damaged").mkdir()
    (folder / f"{newest.name}.damaged/kept").write_text("from before")
    cut_metadata(newest)
    damaged = content(newest)
    said = command("train_dense", *of.training.words(folder)[2:], cwd=tmp_path)
    assert said.code == 0, said
    assert content(folder / f"{newest.name}.damaged") == {"kept": b"from before"}
    assert content(folder / f"{newest.name}.damaged.2") == damaged
    assert differences(folder, of) == []


def test_with_every_checkpoint_damaged_the_run_begins_anew_and_says_so(command, of, stopped, tmp_path):
    folder, left = stopped
    harms = [flip_a_bit, cut_metadata, delete_arrays]
    for number, path in enumerate(checkpoints(folder, "dense_reg")):
        harms[number % 3](path)
    said = command("train_dense", *of.training.words(folder)[2:], cwd=tmp_path)
    assert said.code == 0, said
    assert not no_traceback(said)
    assert resumed(said.out) is None
    assert re.search(r"\banew\b|from (the start|the beginning|scratch)", said.out + said.err), said
    assert all((folder / f"{path.name}.damaged").is_dir() for path in left)
    assert differences(folder, of) == []


def test_a_finished_run_whose_end_is_damaged_goes_on_to_it_again(command, of, tmp_path):
    shutil.copytree(of.folder, tmp_path / "run")
    final = tmp_path / "run/dense_reg_ckpt"
    flip_a_bit(final)
    damaged = content(final)
    said = command("train_dense", *of.training.words(tmp_path / "run")[2:], cwd=tmp_path)
    assert said.code == 0, said
    assert resumed(said.out), said
    assert content(tmp_path / "run/dense_reg_ckpt.damaged") == damaged
    assert differences(tmp_path / "run", of) == []


@pytest.mark.parametrize("harm", [flip_a_bit, delete_arrays])
def test_a_damaged_checkpoint_that_is_named_is_a_mistake(process, of, stopped, harm, tmp_path):
    _, (*_, newest) = stopped
    what = harm(newest)
    said = process(*of.training.words(tmp_path / "another"), "--resume", newest, cwd=tmp_path)
    assert said.code == 2, said
    assert not one_sentence(said) and not no_traceback(said)
    assert newest.name in said.err and re.search(what, said.err), said.err
    assert not checkpoints(tmp_path / "another", "dense_reg")


def test_verify_tells_the_good_from_the_damaged(process, stopped, tmp_path):
    folder, (*_, before, newest) = stopped
    delete_arrays(newest)
    said = process("-m", "ifvit.checkpoint", "verify", folder, cwd=tmp_path)
    assert said.code == 1, said
    assert not no_traceback(said)
    lines = said.out.splitlines()
    assert [line for line in lines if line.startswith("good") and str(before) in line]
    assert [line for line in lines if line.startswith("BAD") and str(newest) in line]


@pytest.mark.parametrize("harm", [flip_a_bit, cut_metadata, delete_arrays])
def test_a_damaged_module_1_is_no_start_of_a_matcher(command, module1, prints, harm, tmp_path):
    copy = shutil.copytree(module1.path, tmp_path / "dense_reg_ckpt")
    what = harm(copy)
    said = command("train_match", "--dataset_root", prints, "--pretrained_ckpt", copy, "--checkpoint_dir",
                   tmp_path / "matcher", *SMOKE, cwd=tmp_path)
    assert said.code == 2, said
    assert not one_sentence(said) and str(copy) in said.err and re.search(what, said.err), said.err
    assert not (tmp_path / "matcher").exists()


@pytest.mark.parametrize("name", ["evaluate", "verify"])
@pytest.mark.parametrize("harm", [flip_a_bit, cut_metadata])
def test_a_damaged_matcher_scores_nothing(command, module2, prints, generated, name, harm, tmp_path):
    copy = shutil.copytree(module2.path, tmp_path / "matcher_ckpt")
    what = harm(copy)
    words = {"evaluate": ("--dataset_root", prints, "--out", tmp_path / "out"),
             "verify": (generated[1, 1], generated[1, 2])}[name]
    said = command(name, *words, "--checkpoint", copy, cwd=tmp_path)
    assert said.code == 2, said
    assert not one_sentence(said) and str(copy) in said.err and re.search(what, said.err), said.err
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


@pytest.mark.parametrize("name", SHOWN)
def test_a_disk_that_cannot_be_written(disk, of, name, tmp_path):
    try:
        wrong = SHOWN[name](disk, of, tmp_path)
    except Unavailable as e:
        pytest.skip(str(e))
    assert wrong == [], SHOWN[name].__doc__


def test_a_checkpoint_directory_that_is_removed_is_made_anew(of, tmp_path):
    assert removed(of, tmp_path) == []
