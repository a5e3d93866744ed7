"""A gallery's folder: what is added is there once, what is removed is gone, whoever is killed or writes beside."""

import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from enrolling import WIDTH, entry, template

from ifvit.errors import UserError
from ifvit.gallery import pictures, rows, store
from ifvit.gallery.store import Entry, Gallery

KILLS = int(os.environ.get("IFVIT_KILLS", 20))
SCRIPT = Path(__file__).with_name("enrolling.py")


@pytest.fixture
def gallery(tmp_path):
    return Gallery.create(tmp_path / "g", "checkpoint", WIDTH)


def filled(gallery, names, version=0, replace=False):
    gallery.add([entry(n, version) for n in names], np.stack([template(n, version) for n in names]), replace)


def check(gallery, expected):
    """The gallery has these names with these versions, each once, with its own template, digest and picture.

    Of many the templates of some are looked for.
    """
    assert len(gallery) == len(expected)
    told = {n: (f"digest {v}", f"{n} {v}".encode()) for n, v in expected.items()}
    assert {e.name: (e.digest, e.picture) for e in gallery.all()} == told
    for name in random.Random(0).sample(sorted(expected), min(50, len(expected))):
        (found,) = gallery.likest(template(name, expected[name])[None], 1)
        assert found.name == name


def test_what_is_enrolled_is_found_by_its_template(gallery):
    filled(gallery, ["1_1", "1_2", "2_1"])
    filled(gallery, ["3_1"])
    check(gallery, dict.fromkeys(["1_1", "1_2", "2_1", "3_1"], 0))
    assert gallery.fingers == 3 and len(gallery.likest(template("1_1", 0)[None], 10)) == 4


def test_the_best_turn_of_a_probe_counts(gallery):
    filled(gallery, ["1_1", "2_1", "3_1"])
    turns = np.stack([template("no one", 5), template("2_1", 0), template("no one", 6)])
    assert gallery.likest(turns, 1)[0].name == "2_1"


def test_removed_and_replaced_prints_are_gone_before_and_after_compacting(gallery):
    filled(gallery, [f"{f}_1" for f in range(1, 9)])
    gallery.remove(["2_1", "3_1"])
    filled(gallery, ["4_1"], version=1, replace=True)
    expected = {f"{f}_1": int(f == 4) for f in (1, 4, 5, 6, 7, 8)}
    check(gallery, expected)
    assert gallery.compact() == 3
    check(gallery, expected)
    assert [f.name for f in gallery.folder.glob("templates_*")] == ["templates_1.rows"]
    filled(gallery, ["9_1"])
    check(gallery, expected | {"9_1": 0})


def test_a_name_is_enrolled_once_and_all_or_none_of_an_addition(gallery):
    filled(gallery, ["1_1"])
    with pytest.raises(UserError, match="1_1 is enrolled already"):
        filled(gallery, ["5_1", "1_1"], version=1)
    with pytest.raises(UserError, match="5_1 is not enrolled"):
        gallery.remove(["1_1", "5_1"])
    check(gallery, {"1_1": 0})


def test_another_checkpoints_gallery_is_refused(gallery):
    for again in (Gallery.open, lambda folder, digest: Gallery.create(folder, digest, WIDTH)):
        with pytest.raises(UserError, match="made with another checkpoint"):
            again(gallery.folder, "another")
    assert Gallery.open(gallery.folder, "checkpoint").width == WIDTH


def test_what_is_no_gallery_is_told(tmp_path):
    with pytest.raises(UserError, match="There is no gallery at"):
        Gallery.open(tmp_path)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is no gallery, and not empty"):
        Gallery.create(tmp_path, "checkpoint", WIDTH)
    (tmp_path / store.NAME).write_bytes(b"no database at all, but long enough to be looked at" * 10)
    with pytest.raises(UserError, match="is damaged"):
        Gallery.open(tmp_path)


@pytest.mark.parametrize("at", [30, 100, 4096, 8192, 12288])
def test_a_damaged_database_is_told_in_a_sentence_or_tells_what_was_enrolled(gallery, at):
    filled(gallery, [f"{f}_1" for f in range(200)])
    gallery._db.close()
    file = gallery.folder / store.NAME
    data = bytearray(file.read_bytes())
    data[at : at + 60] = bytes(60)
    file.write_bytes(data)
    try:
        found = Gallery.open(gallery.folder, "checkpoint")
        assert all(e.digest == "digest 0" for e in found.entries()) and len(found.all()) <= 200
    except UserError as e:
        assert "is damaged" in str(e) or "another checkpoint" in str(e)


def test_a_gallery_from_before_there_were_subjects_is_opened(gallery):
    filled(gallery, ["1_1", "2_1"])
    with sqlite3.connect(gallery.folder / store.NAME) as db:
        db.execute("ALTER TABLE prints DROP COLUMN subject")
        db.execute("UPDATE meta SET value = '1' WHERE key = 'format'")
    again = Gallery.open(gallery.folder, "checkpoint")
    filled(again, ["3_1"])
    check(again, dict.fromkeys(["1_1", "2_1", "3_1"], 0))
    assert {e.subject for e in again.entries()} == {""}
    assert again.fingers_of_persons() == {("DB", finger): 1 for finger in "123"}


def test_fingers_of_a_person_are_counted(gallery):
    some = [Entry(f"{s}_{f}_{i}", f"{s}{f}{i}", "DB", f"{s}_{f}", b"", s) for s in "ab" for f in "12" for i in "12"]
    gallery.add(some[:-2], np.zeros((6, WIDTH), np.float32))
    assert gallery.fingers_of_persons() == {("DB", "a"): 2, ("DB", "b"): 1} and gallery.fingers == 3


def test_a_cut_array_is_told_and_nothing_is_added_to_it(gallery):
    filled(gallery, ["1_1", "2_1"])
    (array,) = gallery.folder.glob("templates_*")
    array.write_bytes(array.read_bytes()[:-4])
    with pytest.raises(UserError, match="missing or cut"):
        gallery.likest(template("1_1", 0)[None], 1)
    with pytest.raises(UserError, match="missing or cut"):
        filled(gallery, ["3_1"])
    assert len(gallery) == 2


def test_a_gallery_that_another_process_holds_is_told(gallery, monkeypatch):
    holder = sqlite3.connect(gallery.folder / store.NAME, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="cannot be written .* another process may hold it"):
        filled(Gallery.open(gallery.folder), ["1_1"])
    holder.execute("ROLLBACK")
    filled(gallery, ["1_1"])


def test_prints_without_templates_are_all_there(tmp_path):
    gallery = Gallery.create(tmp_path / "g", "checkpoint", 0)
    gallery.add([entry("1_1", 0), entry("2_1", 0)], np.zeros((2, 0), np.float32))
    gallery.remove(["1_1"])
    assert gallery.compact() == 1 and [e.name for e in gallery.all()] == ["2_1"]


def after(lines: list[str], before: dict[str, int]) -> list[dict[str, int]]:
    """What may be enrolled once a process has said these lines: all it did, and with or without what it last began."""
    now = dict(before)
    states = [now]
    for line, following in zip(lines, [*lines[1:], ""]):
        if line == "done":
            continue
        deed, n, *names = line.split()
        done = {k: v for k, v in now.items() if k not in names} if deed == "remove" else dict(now)
        if deed in ("add", "replace"):
            done |= dict.fromkeys(names, int(n))
        states, now = ([done], done) if following == "done" else ([now, done], now)
    return states


def test_a_picture_comes_back_to_the_bit_and_a_damaged_one_is_told():
    rng = np.random.default_rng(0)
    canvas, mask = rng.integers(0, 255, (64, 64)).astype(np.uint8), rng.random((8, 8)) > 0.5
    png = pictures.as_png(canvas, mask)
    for found, expected in zip(pictures.of_png(png), (canvas, mask)):
        np.testing.assert_array_equal(found, expected)
    probe = SimpleNamespace(prints=(None,), canvas=lambda i: (canvas, mask))
    assert pictures.Enrolled(probe, []).canvas(0)[0] is canvas
    for broken in (png[:-40], b"", png[:50] + bytes(60) + png[110:]):
        with pytest.raises(UserError, match="picture of 1_1 is damaged; take it out"):
            pictures.Enrolled(probe, [Entry("1_1", "", "DB", "1", broken)]).canvas(1)


def test_likeness_is_the_cosine_with_the_likest_turn_within_the_rounding():
    rng = np.random.default_rng(0)
    unit = lambda *shape: (x := rng.normal(size=shape)) / np.linalg.norm(x, axis=-1, keepdims=True)
    templates, probes = unit(5000, 256).astype(np.float32), unit(7, 256).astype(np.float32)
    found = rows.likeness(rows.as_rows(templates), probes)
    np.testing.assert_allclose(found, (templates @ probes.T).max(1), atol=0.01)
    assert np.corrcoef(found, (templates @ probes.T).max(1))[0, 1] > 0.999


@pytest.mark.process
def test_a_kill_loses_and_doubles_nothing_and_what_was_done_stays_done(tmp_path):
    rng, state = np.random.default_rng(1), {}
    for seed in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, tmp_path / "g", str(seed)], stdout=subprocess.PIPE, text=True
        )
        first = process.stdout.readline()
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        *lines, _ = (first + process.stdout.read()).split("\n")  # the last line may be cut, and then was never said
        process.wait()
        gallery = Gallery.open(tmp_path / "g", "checkpoint")
        found = {e.name: int(e.digest.split()[1]) for e in gallery.entries()}
        assert found in after(lines, state)
        check(gallery, found)
        state = found


@pytest.mark.process
def test_two_processes_write_at_once(tmp_path):
    Gallery.create(tmp_path / "g", "checkpoint", WIDTH)
    both = [
        subprocess.Popen([sys.executable, SCRIPT, tmp_path / "g", str(seed), "own"], stdout=subprocess.DEVNULL)
        for seed in (1, 2)
    ]
    gallery = Gallery.open(tmp_path / "g", "checkpoint")
    deadline = time.monotonic() + 60
    while {e.name[0] for e in gallery.entries()} != {"1", "2"} and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    for process in both:
        assert process.poll() is None
        process.kill()
        process.wait()
    found = {e.name: int(e.digest.split()[1]) for e in gallery.entries()}
    assert {name[0] for name in found} == {"1", "2"}
    check(gallery, found)
