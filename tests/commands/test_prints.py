"""`python -m ifvit.prints` tells what folders are read as, and runs log the same before they begin."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cluster.host import Host
from ifvit import evaluate
from ifvit.config import DenseConfig, preset
from ifvit.data.gather import gather
from ifvit.data.sheet import COLUMNS, MOST, SIDE, spread


def drawn(seed: int, height: int, width: int, period: float) -> Image.Image:
    """Circles of ridges that lie `period` px apart, on white."""
    y, x = np.mgrid[:height, :width].astype(float)
    cx, cy = np.random.default_rng(seed).uniform(0.3, 0.7, 2) * (width, height)
    inside = np.hypot(x / width - 0.5, y / height - 0.5) < 0.45
    ridges = 128 + 100 * np.sin(2 * np.pi * np.hypot(x - cx, y - cy) / period)
    return Image.fromarray(np.where(inside, ridges, 235).astype(np.uint8))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A: 5 fingers × 2 with a tag of 500 ppi; B: 4 × 3, one of them once more, without a tag; some is left out."""
    root = tmp_path_factory.mktemp("two")
    for database, fingers, impressions, size, period, tag in (
        ("A", 5, 2, (240, 220), 9.0, {"dpi": (500, 500)}),
        ("B", 4, 3, (200, 210), 8.0, {}),
    ):
        (root / database).mkdir()
        for f in range(1, fingers + 1):
            for i in range(1, impressions + 1):
                drawn(100 * f + 10 * i + len(tag), *size, period).save(root / database / f"{f}_{i}.png", **tag)
    drawn(7, 300, 210, 8.0).save(root / "B" / "4_4.png")
    (root / "A" / "6_1.png").write_bytes(b"no image")
    shutil.copy(root / "A" / "2_1.png", root / "A" / "3_3.png")
    (root / "A" / "more.zip").write_bytes(b"PK")
    return root


@pytest.fixture(scope="module")
def told(two, command, tmp_path_factory):
    return read_json(command("prints", two, "--json", cwd=tmp_path_factory.mktemp("cwd")))


def read_json(said) -> dict:
    """What follows the log, which in a process of its own is on stderr."""
    assert said.code == 0, said
    return json.loads(said.out[said.out.index("{\n") :])


def test_databases_fingers_and_impressions_are_counted(told):
    assert (told["prints"], told["fingers"]) == (23, 9)
    counted = [(d["name"], d["fingers"], d["impressions"], d["prints"]) for d in told["databases"]]
    assert counted == [("A", 5, [2, 2], 10), ("B", 4, [3, 4], 13)]


def test_sizes_resolutions_and_what_told_them_and_the_ridges_distance(told):
    a, b = told["databases"]
    assert a["sizes"] == [{"size": "220 × 240", "prints": 10}]
    assert b["sizes"] == [{"size": "210 × 200", "prints": 12}, {"size": "210 × 300", "prints": 1}]
    assert a["ppi"] == [{"ppi": 500, "from": "file's tag", "prints": 10}]
    assert b["ppi"] == [{"ppi": 500, "from": "assumed", "prints": 13}]
    assert a["period"] == pytest.approx(9, rel=0.05) and b["period"] == pytest.approx(8, rel=0.05)
    assert (a["ridges"], a["seem"], a["blank"]) == ("dark", "dark", 0)


def test_what_is_left_out_is_counted_by_reason_with_an_example(two, told):
    left_out = {row["example"]: (row["count"], row["reason"]) for row in told["left_out"]}
    assert left_out[f"{two / 'A/6_1.png'}: not an image, or its header is broken"] == (
        1,
        "an image that cannot be read",
    )
    assert left_out[str(two / "A/more.zip")][0] == 1 and "archive" in left_out[str(two / "A/more.zip")][1]
    assert told["copies"] == [{"path": str(two / "A/3_3.png"), "equal_to": str(two / "A/2_1.png")}]


def test_the_split_is_the_one_that_training_makes(two, told, command, tmp_path):
    config = preset("smoke", DenseConfig).replace(dataset_root=(str(two),), held_out=DenseConfig.held_out)
    _, train, held_out = gather(config, Host())
    fingers = {(d["name"], f) for d in told["databases"] for f in d["held_out"]}
    assert fingers == {p.identity for p in held_out.prints} and len(fingers) == 4
    assert told["training"] == {"prints": len(train), "fingers": 5}
    assert told["held_out"] == {"prints": len(held_out), "fingers": 4}
    others = [read_json(command("prints", two, "--json", "--data_seed", seed, cwd=tmp_path)) for seed in range(1, 4)]
    assert any({(d["name"], f) for d in other["databases"] for f in d["held_out"]} != fingers for other in others)


def test_the_table_says_the_same(two, command, tmp_path):
    said = command("prints", two, cwd=tmp_path)
    assert said.code == 0 and not said.err, said
    rows = {line.split()[0]: " ".join(line.split()) for line in said.out.splitlines() if line.strip()}
    assert rows["A"].startswith("A 5 × 2 10 220 × 240 500 (file's tag) ")
    assert rows["B"].startswith("B 4 × 3 to 4 13 210 × 200 and 1 other size 500 (assumed) ")
    assert "left out: an image that cannot be read: 1, such as" in said.out and "3_3.png (as " in said.out
    assert "\n12 prints of 5 fingers to train on, 11 prints of 4 fingers held out\n" in said.out


def test_stdout_is_json_and_nothing_else(two, process, tmp_path):
    said = process(
        "-m",
        "ifvit.prints",
        two,
        "--json",
        "--sheet",
        tmp_path / "sheet.png",
        cwd=tmp_path,
        IFVIT_CACHE=str(tmp_path / "cache"),
    )
    assert said.code == 0 and json.loads(said.out)["prints"] == 23
    assert "Preparing 25 prints" in said.err and (tmp_path / "sheet.png").exists()


# --- the sheet


def test_a_sheet_shows_every_print_with_the_outline_of_its_mask(two, command, tmp_path):
    said = command("prints", two, "--sheet", "new/sheet.png", cwd=tmp_path)
    assert said.code == 0, said
    sheet = np.asarray(Image.open(tmp_path / "new/sheet.png"))
    assert sheet.shape[1] == COLUMNS * SIDE  # 23 prints: three rows, the last of three
    row = sheet.shape[0] // 3
    red = sheet[..., 0].astype(int) - sheet[..., 1] > 100
    places = [(r * row, c * SIDE) for r in range(3) for c in range(COLUMNS)]
    shown = [bool(red[y : y + SIDE, x : x + SIDE].any()) for y, x in places]
    assert shown == [True] * 23 + [False] * 7
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_a_sheet_shows_as_many_prints_of_each_database_as_there_is_room_for():
    databases = ["large"] * 500 + ["small"] * 4 + ["medium"] * 100
    chosen = spread(databases, MOST)
    assert len(chosen) == len(set(chosen)) == MOST
    assert [sum(databases[i] == name for i in chosen) for name in ("large", "small", "medium")] == [28, 4, 28]
    large = [i for i in chosen if i < 500]
    assert max(np.diff(large)) <= 18 and large[-1] > 480  # from its first finger to its last
    assert spread(["one"] * 3, MOST) == [0, 1, 2]
    assert len(spread([str(i) for i in range(100)], MOST)) == MOST


# --- what is wrong


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "No folder is named"),
        (("nowhere",), "no folder nowhere"),
        (("{two}", "--ppi", "-1"), "--ppi is -1"),
        (("{two}", "--held_out", "1.5"), "--held_out is 1.5"),
        (("{two}", "--names", "{{finger}}-x"), "--names '{finger}-x' fits none"),
        (("{two}", "--sheets", "x"), "did you mean --sheet?"),
        (("{two}", "--sheet", "/dev/null/sheet.png"), "cannot be written"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(two, command, tmp_path, words, said):
    found = command("prints", *(w.format(two=two) for w in words), cwd=tmp_path)
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1, found


def test_prints_that_training_would_refuse_are_shown_and_it_is_said(two, command, tmp_path):
    (tmp_path / "few").mkdir()
    for i in range(1, 4):
        shutil.copy(two / f"B/1_{i}.png", tmp_path / "few")
    (tmp_path / "few/2_1.png").write_bytes(b"")
    said = command("prints", tmp_path / "few", cwd=tmp_path)
    assert said.code == 0, said
    assert "Training needs two fingers or more" in said.out and "Training refuses more than 10%" in said.out


def test_of_light_ridges_it_is_said(two, command, tmp_path):
    for f in range(1, 5):
        image = drawn(f, 240, 220, 9.0)
        Image.fromarray(255 - np.asarray(image)).save(tmp_path / f"{f}_1.png")
    said = command("prints", tmp_path, cwd=tmp_path)
    assert "seem to be light" in said.out and "--ridges light" in said.out


def test_a_resolution_that_the_ridges_contradict_is_said_with_the_one_that_fits(command, tmp_path):
    """Ridges 18 px apart at 500 ppi are twice an adult's: 1000 ppi fits."""
    for f in range(1, 7):
        drawn(f, 480, 440, 18.0).save(tmp_path / f"{f}_1.png")
    found = read_json(command("prints", tmp_path, "--json", cwd=tmp_path))
    (database,) = found["databases"]
    assert database["suggested_ppi"] == pytest.approx(1000, rel=0.05) and database["fitting_ppi"] == 1000
    assert any("1000 ppi would fit" in remark and "--ppi auto" in remark for remark in found["remarks"])
    (database,) = read_json(command("prints", tmp_path, "--json", "--ppi", "auto", cwd=tmp_path))["databases"]
    assert database["ppi"] == [{"ppi": 1000, "from": "the ridges", "prints": 6}] and database["fitting_ppi"] is None


def test_it_says_what_share_of_a_print_the_window_sees(command, tmp_path):
    for f in range(1, 5):
        drawn(f, 480, 440, 9.0).save(tmp_path / f"{f}_1.png")
    (database,) = read_json(command("prints", tmp_path, "--json", cwd=tmp_path))["databases"]
    y, x = np.mgrid[-240:240, -220:220]  # the outline that `drawn` gives a print, and the window of 320 px
    inside = np.hypot(x / 440, y / 480) < 0.45  # the mask reaches a few px beyond
    assert database["seen"] == pytest.approx(inside[80:-80, 60:-60].sum() / inside.sum(), abs=0.05)


# --- runs log the same


def three_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("Prints: ", "Scale: ", "Left out: "))]


def test_training_logs_the_same_in_three_lines(two, started, tmp_path):
    said, _, _ = started("train_dense", "--preset", "smoke", "--dataset_root", two, cwd=tmp_path, create=False)
    prints, scale, left_out = three_lines(said.out)
    assert prints == "Prints: 23 of 9 fingers in 2 databases: A 5 × 2, B 4 × 3 to 4"
    assert re.search(r"A 220 × 240 px, ppi 500 \(file's tag\), ridges (8.[89]|9.[012]) px apart; B 210 × 200 ", scale)
    assert "B 210 × 200 and 1 other size px, ppi 500 (assumed), ridges " in scale
    for part in ("archive", "6_1.png", "3_3.png", "prints of 4 fingers held out"):
        assert part in left_out


def test_generated_prints_are_in_it(started, tmp_path):
    said, _, _ = started("train_dense", "--preset", "smoke", cwd=tmp_path, create=False)
    prints, scale, left_out = three_lines(said.out)
    assert prints == "Prints: 12 of 6 fingers: synthetic 6 × 2"
    assert "ppi 500" in scale
    assert left_out == "Left out: nothing. 6 prints of 3 fingers to train on, 6 prints of 3 fingers held out"


def test_evaluation_logs_the_same_without_a_split(two, command, monkeypatch, tmp_path):
    scorer = SimpleNamespace(config=preset("smoke", DenseConfig), trained_on=[], card=lambda: [])
    monkeypatch.setattr("ifvit.scoring.scorer.Scorer.from_checkpoint", lambda path: scorer)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"databases": {}})
    monkeypatch.setattr(evaluate, "print_table", lambda result: None)
    said = command("evaluate", "--checkpoint", "any", "--dataset_root", two, "--out", tmp_path / "out", cwd=tmp_path)
    assert said.code == 0, said
    prints, _, left_out = three_lines(said.out)
    assert prints.startswith("Prints: 23 of 9 fingers in 2 databases: A 5 × 2")
    assert "archive" in left_out and "held out" not in left_out
