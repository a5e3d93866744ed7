"""Two real processes of one run: what they tell each other, what they check at the start, how they stop together."""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ifvit import checkpoint
from ifvit.training.metrics import TIMES, Metrics, in_steps, read_rows
from ifvit.training.pace import slow
from ifvit.training.resume import lost

pytestmark = pytest.mark.process
WORKER = '''
import dataclasses, json, os, shutil, sys
from pathlib import Path
import jax, pytest

rank, port, folder, prints = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from cluster import private
private.cache_every_process()
from cluster.host import Host, SAVE
from ifvit import train_dense
from ifvit.devices import processes
from ifvit.errors import Failure, Interrupted
from ifvit.data import gather
from ifvit.errors import UserError
from ifvit.training import startup

said = {}


def attempt(name, call):
    try:
        said[name] = call()
    except Exception as e:
        said[name] = f"{type(e).__name__}: {e}"


class Process(Host):
    """One of two; asked for something at a certain question."""

    def __init__(self, what=0, at=-1):
        super().__init__()
        self.rank, self.name, self.first_here = rank, f"process {rank}", rank == 0
        self.what, self.at, self.questions, self.whole = what, at, 0, 0

    def asked(self):
        self.questions += 1
        return self.what if self.questions == self.at else 0

    def saved(self):
        self.whole += 1


host = Process()
attempt("exchange", lambda: processes.exchange("x", f"of {rank}"))
attempt("exchange again", lambda: processes.exchange("x", f"again {rank}"))
attempt("same", lambda: processes.require_same("The data", "7 prints", host.name, "mend it."))
attempt("different", lambda: processes.require_same("The data", f"{rank} prints", host.name, "mend it."))


def mistake():
    if rank == 1:
        raise UserError("only here.")
    return "fine"


attempt("a mistake on one", lambda: processes.together("m", mistake, host))
marker = folder / "marker"


def first_writes():
    if rank == 0:
        marker.write_text("")
    return marker.exists()


attempt("the first before the others", lambda: processes.together("o", first_writes, host))

args = train_dense.Args(preset="smoke", dataset_root=(prints,), checkpoint_dir=str(folder / "run"), num_epochs=3)
config, = args.configs(None)
attempt("hosts", lambda: startup.check_hosts(config, host))
attempt("other folders", lambda: (setattr(startup, "PATIENCE", 0.5), startup.check_hosts(
    config.replace(checkpoint_dir=str(folder / f"apart{rank}")), host)))
(folder / "file").write_text("")
attempt("no folder on one", lambda: startup.check_hosts(
    config.replace(checkpoint_dir=str(folder / ("file/below" if rank else "fine"))), host))


roots = shutil.copytree(prints, folder / f"prints{rank}")
if rank == 1:
    next(roots.glob("DB1/*")).unlink()
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gather, "prepare", lambda *_: said.update(decoded=True))
    attempt("other prints", lambda: gather.gather(config.replace(dataset_root=(str(roots),)), host))
said["left"] = sorted(p.name for p in (folder / "run").iterdir())


def train(host):
    return str(train_dense.run(config, "auto", host))


noticed = Process(SAVE, 1 if rank == 0 else -1)   # the first process alone learns that its host will go
stopped = Process(75, 4 if rank == 1 else -1)     # and the second one alone is asked to stop
stopped.asked = lambda first=noticed, then=stopped: max(first.asked(), Process.asked(then))
attempt("stopped", lambda: train(stopped))
said["whole"] = stopped.whole
last = Process()
attempt("end", lambda: train(last))
fourth = Process()
if rank == 0:
    def steal(self=fourth):  # another run begins on the folder in the midst of this one
        (folder / "run2/owner").write_text("somebody else")
        return 0
    fourth.asked = steal
config = config.replace(checkpoint_dir=str(folder / "run2"))
attempt("taken over", lambda: train(fourth))
print(json.dumps(said), flush=True)
os._exit(0)
'''


@pytest.fixture(scope="module")
def two(prints, tmp_path_factory):
    """What each process says, and their run."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port), str(folder), str(prints)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        for rank in (0, 1)
    ]
    try:
        ended = [p.communicate(timeout=400) for p in started]
    finally:
        for p in started:
            p.kill()
    for p, (_, err) in zip(started, ended):
        assert p.returncode == 0, err[-4000:]
    return SimpleNamespace(
        said=[json.loads(out.splitlines()[-1]) for out, _ in ended], out=[out for out, _ in ended], run=folder / "run"
    )


def both(two, what):
    return [said[what] for said in two.said]


def test_processes_hear_each_other(two):
    assert (
        both(two, "exchange") == [["of 0", "of 1"]] * 2 and both(two, "exchange again") == [["again 0", "again 1"]] * 2
    )


def test_what_has_to_be_the_same_is_compared(two):
    assert both(two, "same") == [None, None]
    assert (
        both(two, "different")
        == ["UserError: The data differs between process 0 (0 prints) and process 1 (1 prints); mend it."] * 2
    )


def test_a_mistake_on_one_process_is_one_on_all(two):
    assert both(two, "a mistake on one") == ["UserError: process 1: only here."] * 2


def test_the_first_process_of_a_host_goes_before_the_others(two):
    assert both(two, "the first before the others") == [True, True]


def test_hosts_that_share_a_folder_pass_and_nothing_is_left_there(two):
    assert both(two, "hosts") == [None, None] and two.said[0]["left"] == []


def test_hosts_that_do_not_share_the_folder_are_told_so(two):
    for said in both(two, "other folders"):
        assert said.startswith("UserError: process 1: ") and "does not show what another host has written there" in said


def test_a_host_that_cannot_write_is_named(two):
    for said in both(two, "no folder on one"):
        assert said.startswith("UserError: process 1: Checkpoints cannot be written to ") and "Not a directory" in said


def test_hosts_with_other_prints_are_told_so(two):
    for said in both(two, "other prints"):
        assert re.fullmatch(
            r"UserError: The list of prints differs between process 0 \(18 prints, \w+\) and process 1 \(17 prints, "
            r"\w+\); give a --dataset_root that is the same on every host\.",
            said,
        ), said
    assert not any(said.get("decoded") for said in two.said)


def test_one_that_is_asked_to_stop_stops_all_in_the_same_step(two):
    first, second = both(two, "stopped")
    assert first == second and first.startswith("Interrupted: Stopped at step 4 of 6; saved "), first


def test_one_that_learns_that_its_host_will_go_makes_all_save_and_go_on(two):
    assert "A host will go soon: saving " in two.out[0] and "dense_reg_step_2 at step 2; the run goes on." in two.out[0]
    assert both(two, "whole")[0] >= 2


def test_two_processes_go_on_together_to_the_end(two):
    assert both(two, "end") == [str(two.run / "dense_reg_ckpt")] * 2
    assert "Going on from " in two.out[0] and "Lost: no step that was logged; the checkpoint was written" in two.out[0]
    assert checkpoint.load(two.run / "dense_reg_ckpt").metadata["finished"]


def test_a_run_that_another_has_taken_over_ends(two):
    for said in both(two, "taken over"):
        assert said.startswith("Failure: Another run has begun to write to "), said


def test_two_processes_train_as_one_does(two, command, prints, tmp_path):
    said = command(
        "train_dense",
        "--dataset_root",
        prints,
        "--checkpoint_dir",
        tmp_path / "one",
        "--preset",
        "smoke",
        "--num_epochs",
        3,
        cwd=tmp_path,
    )
    assert said.code == 0, said
    rows = [
        [r for r in read_rows(folder / "metrics.jsonl") if r["split"] != "hosts"]
        for folder in (tmp_path / "one", two.run)
    ]
    one, more = (
        {(r["step"], r["split"], k): v for r in found for k, v in r.items() if k not in (*TIMES, "split", "step")}
        for found in rows
    )
    shared = one.keys() & more.keys()
    assert len(shared) > 20
    for key in shared:  # a row that the interruption split is an average over fewer steps
        if key[0] % 2 == 0 and key[1] == "val":
            assert more[key] == pytest.approx(one[key], rel=1e-3), key
    a, b = (checkpoint.load(folder / "dense_reg_ckpt").state["params"] for folder in (tmp_path / "one", two.run))
    flat_a, flat_b = checkpoint.leaves(a), checkpoint.leaves(b)
    assert max(np.abs(flat_a[n] - flat_b[n]).max() for n in flat_a) < 1e-4


def test_the_hosts_paces_stand_in_the_metrics(two):
    rows = [r for r in read_rows(two.run / "metrics.jsonl") if r["split"] == "hosts"]
    assert [r["step"] for r in rows] == [2, 4, 6]
    assert all(r["host"] == ["process 0", "process 1"] for r in rows)
    for k in ("probe_seconds", "step_seconds", "input_seconds", "checkpoint_seconds", "compile_seconds"):
        assert all(len(r[k]) == 2 for r in rows) and max(max(r[k]) for r in rows) > 0, k


# ---- hosts that are slow, and time that was lost


def pace(host, probe=1.0, waits=0.0):
    return {"host": host, "probe_seconds": probe, "input_seconds": waits}


def test_a_slow_host_is_named_with_what_it_is_slow_at():
    said = [pace("a"), pace("b", probe=1.1), pace("c", probe=2.5), pace("d", waits=4.0)]
    found = slow(said, seconds=10.0)
    assert found.keys() == {"c", "d"}
    assert "c is slow: its device takes 2.5 times as long" in found["c"]
    assert "d is slow: it waits for its prints for 4.0 of the epoch's 10.0 s" in found["d"]
    assert slow([pace("a"), pace("b", waits=0.5)], seconds=10.0) == {}  # 5 %: nothing to speak of


def test_what_an_attempt_had_done_after_its_last_checkpoint_is_said():
    rows = [{"split": "train", "step": s, "seconds": 2.0} for s in (10, 20, 30)] + [{"split": "val", "step": 30}]
    assert lost(rows, 10, "2026-01-01T00:00:00+00:00").startswith(
        "Lost: 20 steps (4 s of training); the checkpoint was written "
    )
    assert lost(rows, 30, "2026-01-01T00:00:00+00:00").startswith("Lost: no step that was logged;")
    assert lost(rows, 0) == "Lost: 30 steps (6 s of training); there is no checkpoint, and the run begins anew"


def test_goodput_is_the_share_of_wall_time_in_steps_that_were_kept(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    times = {"seconds": 10.0, "input_seconds": 1.0, "compile_seconds": 2.0, "checkpoint_seconds": 1.0}
    assert in_steps({"split": "train", **times}) == 6.0 and in_steps({"split": "val"}) == 0.0

    def attempt(first, steps):
        metrics = Metrics(tmp_path, first, 100, "x")
        metrics.attempt(first)
        for step in steps:
            now[0] += 10
            metrics.write_steps(step, 1, {"loss": 1.0}, times)
        metrics.close()

    attempt(0, (10, 20))
    now[0] += 20  # it has died, and is started again from step 10: the second row is lost
    attempt(10, (20,))
    rows = [r["goodput"] for r in read_rows(tmp_path / "metrics.jsonl")]
    assert rows == pytest.approx([6 / 10, 12 / 50])
    assert [r["from_step"] for r in read_rows(tmp_path / "attempts.jsonl")] == [0, 10]
