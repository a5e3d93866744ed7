"""`verify --pairs`: a list of pairs compared in one start."""

import csv
import json
import os
import shutil

import pytest

from ifvit.data import pair_list
from ifvit.errors import UserError

COLUMNS = ["a", "b", "score", "decision", "matches", "reason"]


@pytest.fixture
def folder(generated, tmp_path):
    """Prints f1_1.png … below `lists`, where the list is to lie; the command is started beside it."""
    there = tmp_path / "lists"
    (there / "prints").mkdir(parents=True)
    for finger in (1, 2):
        for impression in (1, 2):
            shutil.copy(generated[finger, impression], there / f"prints/f{finger}_{impression}.png")
    return there


def rows(file) -> list[dict]:
    with open(file, newline="", encoding="utf-8") as opened:
        reader = csv.DictReader(opened)
        found = list(reader)
    assert reader.fieldnames == COLUMNS
    return found


@pytest.mark.slow
def test_every_pair_has_the_answer_it_has_alone(command, pipeline, folder):
    (folder / "pairs.csv").write_text("a,b\nprints/f1_1.png,prints/f1_2.png\nprints/f1_1.png,prints/f2_1.png\n")
    words = ("--checkpoint", pipeline.module2)
    said = command("verify", "--pairs", "lists/pairs.csv", "--out", "OUT/scores.csv", *words, cwd=folder.parent)
    assert said.code == 0, said
    found = rows(folder.parent / "OUT/scores.csv")
    assert [(row["a"], row["b"]) for row in found] == [
        ("prints/f1_1.png", "prints/f1_2.png"),
        ("prints/f1_1.png", "prints/f2_1.png"),
    ]
    assert "2 of 2 pairs compared" in said.out and not any(row["reason"] for row in found)
    alone = json.loads(command("verify", found[0]["a"], found[0]["b"], "--json", *words, cwd=folder).out)
    assert float(found[0]["score"]) == pytest.approx(alone["score"], abs=1e-4)
    assert abs(int(found[0]["matches"]) - alone["matches"]) <= 1
    for row in found:
        assert row["decision"] == ("match" if float(row["score"]) >= alone["threshold"] else "no match")


def test_broken_pairs_have_a_reason_and_the_others_their_score(command, pipeline, folder):
    (folder / "broken.png").write_bytes((folder / "prints/f1_1.png").read_bytes()[:500])
    (folder / "pairs.csv").write_text(
        "a,b\nprints/f1_1.png,nowhere.png\nprints/f1_1.png,prints/f1_2.png\nbroken.png,prints/f1_1.png\nprints/f1_1.png\n"
    )
    said = command("verify", "--pairs", "pairs.csv", "--out", "s.csv", "--checkpoint", pipeline.module2, cwd=folder)
    assert said.code == 2 and said.err.count("\n") == 1, said
    assert "3 of 4 pairs were not compared; the first, line 2: nowhere.png cannot be read" in said.err
    missing, good, broken, short = rows(folder / "s.csv")
    assert good["score"] and good["decision"] and good["matches"] and not good["reason"]
    for row, told in (
        (missing, "line 2: nowhere.png cannot be read: No such file"),
        (broken, "line 4: broken.png: "),
        (short, "line 5: it names no second print."),
    ):
        assert row["reason"].startswith(told) and not (row["score"] or row["decision"] or row["matches"])


@pytest.mark.parametrize(
    "words, told",
    [
        (("--pairs", "pairs.csv"), "--pairs needs --out"),
        (("--pairs", "pairs.csv", "--out", "pairs.csv"), "is the list of pairs itself"),
        (("--pairs", "pairs.csv", "--out", "prints"), "--out prints is a folder"),
        (("--pairs", "pairs.csv", "--out", "s.csv", "--json"), "--pairs and --json are given"),
        (("--pairs", "pairs.csv", "--out", "s.csv", "--picture", "p.png"), "--pairs and --picture are given"),
        (("a.png", "b.png", "--pairs", "pairs.csv", "--out", "s.csv"), "--pairs and a print are given"),
        (("a.png", "b.png", "--out", "s.csv"), "--out is for --pairs FILE.csv"),
        (("a.png",), "Two prints are needed"),
        ((), "Two prints are needed"),
        (("--pairs", "nowhere.csv", "--out", "s.csv"), "The list of pairs nowhere.csv cannot be read"),
        (("--pairs", "pairs.csv", "--out", "s.csv", "--fmr", "2"), "--fmr is 2"),
    ],
)
def test_flags_that_do_not_fit_are_told_before_anything_is_compared(command, folder, words, told):
    (folder / "pairs.csv").write_text("a,b\nprints/f1_1.png,prints/f1_2.png\n")
    said = command("verify", *words, cwd=folder)
    assert said.code == 2 and told in said.err and said.err.count("\n") == 1, said
    assert not (folder / "s.csv").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1.png,2.png\n",
        "\ufeffa,b\r\n1.png,2.png\r\n",
        "a;b\n1.png;2.png\n",
        "a\tb\n1.png\t2.png\n",
        'finger, b ,a\n"7","2.png","1.png"\n\n',
    ],
)
def test_a_list_is_read_as_tables_are_saved(tmp_path, text):
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8", newline="")
    assert pair_list.read(str(tmp_path / "pairs.csv")) == [(2, "1.png", "2.png")]


@pytest.mark.parametrize(
    "text, told", [("", "does not name a,b"), ("1.png,2.png\n", "does not name a,b"), ("a,b\n\n", "holds no pair")]
)
def test_what_is_no_list_is_told(tmp_path, text, told):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        pair_list.read(str(tmp_path / "pairs.csv"))


def test_paths_start_from_the_lists_folder_a_home_or_the_root(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert pair_list.beside("lists/pairs.csv", "x/a.png") == os.path.join("lists", "x/a.png")
    assert pair_list.beside("lists/pairs.csv", "/data/a.png") == "/data/a.png"
    assert pair_list.beside("lists/pairs.csv", "~/a.png") == "/home/someone/a.png"
