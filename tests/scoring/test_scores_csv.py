"""scores.csv: the very bytes of Python's csv module."""

import csv

import numpy as np
import pytest

from ifvit.data.protocols import Pairs, pairs_all
from ifvit.data.sources import Print
from ifvit.scoring import scores_csv

NAMES = ("a.png", "b c.png", "d,e.png", 'f"g".png', "100%d %s.png", "h\ni.png", "j\rk.png", "é.png", "l\udcff.png")
NUMBERS = [0, -0.0, 1, 0.5, -1 / 3, 1e-5, 1e-4, 0.9999999995, 0.99999999949, 123456789012.0, 1e300, 5e-324, np.nan]


def plainly(file, prints, pairs, scores):
    """A line at a time; the database of a pair is its first print's."""
    writer = csv.writer(file)
    writer.writerow(scores_csv.COLUMNS)
    for n, (a, b, genuine) in enumerate(pairs):
        numbers = (f"{scores[k][n]:.9g}" if k in scores else "" for k in ("score", "global", "local"))
        names = (prints[i].path.removeprefix("/d/") for i in (a, b))
        writer.writerow([prints[a].database, *names, int(genuine), *numbers, int(scores["matches"][n])])


@pytest.mark.parametrize("columns", [("score",), ("score", "global", "local")])
@pytest.mark.parametrize("databases", [("DB1",), ("100%s", 'D,B"', "")])
def test_the_bytes_are_those_of_the_csv_module(databases, columns, tmp_path, monkeypatch):
    monkeypatch.setattr("ifvit.data.protocols.BLOCK", 10)
    prints = [
        Print(f"/d/{name}", database, str(k // 2), str(k), 500.0)
        for database in databases
        for k, name in enumerate(NAMES)
    ]
    pairs = Pairs(tuple(pairs_all(prints)))
    scores = {k: np.resize(np.roll(NUMBERS, n), len(pairs)) for n, k in enumerate(columns)}
    scores |= {"matches": np.arange(len(pairs), dtype=np.float32)}
    if len(columns) > 1:
        scores["local"] = np.random.default_rng(0).random(len(pairs), np.float32)
    found, wanted = tmp_path / "found.csv", tmp_path / "wanted.csv"
    for path, write in ((found, scores_csv.write), (wanted, plainly)):
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            write(file, prints, pairs, scores)
    assert found.read_bytes() == wanted.read_bytes() and len(pairs) == len(databases) * 36
