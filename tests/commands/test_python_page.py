"""docs/python.md holds: its code runs as it stands, on generated prints."""

import os
import re
import shutil
from pathlib import Path

import ifvit

PAGE = Path(__file__).parents[2] / "docs/python.md"


def test_the_code_of_the_page_runs(pipeline, generated, tmp_path, monkeypatch, capsys):
    shutil.copytree(pipeline.module2, tmp_path / "checkpoints/matcher/matcher_ckpt")
    for name, print_ in (("a", (1, 1)), ("b", (1, 2)), ("c", (2, 1))):
        shutil.copy(generated[print_], tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        line = page[: page.index(block)].count("\n")
        exec(compile("\n" * line + block, PAGE, "exec"), names)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(("match ", "no match ")) and said[-1].startswith(
        "nowhere.png cannot be read: No such file"
    )
    assert names["laid"].matches.shape[1] == 4 and len(names["answers"]) == 3
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "c.png", "checkpoints", "why.png"]


def test_the_page_tells_every_field_and_nothing_else():
    fields = [
        word
        for row in re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
        for word in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(fields) == sorted(ifvit.Comparison.__dataclass_fields__)
