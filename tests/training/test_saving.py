"""A run keeps the checkpoints its policy asks for, the best one a copy; what goes wrong with one costs no other."""

import itertools
import logging
import math
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath

from ifvit import checkpoint
from ifvit.checkpoint import handlers
from ifvit.config import Config
from ifvit.errors import UserError
from ifvit.training.policy import Saved, doomed, ranked
from ifvit.training.run_folder import candidates, move_away, set_aside, step_of_name
from ifvit.training.saver import OWNER, TAKEN_OVER, Saver, take

STEPS = 4  # an epoch


def config(save_every=100, keep_last=1, keep_best=1):
    return Config(save_every=save_every, keep_last=keep_last, keep_best=keep_best)


def epoch(n: int, value: float | None = None) -> Saved:
    return Saved(f"m_epoch_{n}", n * STEPS, n, value)


def within(step: int) -> Saved:
    return Saved(f"m_step_{step}", step, None, None)


def final(n: int, value: float | None = None) -> Saved:
    return Saved("m_ckpt", n * STEPS, n, value)


def epochs(*values: float | None) -> list[Saved]:
    return [epoch(n, v) for n, v in enumerate(values, 1)]


def names(*numbers: int) -> list[str]:
    return [f"m_epoch_{n}" for n in numbers]


# ---- names


@pytest.mark.parametrize(
    "name, step",
    [
        ("m_ckpt", math.inf),
        ("m_epoch_3", 12),
        ("m_epoch_0", 0),
        ("m_step_7", 7),
        ("m_best", None),
        ("m_epoch_", None),
        ("m_epoch_3.damaged", None),
        ("m_epoch_3.orbax-checkpoint-tmp", None),
        ("m_epoch_-3", None),
        ("m_epoch_3x", None),
        ("xm_epoch_3", None),
        ("other_ckpt", None),
        ("m_ckpt.pkl", None),
        ("m_step_7.replaced", None),
    ],
)
def test_a_name_tells_how_far_a_checkpoint_is(name, step):
    assert step_of_name(name, "m", STEPS) == step


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path / "run")


def make(folder: epath.Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "content").write_text(name)


def there(folder: epath.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != OWNER)


def test_a_run_goes_on_from_the_furthest(folder):
    make(
        folder,
        "m_epoch_2",
        "m_step_9",
        "m_step_7",
        "m_epoch_10",
        "m_best",
        "m_epoch_3.damaged",
        "other_epoch_99",
        "m_epoch_50.orbax-checkpoint-tmp",
        "before_1",
    )
    (folder / "m_epoch_60").write_text("a file")
    assert [p.name for p in candidates(folder, "m", STEPS)] == ["m_epoch_10", "m_step_9", "m_epoch_2", "m_step_7"]


def test_the_final_one_is_the_furthest(folder):
    make(folder, "m_ckpt", "m_epoch_99")
    assert candidates(folder, "m", STEPS)[0].name == "m_ckpt"


def test_one_that_was_being_replaced_counts_after_the_one_with_its_name(folder):
    make(folder, "m_epoch_3", "m_epoch_3.replaced", "m_epoch_4.replaced", "m_epoch_2")
    assert [p.name for p in candidates(folder, "m", STEPS)] == [
        "m_epoch_4.replaced",
        "m_epoch_3",
        "m_epoch_3.replaced",
        "m_epoch_2",
    ]


def test_nothing_there_is_nothing_to_go_on_from(folder):
    assert candidates(folder, "m", STEPS) == []


def test_a_bad_one_is_renamed_and_never_deleted(folder):
    for n, name in enumerate(("m_epoch_3", "m_epoch_3", "m_epoch_3.replaced")):
        make(folder, name)
        aside = set_aside(folder / name)
        assert aside == folder / ("m_epoch_3.damaged" + (f".{n + 1}" if n else ""))
        assert (aside / "content").read_text() == name
    assert there(folder) == ["m_epoch_3.damaged", "m_epoch_3.damaged.2", "m_epoch_3.damaged.3"]
    assert candidates(folder, "m", STEPS) == []


def test_a_run_that_begins_anew_leaves_the_one_before_whole(folder):
    make(folder, "m_epoch_1", "m_ckpt", "m_best", "m_epoch_2.replaced", "other_ckpt", "m_epoch_3.damaged")
    move_away(folder, "m")
    assert there(folder) == ["before_1", "m_epoch_3.damaged", "other_ckpt"]
    assert there(folder / "before_1") == ["m_best", "m_ckpt", "m_epoch_1", "m_epoch_2.replaced"]
    assert (folder / "before_1/m_ckpt/content").read_text() == "m_ckpt"
    make(folder, "m_epoch_1")
    move_away(folder, "m")
    assert there(folder / "before_2") == ["m_epoch_1"]
    move_away(folder, "m")  # nothing to move
    assert "before_3" not in there(folder)


# ---- policy


@pytest.mark.parametrize("higher, best_first", [(True, [3, 1, 4, 2]), (False, [2, 1, 4, 3])])
def test_the_best_come_first_and_of_equals_the_earlier(higher, best_first):
    saved = epochs(0.5, 0.1, 0.9, 0.5, None) + [within(21)]
    for order in itertools.islice(itertools.permutations(saved), 0, 720, 50):
        assert [s.name for s in ranked(list(order), higher)] == names(*best_first)


@pytest.mark.parametrize(
    "rules, gone",
    [
        (config(), [1, 2, 3, 4, 5]),  # but the newest
        (config(keep_last=3), [1, 2, 3]),
        (config(keep_last=99), []),
        (config(save_every=2), [1, 3, 5]),
        (config(save_every=2, keep_last=2), [1, 3]),
        (config(save_every=1), []),
        (config(keep_best=2), [1, 3, 4]),  # 2 and 5; of the best alone there is a copy
        (config(keep_best=3, keep_last=2), [3, 4]),  # 2, 5 and 1; 5 and 6
        (config(save_every=3, keep_best=2, keep_last=1), [1, 4]),
    ],
)
def test_what_no_rule_keeps_goes(rules, gone):
    saved = epochs(0.6, 0.9, 0.1, 0.2, 0.8, 0.5)
    assert doomed(saved, "m", rules, True) == names(*gone)


def test_lower_may_be_better():
    assert doomed(epochs(0.6, 0.9, 0.1, 0.2, 0.8, 0.5), "m", config(keep_best=2), False) == names(1, 2, 5)


def test_those_within_an_epoch_are_among_the_newest_and_nothing_else():
    saved = [epoch(1, 0.5), within(5), within(6), epoch(2, 0.4), within(9)]
    assert doomed(saved, "m", config(save_every=1), True) == ["m_step_5", "m_step_6"]
    assert doomed(saved, "m", config(keep_last=2), True) == ["m_epoch_1", "m_step_5", "m_step_6"]


def test_the_newest_is_the_furthest_not_the_last_written():
    assert doomed([epoch(3), epoch(1), epoch(2)], "m", config(keep_last=2), True) == names(1)


def test_a_finished_run_keeps_the_final_one_the_periodic_and_the_best():
    saved = epochs(0.6, 0.9, 0.1, 0.2, 0.8) + [final(6, 0.5)]
    assert doomed(saved, "m", config(keep_last=4), True) == names(1, 2, 3, 4, 5)
    assert doomed(saved, "m", config(save_every=2, keep_best=2), True) == names(1, 3)


def test_the_final_one_and_its_epochs_are_one_of_the_best():
    saved = [epoch(1, 0.8), epoch(2, 0.1), epoch(3, 0.9), final(3, 0.9)]
    assert doomed(saved, "m", config(save_every=3, keep_best=2), True) == names(2)


# ---- a run's checkpoints


def tiny(step: int) -> dict:
    return {"params": {"w": jnp.full(3, step, jnp.float32)}, "step": jnp.int32(step)}


def start(saver: Saver, saved: Saved) -> None:
    metadata = {"epoch": saved.step // STEPS, "step": saved.step, "value": saved.value, "config": {}}
    saver.start(saved, tiny(saved.step), metadata, None)


def save(saver: Saver, saved: Saved) -> bool:
    start(saver, saved)
    return saver.settle()


@pytest.fixture
def saver(folder):
    """Makes one; they are closed at the end."""
    made = []

    def call(higher_is_better=True, **rules) -> Saver:
        made.append(Saver(folder, "m", config(**rules), STEPS, higher_is_better))
        return made[-1]

    yield call
    for s in made:
        s.close()


def step_in(path: epath.Path) -> int:
    found = checkpoint.load(path)
    assert found.state["params"]["w"].tolist() == [float(found.metadata["step"])] * 3
    return found.metadata["step"]


def whole(folder: epath.Path) -> list[str]:
    """Names of what is there, every one of them a good checkpoint."""
    for name in there(folder):
        step_in(folder / name)
    return there(folder)


@pytest.mark.parametrize(
    "higher, values, best",
    [(True, [0.5, 0.7, 0.7, 0.6, 0.8], [1, 2, 2, 2, 5]), (False, [0.5, 0.5, 0.4, 0.6, 0.1], [1, 1, 3, 3, 5])],
)
def test_the_best_copy_changes_for_a_better_one_only(saver, folder, higher, values, best):
    run = saver(higher)
    for n, (value, expected) in enumerate(zip(values, best), 1):
        assert save(run, epoch(n, value))
        assert step_in(folder / "m_best") == expected * STEPS
        assert whole(folder) == ["m_best", f"m_epoch_{n}"]


def test_without_validation_there_is_no_best(saver, folder):
    run = saver()
    assert save(run, epoch(1)) and save(run, within(6))
    assert whole(folder) == ["m_step_6"]


def test_after_a_resume_the_earlier_of_equals_stays_and_a_better_one_replaces_it(saver, folder):
    run = saver()
    save(run, epoch(1, 0.7))
    save(run, epoch(2, 0.6))
    run.close()
    again = saver()
    save(again, epoch(3, 0.7))
    assert step_in(folder / "m_best") == 1 * STEPS
    save(again, epoch(4, 0.8))
    assert step_in(folder / "m_best") == 4 * STEPS


def test_a_resumed_run_keeps_and_drops_as_if_it_had_not_stopped(saver, folder):
    values = [0.2, 0.9, 0.1, 0.8, 0.3, 0.4]
    for n, value in enumerate(values, 1):
        run = saver(keep_last=2, keep_best=2, save_every=3)
        save(run, epoch(n, value))
        run.close()
    assert whole(folder) == ["m_best", *names(2, 3, 4, 5, 6)]
    shutil.rmtree(folder)
    run = saver(keep_last=2, keep_best=2, save_every=3)
    for n, value in enumerate(values, 1):
        save(run, epoch(n, value))
    assert whole(folder) == ["m_best", *names(2, 3, 4, 5, 6)]


def test_a_finished_run_leaves_the_best_and_the_final_one(saver, folder):
    run = saver(keep_last=2)
    for saved in (epoch(1, 0.9), within(6), epoch(2, 0.5), final(3, 0.6)):
        assert save(run, saved)
    assert whole(folder) == ["m_best", "m_ckpt"]
    assert step_in(folder / "m_best") == 1 * STEPS


def test_the_best_copy_has_files_of_its_own(saver, folder):
    run = saver()
    save(run, epoch(1, 0.9))
    files = [p for p in Path(folder / "m_epoch_1").rglob("*") if p.is_file()]
    assert len(files) > 5
    for file in files:
        with open(file, "r+b") as f:  # in place, as damage comes
            f.truncate(0)
    assert step_in(folder / "m_best") == 1 * STEPS


def test_half_written_ones_are_not_counted_at_a_resume(saver, folder):
    run = saver(keep_last=2)
    save(run, epoch(1, 0.5))
    run.close()
    make(folder, "m_epoch_2", "m_epoch_3")
    run = saver(keep_last=2)
    save(run, epoch(4, 0.4))
    # The saver deletes nothing that it does not know.
    assert {"m_epoch_1", "m_epoch_2", "m_epoch_3", "m_epoch_4"} <= set(there(folder))


@pytest.mark.parametrize("name", ["run 2", "run*?", "läufe/größe"])
def test_a_run_may_lie_in_a_folder_of_any_name(tmp_path, name):
    folder = epath.Path(tmp_path / name)
    make(folder, "m_epoch_9.orbax-checkpoint-tmp")
    run = Saver(folder, "m", config(), STEPS, True)
    assert save(run, epoch(1, 0.5)) and save(run, epoch(2, 0.4))
    run.close()
    assert whole(folder) == ["m_best", "m_epoch_2"]
    assert [p.name for p in candidates(folder, "m", STEPS)] == ["m_epoch_2"]


def test_a_folder_that_orbax_takes_for_a_pattern_is_refused_before_anything_is_trained(tmp_path):
    """In one with [ it finds none of what it has written: no checkpoint of a whole run would be good."""
    with pytest.raises(UserError, match=r"run \[2\].*another directory"):
        checkpoint.as_writable_path(tmp_path / "run [2]")


# ---- in the background


def test_the_state_may_be_gone_as_soon_as_the_save_has_begun(saver, folder):
    run, state = saver(), tiny(4)
    run.start(epoch(1, 0.5), state, {"epoch": 1, "step": 4, "value": 0.5, "config": {}}, None)
    state["params"]["w"].delete()  # as the next step does, to which it is donated
    assert run.settle()
    assert step_in(folder / "m_epoch_1") == 4


def test_a_save_waits_for_the_one_before_and_that_is_counted(saver, folder, monkeypatch):
    go, order, write = threading.Event(), [], checkpoint.save

    def slow(path, *rest, **more):
        go.wait(10)
        order.append(path.name)
        write(path, *rest, **more)

    monkeypatch.setattr(checkpoint, "save", slow)
    run = saver(keep_last=2)
    start(run, epoch(1))
    first = run.blocked
    assert order == [] and run.last is None
    threading.Timer(0.3, go.set).start()
    start(run, epoch(2))
    assert order[0] == "m_epoch_1" and run.last == "m_epoch_1"
    assert run.blocked - first > 0.2
    run.close()
    assert run.last == "m_epoch_2" and whole(folder) == names(1, 2)


def test_there_is_nothing_to_settle_twice(saver):
    run = saver()
    assert save(run, epoch(1)) and not run.settle()
    assert run.last == "m_epoch_1"


# ---- what fails


class Full(OSError):
    def __init__(self):
        super().__init__(28, "No space left on device")


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "ifvit")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "ifvit"]


def refuse(monkeypatch, owner, name, when=lambda *_: True):
    """Has a function find the disk full, while `when` holds of its arguments; returns what undoes it."""
    plain, on = getattr(owner, name), [True]

    def call(*args, **kwargs):
        if on[0] and when(*args):
            raise Full
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return lambda: on.clear() or on.append(False)


def test_a_write_that_fails_is_said_in_a_line_and_the_next_one_works(saver, folder, monkeypatch, warnings):
    run = saver(keep_last=2)
    save(run, epoch(1, 0.5))
    mend = refuse(monkeypatch, handlers.MetadataHandler, "finalize")
    assert not save(run, epoch(2, 0.6))
    assert warnings() == [
        f"⚠ Checkpoint {folder}/m_epoch_2 could not be written (No space left on device); "
        "training goes on, and the next save tries again."
    ]
    assert run.last == "m_epoch_1" and step_in(folder / "m_best") == 4
    assert whole(folder) == ["m_best", "m_epoch_1"]
    mend()
    assert save(run, epoch(3, 0.6)) and run.last == "m_epoch_3"
    assert whole(folder) == ["m_best", *names(1, 3)] and step_in(folder / "m_best") == 12
    assert len(warnings()) == 1


def test_a_write_that_fails_leaves_the_one_of_its_name(saver, folder, monkeypatch):
    run = saver()
    save(run, final(1, 0.5))
    refuse(monkeypatch, handlers.MetadataHandler, "finalize")
    assert not save(run, final(2, 0.6))
    assert whole(folder) == ["m_best", "m_ckpt"] and step_in(folder / "m_ckpt") == 4


@pytest.mark.parametrize("theirs", ["what this one writes", "another under its name"])
def test_what_is_written_when_another_run_begins_gets_no_name(saver, folder, monkeypatch, warnings, theirs):
    """The other one clears up, and so it may have deleted parts of it."""
    run = saver()
    save(run, epoch(1))
    finalize, begun = handlers.MetadataHandler.finalize, threading.Event()

    def another_begins(*args):
        finalize(*args)
        if not begun.is_set():
            begun.set()
            take(folder)
            if theirs.startswith("another"):
                make(folder, "m_epoch_2", "m_epoch_2.orbax-checkpoint-tmp-copy")

    monkeypatch.setattr(handlers.MetadataHandler, "finalize", another_begins)
    assert not save(run, epoch(2)) and not run.taken_over and begun.is_set()
    assert len(warnings()) == 1 and f"m_epoch_2 could not be written ({TAKEN_OVER})" in warnings()[0]
    if theirs.startswith("another"):
        assert there(folder) == ["m_epoch_1", "m_epoch_2", "m_epoch_2.orbax-checkpoint-tmp-copy"]
        assert (folder / "m_epoch_2/content").read_text() == "m_epoch_2"
    else:
        assert there(folder) == ["m_epoch_1"]
    assert not save(run, epoch(3)) and run.taken_over


def test_what_is_half_deleted_does_not_look_like_a_checkpoint(saver, folder, monkeypatch, warnings):
    run = saver()
    save(run, epoch(1, 0.5))
    mend = refuse(monkeypatch, type(folder), "rmtree", lambda path, *_: "epoch_1" in path.name)
    assert save(run, epoch(2, 0.4))  # it is whole; the one before could not be deleted
    assert len(warnings()) == 1 and "No space left on device" in warnings()[0]
    assert [p.name for p in candidates(folder, "m", STEPS)] == ["m_epoch_2"]
    mend()
    run.close()
    assert save(saver(), epoch(3, 0.3))
    assert whole(folder) == ["m_best", "m_epoch_3"]


@pytest.mark.parametrize("first", [True, False])
def test_what_is_half_copied_does_not_look_like_the_best(saver, folder, monkeypatch, warnings, first):
    run = saver(keep_last=9)
    if not first:
        save(run, epoch(1, 0.5))
    mend = refuse(monkeypatch, type(folder), "copy", lambda path, *_: path.name == "manifest.ocdbt")
    assert save(run, epoch(2, 0.9))
    assert len(warnings()) == 1
    assert whole(folder) == (names(2) if first else ["m_best", *names(1, 2)])
    assert first or step_in(folder / "m_best") == 4  # the one before
    mend()
    assert save(run, epoch(3, 0.1))
    assert step_in(folder / "m_best") == 8  # what was missed is made up for


def test_a_killed_runs_leavings_are_gone_with_the_next_save_and_others_are_not(saver, folder):
    make(
        folder,
        "m_epoch_1.orbax-checkpoint-tmp",
        "m_best.orbax-checkpoint-tmp-copy",
        "m_epoch_2.orbax-checkpoint-tmp-deleted",
        "other_epoch_1.orbax-checkpoint-tmp",
        "m_epoch_3.damaged",
        "m_notes",
    )
    assert save(saver(), epoch(4))
    assert there(folder) == ["m_epoch_3.damaged", "m_epoch_4", "m_notes", "other_epoch_1.orbax-checkpoint-tmp"]


@pytest.mark.parametrize("when", ["before the new best has its name", "before the old best is gone"])
def test_killed_while_the_best_is_replaced_one_of_the_two_is_found(saver, folder, monkeypatch, when):
    run = saver(keep_last=9)
    save(run, epoch(1, 0.5))
    if when.startswith("before the new"):
        refuse(monkeypatch, type(folder), "rename", lambda path, target: target.name == "m_best")
    else:
        refuse(monkeypatch, type(folder), "rmtree", lambda path, *_: path.name == "m_best.replaced" and path.exists())
    save(run, epoch(2, 0.9))
    assert step_in(checkpoint.locate(folder / "m_best")) in (4, 8)


def test_a_damaged_best_is_set_aside_at_the_next_start_and_made_of_what_is_left(saver, folder, warnings):
    run = saver(keep_last=2)
    for n, value in enumerate((0.9, 0.8, 0.5), 1):
        save(run, epoch(n, value))
    run.close()
    for file in Path(folder / "m_best/state").rglob("d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    run = saver(keep_last=2)
    assert len(warnings()) == 1 and f"It is set aside as {folder}/m_best.damaged" in warnings()[0]
    save(run, epoch(4, 0.1))
    assert step_in(folder / "m_best") == 2 * STEPS


def test_a_damaged_best_is_made_anew(saver, folder):
    run = saver(keep_last=9)
    save(run, epoch(1, 0.9))
    (folder / "m_best/metadata/metadata").write_text("{")
    save(run, epoch(2, 0.5))
    assert step_in(folder / "m_best") == 4
