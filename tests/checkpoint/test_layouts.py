"""A checkpoint is the same whatever devices and processes write it, and comes back on any others."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import layouts
import pytest
from layouts import FAILURES, META, ONE, TWO, WHOLE

from ifvit import checkpoint

pytestmark = pytest.mark.process
WORKER = Path(layouts.__file__)
Q = "params/loftr_transformer/layer_0/q_proj/kernel"
MERGE = "params/loftr_transformer/layer_0/merge/kernel"


def run(*commands: list) -> list[dict]:
    """What the worker says, one process a command, all at once; they are killed where they take minutes."""
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, *map(str, words)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for words in commands
    ]
    try:
        said = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    for p, (_, err) in zip(processes, said):
        assert p.returncode == 0, err[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process with eight devices says, and beside it one that trains."""
    return run(["one", folder / "of one"], ["steps", folder])


@pytest.fixture(scope="module")
def one(alone):
    return alone[0]


@pytest.fixture(scope="module")
def two(folder, alone):
    """What two processes with two devices each say."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return run(*(["two", folder, rank, port] for rank in (0, 1)))


def metadata(path: Path) -> dict:
    return checkpoint.read_metadata(checkpoint.locate(path))


# ---- one process


def test_digests_do_not_depend_on_the_layout(folder, one, tmp_path):
    # These are numpy's arrays, on no device.
    checkpoint.save(tmp_path / "host", "dense_reg", layouts.saved_tree(layouts.STATE, layouts.TASK), META)
    want = metadata(tmp_path / "host")["digests"]
    assert len(want) > 200
    for layout in WHOLE:
        assert metadata(folder / "of one" / layout)["digests"] == want, layout
    for layout in ONE:
        some = metadata(folder / "of one/some" / layout)["digests"]
        assert len(some) == one["some"] and some.items() <= want.items(), layout


def test_every_layout_restores_on_every_other_to_the_bit_where_it_was_asked_to(one):
    """Every pair with a leaf of each kind (shape and sharding), and every layout once with all that there are."""
    assert one["some"] > 12
    assert len(one["pairs"]) == len(ONE) ** 2 and len(one["whole"]) == len(ONE)
    assert {pair: wrong for pair, wrong in (one["pairs"] | one["whole"]).items() if wrong} == {}


@pytest.mark.parametrize("layout", ONE)
def test_the_model_axis_splits_parameters_and_moments(one, layout):
    model = int(layout[-1])
    shards = one["shards"][layout]
    for above in ("", "opt_state/1/0/mu/", "opt_state/1/0/nu/"):
        q, merge = (
            f"state/{above}{n}" if not above else f"state/{above}{n.removeprefix('params/')}" for n in (Q, MERGE)
        )
        assert shards[q] == [16, 16 // model] and shards[merge] == [16 // model, 16]
    assert shards["state/params/resnet/stem/conv/kernel"][-1] == 8 // model
    assert shards["state/params/loftr_transformer/layer_0/norm1/scale"] == [16]


def test_metadata_tell_how_the_writer_had_split_them(folder, one):
    assert metadata(folder / "of one/8x1")["shardings"] == {}
    split = metadata(folder / "of one/2x4")["shardings"]
    assert split[f"state/{Q}"].endswith("(None, 'model')") and split[f"state/{MERGE}"].endswith("('model', None)")


@pytest.mark.parametrize("layout", ["2x2", "1x4"])
def test_a_step_on_any_layout_gives_the_same_state_but_for_rounding(alone, layout):
    moved, apart = alone[1]["moved"], alone[1]["apart"]
    assert min(v for n, v in moved.items() if n.startswith("state/params/")) > 1e-4  # there is something to compare
    assert {n: v for n, v in apart[layout].items() if v > (1e-4 if "/mu/" in n else 1e-5)} == {}  # mu: gradients alone
    assert set(apart["1x1"].values()) == {0}


# ---- two processes


def test_there_are_two_processes(two):
    assert [(t["processes"], t["devices"]) for t in two] == [(2, 4)] * 2


@pytest.mark.parametrize("layout", TWO)
def test_two_processes_write_the_digests_that_one_writes(folder, two, layout):
    assert metadata(folder / "of two" / layout)["digests"] == metadata(folder / "of one/1x1")["digests"]


def test_two_processes_restore_what_one_or_two_saved(two):
    for said in two:
        assert len(said["pairs"]) == len(TWO) * (len(ONE) + len(TWO)) and len(said["whole"]) == len(TWO)
        assert {pair: wrong for pair, wrong in (said["pairs"] | said["whole"]).items() if wrong} == {}


@pytest.mark.parametrize("layout", TWO)
def test_one_device_restores_what_two_processes_saved(folder, two, layout):
    assert jax.device_count() == 1
    assert layouts.restored(folder / "of two" / layout, "1x1")[1] == []


def test_a_process_asks_for_its_part_of_what_is_split_and_no_more(two):
    for said in two:
        split = {n: asked for n, (asked, _, whole) in said["asked"].items() if not whole}
        sizes = {n: size for n, (_, size, _) in said["asked"].items()}
        assert len(split) > 5
        assert {n: asked for n, asked in split.items() if asked != sizes[n] // 2} == {}  # two of four devices
        assert all(asked == size for asked, size, whole in said["asked"].values() if whole)  # once for all devices


def test_a_process_reads_its_part_of_the_files_and_no_more(two):
    for read in (said["read"] for said in two):
        assert read["in four"] < 0.51 * read["size"] and read["in two"] < 0.51 * read["size"]
        assert read["size"] <= read["whole"] < 1.01 * read["size"]


def test_two_processes_restore_a_matcher_with_its_aligner(two):
    assert [said["aligner"] for said in two] == [[], []]


@pytest.mark.parametrize("harm", ["flipped", "cut"])
def test_damage_to_one_processs_part_is_said_by_both(two, harm):
    first, second = (re.sub(r" \(.*\)", "", said["damaged"][harm]) for said in two)  # but for the reason
    assert first == second
    assert first.startswith("Damaged: Checkpoint ")
    if harm == "flipped":
        assert f"1 of {len(two[0]['asked'])} leaves, e.g. {two[0]['damaged']['leaf']};" in first


@pytest.mark.parametrize("where, method, rank", FAILURES)
def test_a_write_that_fails_on_one_process_fails_on_both(two, where, method, rank):
    said = [t["failed"][where] for t in two]
    assert "saved" not in [s["first"] for s in said]
    assert "No space left on device" in said[rank]["first"]
    assert [s["before"] for s in said] == [[], []]  # the checkpoint of before is where it was


@pytest.mark.parametrize("where, method, rank", FAILURES)
def test_after_a_write_that_failed_the_next_one_works(two, where, method, rank):
    for found in (t["failed"][where] for t in two):
        assert (found["again"], found["after"]) == ("saved", [])


def test_of_writes_that_failed_nothing_is_left(two):
    assert two[0]["failed"]["left"] == ["dense_reg_ckpt"]
