"""Decoded prints in the cache: found again, made again where damaged, and told where they cannot be written."""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ifvit import cli
from ifvit.data import prepare as preparing
from ifvit.data import synthetic
from ifvit.data.canvases import ABANDONED, remove_abandoned, writing_to
from ifvit.data.prepare import decoded, prepare
from ifvit.data.sources import read_root, read_roots
from ifvit.errors import UserError

SIDE = 128  # px, of a canvas


def canvases(prints, cache) -> list[np.ndarray]:
    found = prepare(prints, SIDE, 0.0, cache)
    return [np.array(part) for i in range(len(found)) for part in found.canvas(i)]


def pieces(cache: Path, end: str) -> list[Path]:
    return sorted((cache / "canvases").glob(f"*{end}"))


@pytest.fixture
def decodings(monkeypatch):
    """Paths of the files that are decoded."""
    paths = []
    real = preparing.read_picture
    monkeypatch.setattr(preparing, "read_picture", lambda path: (paths.append(path), real(path))[1])
    return paths


# --- found again


def test_a_print_is_decoded_once_whatever_it_is_read_with(prints, tmp_path, decodings):
    first = prepare(read_root(prints / "DB1"), SIDE, 0.0, tmp_path)
    assert len(decodings) == 9
    both = prepare(read_root(prints), SIDE, 0.0, tmp_path)
    assert len(decodings) == 18 and len(set(decodings)) == 18
    prepare(read_root(prints / "DB2"), SIDE, 0.0, tmp_path)
    assert len(decodings) == 18
    for i, p in enumerate(first.prints):
        np.testing.assert_array_equal(first.canvas(i)[0], both.canvas([q.path for q in both.prints].index(p.path))[0])


def test_what_a_canvas_depends_on_makes_another_one(prints, tmp_path, decodings):
    root = shutil.copytree(prints / "DB1", tmp_path / "DB1")
    for read in (lambda: read_root(root), lambda: read_root(root, 400), lambda: read_roots([root], ridges="light")):
        for _ in range(2):
            prepare(read(), SIDE, 0.0, tmp_path / "cache")
    assert len(decodings) == 27
    prepare(read_root(root), 2 * SIDE, 0.0, tmp_path / "cache")
    assert len(decodings) == 36
    shutil.copy(root / "1_1.png", root / "2_2.png")  # another print under a name that was there
    assert prepare(read_root(root), SIDE, 0.0, tmp_path / "cache") and len(decodings) == 45


def test_an_image_that_cannot_be_read_moves_no_other_print(prints, tmp_path):
    root = shutil.copytree(prints / "DB1", tmp_path / "DB1")
    whole = prepare(read_root(root), SIDE, 0.0, tmp_path / "cache")
    (root / "1_2.png").write_bytes(b"no image")
    rest = prepare(read_root(root), SIDE, 1.0, tmp_path / "cache")
    names = [Path(p.path).name for p in whole.prints]
    assert [Path(p.path).name for p in rest.prints] == [name for name in names if name != "1_2.png"]
    for i, p in enumerate(rest.prints):
        np.testing.assert_array_equal(rest.canvas(i)[0], whole.canvas(names.index(Path(p.path).name))[0])


# --- made again


def cut(path: Path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path):
    with open(path, "ab") as file:
        file.write(b"x")


def spoil(path: Path):
    path.write_bytes(b"{" + path.read_bytes()[1:])


def filled_with(content: bytes):
    return lambda path: path.write_bytes(content)


OF_ARRAYS = [Path.unlink, cut, lengthen, spoil, filled_with(b"")]
OF_RECORDS = [cut, filled_with(b"{}"), filled_with(b'{"prints": []}'), filled_with(b"\xff")]


@pytest.mark.parametrize(
    "end, damage",
    [
        *((end, damage) for end in (".canvas.npy", ".mask.npy") for damage in OF_ARRAYS),
        *((".json", damage) for damage in OF_RECORDS),
    ],
)
def test_a_damaged_cache_is_told_and_made_again(prints, tmp_path, caplog, end, damage):
    good = canvases(read_root(prints / "DB1"), tmp_path)
    (piece,) = pieces(tmp_path, end)
    damage(piece)
    caplog.clear()
    again = canvases(read_root(prints / "DB1"), tmp_path)
    assert "damaged" in caplog.text and "made again" in caplog.text
    for a, b in zip(good, again, strict=True):
        np.testing.assert_array_equal(a, b)
    caplog.clear()
    canvases(read_root(prints / "DB1"), tmp_path)
    assert "damaged" not in caplog.text


def test_a_cache_without_its_record_is_made_again(prints, tmp_path, decodings):
    prepare(read_root(prints / "DB1"), SIDE, 0.0, tmp_path)
    pieces(tmp_path, ".json")[0].unlink()
    prepare(read_root(prints / "DB1"), SIDE, 0.0, tmp_path)
    assert len(decodings) == 18


def test_several_may_fill_the_cache_at_once(prints, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        all_of_them = list(pool.map(lambda _: canvases(read_root(prints / "DB1"), tmp_path), range(4)))
    for other in all_of_them[1:]:
        for a, b in zip(all_of_them[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(list((tmp_path / "canvases").iterdir())) == 3  # no part is left


def test_parts_that_a_killed_process_left_are_removed_when_they_are_old(tmp_path):
    old, young, whole = (tmp_path / name for name in ("1.canvas.npy.0f", "2.canvas.npy.0f", "3.canvas.npy"))
    for path in (old, young, whole):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - (0 if path == young else 2 * ABANDONED),) * 2)
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == [young, whole]


@pytest.mark.parametrize("damage", [Path.unlink, cut, filled_with(b"")])
def test_a_generated_print_that_is_damaged_is_made_again(tmp_path, caplog, damage):
    files = synthetic.prints(0, 2, 1, tmp_path)
    good = [f.read_bytes() for f in files]
    damage(files[1])
    assert synthetic.prints(0, 2, 1, tmp_path) == files and [f.read_bytes() for f in files] == good
    assert ("damaged" in caplog.text) == (damage is not Path.unlink)


# --- told


ON_A_DISK = """
import pathlib, sys
from ifvit import cli
from ifvit.data import synthetic
from ifvit.data.prepare import prepare
from ifvit.data.sources import read_root
cache = pathlib.Path(sys.argv[1])
calls = {
    "real": lambda: prepare(read_root(sys.argv[3]), 128, 0.0, cache),
    "generated": lambda: synthetic.prints(0, 1, 3, cache),
}
print(*cli.outcome(calls[sys.argv[2]]))
print("left:", sum(p.is_file() for p in cache.rglob("*")))
"""


def on_a_disk(commands: str, *words) -> str:
    """What `ON_A_DISK WORDS` says after `commands`, in a mount namespace of its own."""
    script = f"{commands} && exec {sys.executable} -c '{ON_A_DISK}' {' '.join(map(str, words))}"
    ended = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=60)
    if "unshare" in ended.stderr or "mount" in ended.stderr:
        pytest.skip(f"nothing can be mounted here: {ended.stderr.strip()}")
    assert "Traceback" not in ended.stderr and ended.returncode == 0, ended
    return ended.stdout


@pytest.mark.run
@pytest.mark.parametrize(
    "kind, size", [("real", "100k"), ("real", "148k"), ("generated", "20k"), ("generated", "156k")]
)
def test_a_full_disk_is_told_in_a_sentence_and_nothing_half_written_is_left(prints, tmp_path, kind, size):
    """From the start, or near the end: 9 canvases of 16 kB with masks and record, 3 files of 200 kB in all."""
    said = on_a_disk(f"mount -t tmpfs -o size={size} none {tmp_path}", tmp_path, kind, prints / "DB1").splitlines()
    assert said[-2].startswith("2 The disk of the cache") and "No space left" in said[-2] and "IFVIT_CACHE" in said[-2]
    assert said[-1] == ("left: 2" if (kind, size) == ("generated", "156k") else "left: 0")  # whole files stay


def test_a_read_only_cache_serves_what_it_has_and_else_is_told(prints, tmp_path):
    prepare(read_root(prints / "DB1"), SIDE, 0.0, tmp_path)
    read_only = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    assert on_a_disk(read_only, tmp_path, "real", prints / "DB1").startswith("0")
    said = on_a_disk(read_only, tmp_path, "real", prints / "DB2").splitlines()[-2]
    assert said.startswith("2 The cache") and "Read-only" in said and "IFVIT_CACHE" in said


def test_a_file_where_the_cache_belongs_is_told(prints, tmp_path):
    (tmp_path / "cache").write_text("")
    cache = tmp_path / "cache"
    for call in (lambda: prepare(read_root(prints), SIDE, 0.0, cache), lambda: synthetic.prints(0, 1, 1, cache)):
        with pytest.raises(UserError, match="a file is in the way. Set IFVIT_CACHE to a folder"):
            call()


def test_what_else_goes_wrong_while_the_cache_is_written_is_a_defect(tmp_path):
    with pytest.raises(OSError, match="Too many open files"), writing_to(tmp_path):
        raise OSError(24, os.strerror(24))


@pytest.mark.parametrize("why", ["a file is in the way", "the disk is full"])
def test_a_cache_for_compiled_programs_that_cannot_be_kept_stops_no_command(tmp_path, caplog, monkeypatch, why):
    before = jax.config.jax_compilation_cache_dir
    if why == "the disk is full":
        monkeypatch.setattr("ifvit.cli.shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=10**6))
    else:
        (tmp_path / "cache").write_text("")
    cli.use_compilation_cache(tmp_path / "cache" / "compiled")
    assert "Compiled programs are not kept" in caplog.text and "IFVIT_CACHE" in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


def test_a_full_disk_ends_the_work_soon(prints, tmp_path, decodings, monkeypatch):
    """Not after all prints have been decoded."""

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(preparing, "AHEAD", 2)
    monkeypatch.setattr("ifvit.data.canvases.np.ascontiguousarray", full)
    with pytest.raises(UserError, match="disk of the cache"):
        decoded(read_root(prints), SIDE, tmp_path)
    assert len(decodings) <= 2 and not list((tmp_path / "canvases").iterdir())
