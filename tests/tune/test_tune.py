"""Sweeps: what is searched, how trials are chosen, stopped and kept, and what comes out."""

import contextlib
import csv
import dataclasses
import json
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ray.tune.experiment import Trial as Tried

from cluster import placement
from cluster.host import PREEMPTED, ClusterError, Host
from ifvit import checkpoint, cli, commands
from ifvit.checkpoint import handlers
from ifvit.config import DenseConfig, MatchConfig, Traced, keys_with, preset
from ifvit.errors import Failure, Interrupted, UserError
from ifvit.fields import COMMON, HOST, OWN, PROGRAM, SCALAR, SWEEP, use_of
from ifvit.training.dense import dense_program
from ifvit.training.policy import Saved
from ifvit.training.saver import Saver
from tune import record, results, space, sweep, trial
from tune.__main__ import LESS_IS_BETTER, Args
from tune.campaign import with_module1
from tune.samples import Optuna, Random, Samples
from tune.space import Choice, Range
from tune.trial import Loop, Plan

BASE = {"dense": preset("smoke", DenseConfig), "match": preset("smoke", MatchConfig)}


def changed_in(config, f: dataclasses.Field):
    """The configuration with another value in the field, one that it may have."""
    value = getattr(config, f.name)
    some = [
        *f.metadata.get("choices", ()),
        not value if isinstance(value, bool) else None,
        ("elsewhere",),
        "elsewhere",
        (8, 16, 16),
    ]
    if type(value) in (int, float):
        some += [value + 8, value + 1, value + 0.5, value * 0.9, value / 2, value * 2]
    for other in some:
        if other != value and type(other) is type(value):
            with contextlib.suppress(UserError):
                return config.replace(**{f.name: other})
    raise AssertionError(f.name)


# ---- one program for many trials


@pytest.mark.parametrize("name, key", [(n, f.name) for n in BASE for f in dataclasses.fields(BASE[n])])
def test_configurations_share_a_program_where_no_part_of_it_differs(name, key):
    config = BASE[name].replace(batch_size=8, accumulate=2)
    f = next(f for f in dataclasses.fields(config) if f.name == key)
    changed = changed_in(config, f)
    assert changed != config
    assert (changed.program() == config.program()) == (use_of(f) != PROGRAM)
    assert (changed.scalars() == config.scalars()) == (use_of(f) != SCALAR)


def test_configurations_that_differ_in_scalars_compile_once():
    fast = BASE["dense"].replace(learning_rate=0.1, noise=0.0, weight_decay=0.3, seed=5)
    assert dense_program(fast.program()) is dense_program(BASE["dense"].program())


def test_a_compiled_program_cannot_see_what_is_the_hosts():
    seen = Traced(BASE["dense"].program(), {"noise": 0.25})
    assert seen.noise == 0.25 and seen.image_size == 64
    for f in dataclasses.fields(DenseConfig):
        if use_of(f) == HOST:
            with pytest.raises(AttributeError, match="the host's"):
                getattr(seen, f.name)


# ---- the metric


@pytest.mark.parametrize("metric", ["eer", "eer_local", "loss", "l_d", "l_of_a_new_loss", "input_seconds"])
def test_of_errors_losses_and_times_less_is_better(metric):
    assert LESS_IS_BETTER.search(metric)


@pytest.mark.parametrize("metric", ["accuracy", "d_prime", "aligned", "goodput", "genuine", "global_l_score"])
def test_of_all_else_more_is_better(metric):
    assert not LESS_IS_BETTER.search(metric)


# ---- the space


def test_where_a_run_starts_from_a_trained_module_1_its_network_is_not_searched():
    base = preset("cpu", DenseConfig).replace(init="auto")
    found = space.space_for("dense", base)
    assert not found.keys() & {*keys_with(COMMON), "cosine_scale", "temperature"} and "learning_rate" in found
    assert "transformer_width" in space.space_for("dense", base, {"transformer_width": [64, 128]})
    assert "resnet_widths" in space.space_for("dense", base.replace(init=""))


@pytest.mark.parametrize("name, roles", [("dense", (OWN, SWEEP)), ("match", (OWN, SWEEP, COMMON))])
def test_nothing_is_searched_that_trials_or_modules_have_to_share(name, roles):
    assert not space.SPACES[name].keys() & {key for role in roles for key in keys_with(role)}


@pytest.mark.parametrize("size", ["paper", "cpu", "quick", "smoke"])
@pytest.mark.parametrize("name", ["dense", "match"])
def test_every_sample_is_a_configuration_and_lies_in_its_range(name, size):
    base = preset(size, space.CONFIGS[name]).replace(dataset_root=("prints",))
    found = space.space_for(name, base)
    for n in range(1, 60):
        values = space.draw(found, base, 3, n)
        config = base.replace(**values)
        for key, value in values.items():
            p = found[key]
            assert p.low <= value <= p.high if isinstance(p, Range) else value in p.values, (key, value)
            assert config[key] == value


def test_the_first_sample_is_the_configuration_itself_and_others_depend_on_seed_and_number_alone():
    base, found = BASE["dense"], space.space_for("dense", BASE["dense"])
    assert space.draw(found, base, 0, 0) == {}
    assert space.draw(found, base, 0, 7) == space.draw(found, base, 0, 7)
    assert space.draw(found, base, 0, 7) != space.draw(found, base, 1, 7) != space.draw(found, base, 1, 8)
    fewer = {k: p for k, p in found.items() if k != "weight_decay"}
    assert space.draw(fewer, base, 0, 7) == {
        k: v for k, v in space.draw(found, base, 0, 7).items() if k != "weight_decay"
    }


def test_four_trials_in_a_row_share_their_structure():
    base, found = BASE["dense"], space.space_for("dense", BASE["dense"])
    structures = [base.replace(**space.draw(found, base, 0, n)).program() for n in range(40)]
    assert len(set(structures[:4])) == 1 and structures[0] == base.program()
    assert all(len(set(structures[n : n + 4])) == 1 for n in range(0, 40, 4)) and len(set(structures)) > 5


def test_where_structure_alone_is_searched_every_trial_has_its_own():
    base = BASE["dense"]
    found = space.space_for("dense", base, only=("transformer_layers", "transformer_width", "batch_size"))
    structures = [base.replace(**space.draw(found, base, 0, n)).program() for n in range(12)]
    assert max(structures.count(s) for s in structures) <= 3


def test_a_whole_number_in_a_file_does_not_make_a_setting_one_of_whole_numbers():
    base = BASE["dense"].replace(noise=1)
    assert type(base.noise) is float
    drawn = [space.draw({"noise": Range(0.0, 1.5)}, base, 0, n)["noise"] for n in range(1, 9)]
    assert any(v % 1 for v in drawn) and max(drawn) <= 1.5


@pytest.mark.parametrize("scale, middle", [("linear", 50.5), ("log", 10.0)])
def test_a_range_is_even_on_its_scale(scale, middle):
    p = Range(1, 100, scale)
    assert p.at(0) == pytest.approx(1) and p.at(0.5) == pytest.approx(middle) and p.at(1) == pytest.approx(100)
    assert p.share(p.at(0.3)) == pytest.approx(0.3)


def test_what_another_choice_makes_moot_is_not_in_a_sample():
    base, found = BASE["dense"], space.space_for("dense", BASE["dense"])
    for n in range(4, 60):
        values = space.draw(found, base, 0, n)
        assert ("temperature" in values) == (values["similarity"] == "scaled_dot")
        assert ("cosine_scale" in values) == (values["similarity"] == "cosine")


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"weight_decay": 0.2}, "weight_decay"),
        ({"learning_rate": 5.0}, "learning_rate"),
        ({"batch_size": 16, "accumulate": 16}, "batch_size"),
    ],
)
def test_multiples_of_a_value_stay_within_what_it_may_be(changes, key):
    base = BASE["dense"].replace(**changes)
    p = space.space_for("dense", base)[key]
    for value in p.values if isinstance(p, Choice) else (p.low, p.high):
        base.replace(**{key: value})


def test_what_is_given_is_not_searched():
    plans = Args(preset="smoke", set=("dense.weight_decay=0.3", "match.noise=0.1"))._plans("smoke")
    assert (
        "weight_decay" not in plans["dense"][1]
        and plans["dense"][0].weight_decay == 0.3
        and "noise" in plans["dense"][1]
    )
    assert "noise" not in plans["match"][1] and "weight_decay" in plans["match"][1]


def test_what_is_taken_in_turn_is_tried_whole():
    found = {"dense_reg_ckpt": Choice(tuple("abcdefgh"), in_turn=True), "noise": Range(0, 1)}
    drawn = [
        space.draw(found, BASE["match"].replace(dense_reg_ckpt="a"), 0, n).get("dense_reg_ckpt", "a") for n in range(8)
    ]
    assert sorted(drawn) == list("abcdefgh")


def test_where_all_prints_are_generated_their_share_is_not_searched():
    assert "synthetic_share" not in space.space_for("match", BASE["match"])
    real = BASE["match"].replace(dataset_root=("prints",))
    assert "synthetic_share" not in space.space_for("match", real)  # there are none
    assert "synthetic_share" in space.space_for("match", real.replace(synthetic_share=0.2))


def test_the_share_of_two_impressions_is_searched_where_the_configuration_has_some():
    assert "impression_share" not in space.space_for("dense", BASE["dense"])
    assert "impression_share" in space.space_for("dense", BASE["dense"].replace(impression_share=0.5))
    assert "impression_share" in space.space_for("dense", BASE["dense"], {"impression_share": [0.2, 0.4]})


@pytest.mark.parametrize("share, asked", [(0.0, {"low": 0.1, "high": 0.5}), (0.2, {"low": 0.0}), (0.2, [0.0, 0.2])])
def test_trials_with_generated_prints_are_not_compared_with_trials_without(share, asked):
    real = BASE["match"].replace(dataset_root=("prints",), synthetic_share=share)
    with pytest.raises(UserError, match="such trials would have other prints"):
        space.space_for("match", real, {"synthetic_share": asked})


def test_a_users_file_narrows_adds_and_fixes():
    table = tomllib.loads("""
        transformer = ["loftr"]
        noise = 0.5
        resnet_widths = [[8, 8, 8], [8, 16, 32]]
        [learning_rate]
        high = 0.002
        [grad_clip]
        low = 0.1
        high = 10
        scale = "log"
    """)
    found = space.space_for("dense", BASE["dense"], table)
    assert found["transformer"].values == ("loftr",) and found["resnet_widths"].values == ((8, 8, 8), (8, 16, 32))
    assert (found["learning_rate"].low, found["learning_rate"].high) == (pytest.approx(2e-4), 0.002)
    assert (found["grad_clip"].low, found["grad_clip"].scale) == (0.1, "log") and "noise" not in found
    assert space.fixed(table) == {"noise": 0.5}


@pytest.mark.parametrize(
    "text, what",
    [
        ("[dense.lerning_rate]\nlow = 1", "no key 'lerning_rate'; did you mean 'learning_rate'"),
        ("[dense.learning_rate]\nlow = 0.1\nhigh = 0.01", "upside down: low is 0.1, high 0.01"),
        ('[dense.noise]\nlow = 0\nscale = "log"', "above 0"),
        ('[dense.noise]\nlow = "a"', "give two numbers"),
        ("[dense.noise]\nstep = 1", "noise.step is not known of a range"),
        ('[dense.noise]\nscale = "cubic"', "give linear or log"),
        ("[dense.noise]\nhigh = 9", "noise is 9.0, which is out of range"),
        ("[dense.transformer]\nlow = 1\nhigh = 2", "give a list of values"),
        ("[dense]\ntransformer = []", "nothing to choose from"),
        ('[dense]\ntransformer = ["lofter"]', "choose from loftr, siamese"),
        ("[dense.grad_clip]\nlow = 1", "no range yet; give low and high"),
        ("[desne]\nnoise = 1", "did you mean dense"),
        ("dense = 3", "write [dense]"),
        ("[dense.num_epochs]\nlow = 1\nhigh = 3", "num_epochs cannot be searched"),
        ("[match]\ntransformer = ['loftr', 'siamese']", "leave it out of [match]"),
        ("[dense]\nseed = [1, 2]", "seed cannot be searched"),
    ],
)
def test_mistakes_in_a_users_file_are_told(text, what, tmp_path, capsys):
    file = tmp_path / "space.toml"
    file.write_text(text)
    assert cli.main(Args, "tune", ["--preset", "smoke", "--space", str(file)]) == 2
    said = capsys.readouterr().err
    assert what in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words, what",
    [
        (["--search", "lerning_rate"], "did you mean learning_rate"),
        (["--num_samples", "0"], "at least 1"),
        (["--metric", "eer"], "one for each module"),
        (["--module", "dense", "--joint"], "--module both"),
        (["--resume", "elsewhere"], "auto or never"),
        (["--trial_epochs", "0"], "at least 1"),
        (["--max_concurrent", "-1"], "from 0 on"),
        (["--trial_cpus", "-1"], "from 0 on"),
        (["--trial_accelerators", "1.5"], "a part of one, or a whole number"),
        (["--wait_for_hosts", "nan"], "from 0 on"),
        (["--joint", "--scheduler", "pbt"], "give another --scheduler"),
        (["--max_concurrent", "2", "--scheduler", "pbt"], "leave --max_concurrent"),
        (["--trial_workers", "2", "--scheduler", "pbt"], "give another --scheduler"),
        (["--searcher", "optuna", "--scheduler", "pbt"], "leave --searcher out"),
        (["--scheduler", "pbt", "--search", "batch_size"], "batch_size cannot change while a trial runs"),
        (["--set", "match.image_size=128"], "give --set dense.image_size=… too"),
        (
            ["--set", "match.image_size=128", "--set", "dense.image_size=96"],
            "give --set dense.image_size=… too, the same",
        ),
        (["--sweep_dir", "/tmp/ray/working_dir_files/x"], "which Ray removes"),
        (["--num_sampels", "3"], "did you mean --num_samples"),
    ],
)
def test_mistakes_in_flags_are_told(words, what, capsys):
    assert cli.main(Args, "tune", ["--preset", "smoke", *words]) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, words, table",
    [
        ("matcher", ["--set", "roi_size=160"], ""),
        ("dense", [], "[dense.learning_rate]\nlow = 6e-3"),
        ("matcher", ["--set", "roi_size=100"], ""),
    ],
)
def test_what_one_of_the_presets_that_devices_choose_takes_is_no_mistake(module, words, table, tmp_path):
    (tmp_path / "space.toml").write_text(table)
    plans = commands.tried(
        cli.parse(Args, "tune", ["--module", module, "--space", str(tmp_path / "space.toml"), *words])._plans, None
    )
    assert len(plans) == 1


def test_resume_alone_is_resume_auto():
    assert cli.parse(Args, "tune", ["--resume", "--seed", "3"]).resume == "auto"
    assert cli.parse(Args, "tune", ["--seed", "3", "--resume"]).resume == "auto"
    assert cli.parse(Args, "tune", ["--resume", "never"]).resume == "never"


# ---- which trials there are


def ended(folder, number, values, rows, how="finished", reason="") -> None:
    """A trial of an earlier attempt: `rows` of the metric, an epoch each."""
    record.note_values(folder, number, values)
    lines = [
        {"step": 2 * e, "epoch": e, "split": split, "accuracy": a, "seconds": 1.0}
        for e, a in enumerate(rows, 1)
        for split in ("train", "val")
    ]
    (record.folder_of(folder, number) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if how:
        record.note_end(folder, number, how, reason, 10.0)


SHORT = BASE["dense"].replace(num_epochs=9)


def plan(folder, base=SHORT) -> Plan:
    return Plan("dense", base, str(folder), "accuracy", True, frozenset(), str(folder), "CPU", {"CPU": 1})


def test_interrupted_trials_come_first_with_the_values_they_had_and_those_that_ended_do_not_come_again(tmp_path):
    ended(tmp_path, 0, {"noise": 0.1}, [0.5])
    ended(tmp_path, 1, {"noise": 0.2}, [0.4], how="")
    samples = Samples(
        Random({"noise": Range(0, 1)}, BASE["dense"], 0), str(tmp_path), "accuracy", "max", record.read_all(tmp_path), 4
    )
    drawn = [samples.suggest(f"trial {n}") for n in range(4)]
    assert drawn[0] == {"trial": 1, "noise": 0.2}
    assert [d["trial"] for d in drawn[1:3]] == [2, 3] and drawn[3] == Samples.FINISHED
    assert record.read(tmp_path, 2).values == {"noise": drawn[1]["noise"]}  # noted before the trial runs


def test_what_a_crash_or_a_bad_disk_left_of_a_trials_notes_is_not_taken_for_them(tmp_path):
    ended(tmp_path, 0, {"noise": 0.1}, [0.5])
    ended(tmp_path, 1, {"noise": 0.2}, [0.4])
    (record.folder_of(tmp_path, 0) / "values.jsonl").write_text('{"from_epo')
    (record.folder_of(tmp_path, 1) / "ended.json").write_text("{how")
    begun = record.read_all(tmp_path)
    assert [(r.number, r.end) for r in begun] == [(1, None)]
    samples = Samples(Random({"noise": Range(0, 1)}, BASE["dense"], 0), str(tmp_path), "accuracy", "max", begun, 3)
    assert [samples.suggest(f"t{n}")["trial"] for n in range(3)] == [1, 0, 2]
    assert len(record.read_all(tmp_path)) == 3


def test_optuna_learns_from_trials_also_of_an_earlier_attempt(tmp_path):
    pytest.importorskip("optuna")
    found = {
        "noise": Range(0.0, 1.0),
        "transformer": Choice(("loftr", "siamese")),
        "resnet_widths": Choice(((8, 8, 8), (8, 16, 32))),
    }
    value = lambda v: -abs(v.get("noise", 1.0) - 0.2) - (v.get("transformer") == "siamese")

    def search(numbers, begun):
        samples = Samples(
            Optuna(found, BASE["dense"], 0, "max"), str(tmp_path), "accuracy", "max", begun, numbers[-1] + 1
        )
        for n in numbers:
            drawn = samples.suggest(f"t{n}")
            assert drawn["trial"] == n
            ended(tmp_path, n, {k: v for k, v in drawn.items() if k != "trial"}, [value(drawn)])
            samples.on_trial_complete(f"t{n}", {"accuracy": value(drawn)})

    search(range(0, 20), [])
    search(range(20, 40), record.read_all(tmp_path))
    late = [
        json.loads(line)["values"]
        for n in range(25, 40)
        for line in (record.folder_of(tmp_path, n) / "values.jsonl").read_text().splitlines()[:1]
    ]
    assert np.mean([abs(v["noise"] - 0.2) for v in late]) < 0.22  # evenly drawn: 0.34
    assert np.mean([v["transformer"] == "loftr" for v in late]) > 0.7


def test_optuna_does_not_draw_the_same_again_after_an_interruption(tmp_path):
    pytest.importorskip("optuna")
    found = {"noise": Range(0.0, 1.0)}
    first = Optuna(found, BASE["dense"], 0, "max")
    drawn = [first.draw(n)["noise"] for n in (1, 2, 3)]
    again = Optuna(found, BASE["dense"], 0, "max")
    for n, noise in enumerate(drawn, 1):
        again.learn(n, {"noise": noise}, 0.5)
    later = [again.draw(n)["noise"] for n in (4, 5, 6)]
    assert len({*drawn, *later}) == 6


def test_an_epochs_row_has_what_training_reported_too(tmp_path):
    ended(tmp_path, 0, {}, [0.5])
    file = record.folder_of(tmp_path, 0) / "metrics.jsonl"
    lines = [
        {"split": "train", "step": 1, "epoch": 1, "loss": 3.0, "seconds": 1.0},
        {"split": "train", "step": 2, "epoch": 1, "loss": 2.0, "seconds": 1.0},
        {"split": "val", "step": 2, "epoch": 1, "accuracy": 0.5},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = record.read_all(tmp_path)
    assert (found[0].last("loss"), found[0].last("accuracy"), found[0].epochs) == (2.0, 0.5, 1)
    assert record.order(found, "loss", False) == found


def test_asha_knows_what_trials_of_an_earlier_attempt_have_reached(tmp_path):
    for n, best in enumerate((0.9, 0.8, 0.7)):
        ended(tmp_path, n, {}, [best - 0.2, best - 0.1, best])

    def decide(begun):
        asha = sweep.Halving(
            plan(tmp_path),
            begun,
            grace_period=1,
            max_t=9,
            reduction_factor=3,
            time_attr="epoch",
            stop_last_trials=False,
        )
        asha.set_search_properties("accuracy", "max")
        trial = SimpleNamespace(trial_id="new", config={"trial": 3})
        asha.on_trial_add(None, trial)
        return asha.on_trial_result(None, trial, {"epoch": 1, "accuracy": 0.55})

    assert decide(record.read_all(tmp_path)) == "STOP" and decide([]) == "CONTINUE"


def population(count: int, monkeypatch):
    """The scheduler, its members, and what it asks of Tune."""
    monkeypatch.setattr(Tried, "get_trainable_cls", lambda self: None)
    pbt = sweep.Population(
        metric="accuracy",
        mode="max",
        time_attr="epoch",
        synch=True,
        perturbation_interval=1,
        hyperparam_mutations={"noise": lambda: 0.5},
    )
    members = [Tried("stub", trial_id=str(n), config={"noise": 0.1}, stub=True) for n in range(count)]
    return pbt, members, SimpleNamespace(get_trials=lambda: members, get_live_trials=lambda: members, search_alg=None)


def test_a_round_of_a_population_ends_where_its_last_member_fails(monkeypatch):
    pbt, members, controller = population(4, monkeypatch)
    cloned = []
    monkeypatch.setattr(
        pbt, "_checkpoint_or_exploit", lambda t, _, upper, lower: cloned.append((t.trial_id, t in upper, t in lower))
    )
    for t in members:
        pbt.on_trial_add(controller, t)
        t.set_status(Tried.RUNNING)
    for n, t in enumerate(members[:3]):
        t.run_metadata.last_result = {"epoch": 1, "accuracy": n / 10}
        assert pbt.on_trial_result(controller, t, t.last_result) == "PAUSE"
        t.set_status(Tried.PAUSED)
        assert pbt.choose_trial_to_run(controller) is None and not cloned  # the last one is still at it
    members[3].set_status(Tried.ERROR)
    assert pbt.choose_trial_to_run(controller) in members[:3]
    assert sorted(cloned)[0] == ("0", False, True) and sorted(cloned)[2] == ("2", True, False)


def test_a_population_that_goes_on_from_epochs_of_an_earlier_attempt_goes_on_to_its_end(monkeypatch):
    """Ray's rounds begin at epoch 1; the members' first reports are of epoch 4."""
    pbt, members, controller = population(3, monkeypatch)
    monkeypatch.setattr(pbt, "_checkpoint_or_exploit", lambda *_: None)
    epochs = dict.fromkeys(members, 3)
    for t in members:
        pbt.on_trial_add(controller, t)
        t.set_status(Tried.PENDING)
    while any(epoch < 8 for epoch in epochs.values()):
        t = pbt.choose_trial_to_run(controller)
        assert t is not None, epochs  # else Tune waits for ever
        epochs[t] += 1
        t.set_status(Tried.RUNNING)
        t.run_metadata.last_result = {"epoch": epochs[t], "accuracy": 0.5}
        assert pbt.on_trial_result(controller, t, t.last_result) in ("PAUSE", "NOOP")
        t.set_status(Tried.PAUSED)
    assert set(epochs.values()) == {8}


def test_where_the_best_trial_fails_when_trained_to_its_end_the_next_is_taken(monkeypatch, tmp_path, capsys):
    from tune import campaign as command

    for n in range(3):
        ended(tmp_path, n, {"noise": n / 10}, [0.5 + n / 10])
    ends = record.order(record.read_all(tmp_path), "accuracy", True)

    def run(plan, space, request, good=("best_001",)):
        assert request.num_samples == 1 and request.scheduler == "none" and plan.base.num_epochs == 20
        fine = Path(plan.folder).name in good
        ended(plan.folder, 0, {}, [0.5], "finished" if fine else "failed", "" if fine else "loss is nan")
        sweep._complain(record.read_all(plan.folder), plan)

    full, request = BASE["dense"].replace(num_epochs=20), sweep.Request(3)
    monkeypatch.setattr(sweep, "run", run)
    best, folder = command.to_its_end(plan(tmp_path), full, {}, request, ends)
    assert best.number == 1 and folder == tmp_path / "best_001/trials/000"
    assert capsys.readouterr().out == "trial 2 fails when it is trained to its end: loss is nan\n"
    monkeypatch.setattr(sweep, "run", lambda *args: run(*args, good=()))
    with pytest.raises(Failure, match="the same command goes on"):
        command.to_its_end(plan(tmp_path), full, {}, request, ends)
    assert not list(tmp_path.glob("best_*/trials/000/ended.json"))


def test_all_trials_failed_is_told_with_the_most_frequent_reason_first(tmp_path):
    for n, why in enumerate(("loss is nan", "out of memory", "out of memory")):
        ended(tmp_path, n, {}, [], "failed", why)
    with pytest.raises(Failure, match=r"All 3 trials failed\. 2 × out of memory 1 × loss is nan"):
        sweep._complain(record.read_all(tmp_path), plan(tmp_path))


@pytest.mark.parametrize(
    "hosts, request_, gets",
    [
        ([{"CPU": 2.0}], {}, {"CPU": 1}),
        ([{"CPU": 64.0}], {}, {"CPU": 8}),  # 8 samples keep 64 cores busy
        ([{"CPU": 64.0}], {"cpus": 4}, {"CPU": 4}),
        ([{"CPU": 4.0}] * 16, {}, {"CPU": 4}),  # no trial is larger than a host
        ([{"CPU": 0.0}, {"CPU": 4.0}], {}, {"CPU": 1}),
        ([{"CPU": 32.0, "GPU": 4.0}], {}, {"CPU": 8, "GPU": 1.0}),
        ([{"CPU": 8.0, "GPU": 1.0}], {"accelerators": 0.5}, {"CPU": 4, "GPU": 0.5}),
        ([{"CPU": 16.0}, {"CPU": 200.0, "TPU": 4.0}], {"accelerators": 4}, {"CPU": 200, "TPU": 4}),
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 4.0}], {}, {"CPU": 2, "GPU": 1.0}),  # a large head without one
        ([{"CPU": 64.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}], {}, {"CPU": 2, "GPU": 1.0}),
    ],
)
def test_a_trial_gets_its_share_of_a_host(hosts, request_, gets, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(sweep.ray, "nodes", lambda: [{"Alive": True, "Resources": h} for h in hosts])
    assert sweep.placed(plan(tmp_path), sweep.Request(8, **request_)).resources == gets


def test_a_trial_of_several_workers_takes_whole_hosts(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(sweep.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}] * 5)
    placed = sweep.placed(plan(tmp_path), sweep.Request(8, workers=2))
    assert (placed.workers, placed.at_once, placed.platform) == (2, 2, "GPU") and "GPU" not in placed.resources
    with pytest.raises(ClusterError, match="1 GPU on each of 6 hosts"):
        sweep.placed(plan(tmp_path), sweep.Request(8, workers=6))


def test_hosts_for_trials_that_are_still_to_come_are_asked_for_and_waited_for(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    hosts, called = [{"CPU": 2.0}], []
    monkeypatch.setattr(sweep.ray, "nodes", lambda: [{"Alive": True, "Resources": h} for h in hosts])
    monkeypatch.setattr(
        placement, "placement_group", lambda bundles, strategy: called.append((bundles, strategy)) or "group"
    )
    monkeypatch.setattr(placement, "remove_placement_group", called.append)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: hosts.append({"CPU": 8.0, "GPU": 1.0}))
    assert sweep.placed(plan(tmp_path), sweep.Request(8, accelerators=1)).platform == "GPU"
    assert called == [([{"CPU": 1, "GPU": 1}], "STRICT_SPREAD"), "group"]
    called.clear(), hosts.pop()
    with pytest.raises(ClusterError):
        sweep.placed(plan(tmp_path), sweep.Request(8, accelerators=1, wait_for_hosts=0))
    assert not called


def test_a_trial_whose_jax_has_no_gpu_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(UserError, match="has a GPU from Ray, and JAX finds none there"):
        trial._run(dataclasses.replace(plan(tmp_path), platform="GPU"), plan(tmp_path).base, "auto", Host())


def test_a_gpu_that_jax_platforms_asks_for_and_no_host_has_is_told_with_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(sweep.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(
        ClusterError, match="there are 2 CPU and 0 GPU; JAX_PLATFORMS=cuda asks for them: unset it, or ask for less"
    ):
        sweep.placed(plan(tmp_path), sweep.Request(8))


def test_a_trial_that_fits_nowhere_is_told_with_what_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(
        ClusterError, match="asks for 1 CPU and 1 GPU on one host, and there are 2 CPU and 0 GPU; ask for less"
    ):
        sweep.placed(plan(tmp_path), sweep.Request(8, accelerators=1))


# ---- a trial


def test_a_trials_run_stands_still_after_every_epoch_until_the_next_is_asked_for():
    done = []

    def train(host):
        for epoch in (1, 2):
            done.append(epoch)
            host.report({"epoch": epoch})
        return "ignored"

    loop = Loop(train)
    assert loop.next() == {"epoch": 1} and done == [1]
    time.sleep(0.1)
    assert done == [1]
    assert loop.next() == {"epoch": 2} and done == [1, 2]
    assert loop.next() == (0, "")


def test_a_trial_that_is_stopped_ends_where_it_stands():
    ends = []

    def train(host):
        try:
            host.report({"epoch": 1})
            ends.append("went on")
        except Interrupted as e:
            ends.append(e.code)
            raise

    loop = Loop(train)
    loop.next()
    loop.end()
    assert ends == [PREEMPTED]


def test_what_a_trial_takes_from_another_is_not_replaced_by_what_its_process_of_before_was_writing(
    tmp_path, monkeypatch
):
    """Tune stops a trial that is to take another's parameters while its own checkpoint is on its way to the disk."""
    run = lambda number: Saver(epath.Path(record.folder_of(tmp_path, number)), "dense_reg", BASE["dense"], 2, True)
    state = lambda value: {"params": {"w": jnp.full(3, value)}}
    metadata = {"epoch": 1, "step": 2, "value": 0.5, "config": {}}
    save = lambda saver, value: saver.start(Saved("dense_reg_epoch_1", 2, 1, 0.5), state(value), metadata, None)
    theirs, before = run(1), run(0)
    save(theirs, 1.0)
    assert theirs.settle()
    finalize, written, go = handlers.MetadataHandler.finalize, threading.Event(), threading.Event()

    def slow(*args):
        finalize(*args)
        written.set()
        go.wait(60)

    monkeypatch.setattr(handlers.MetadataHandler, "finalize", slow)
    save(before, 0.0)
    assert written.wait(60)
    tuned = trial.Trial.__new__(trial.Trial)
    tuned._plan, tuned._loop, tuned._values = (
        SimpleNamespace(module="dense", folder=tmp_path, base=BASE["dense"]),
        None,
        {},
    )
    monkeypatch.setattr(trial.Trial, "trial_name", "0")
    noted = {"path": str(theirs.folder / "dense_reg_epoch_1"), "last": {"epoch": 1}}
    (tmp_path / "run.json").write_text(json.dumps(noted))
    tuned.load_checkpoint(str(tmp_path))
    go.set()
    assert not before.settle()
    assert checkpoint.load(tuned._resume).state["params"]["w"][0] == 1
    assert record.folder_of(tmp_path, 0) == Path(tuned._resume).parent


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("A batch of 3 does not divide."), (2, "A batch of 3 does not divide.")),
        (Failure("loss is nan at step 3"), (1, "loss is nan at step 3")),
        (RuntimeError("INTERNAL: a kernel failed\nmore"), (1, "RuntimeError: INTERNAL: a kernel failed")),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
            (
                1,
                "The memory of the device is full. --set accumulate=4 goes through a batch in "
                "four parts (in train_all --set dense.accumulate=4 --set match.accumulate=4), "
                "--set compute_dtype=bfloat16 or --set remat=true take less of it; nvidia-smi shows whether "
                "another process has some. JAX says: "
                "RESOURCE_EXHAUSTED: Out of memory",
            ),
        ),
    ],
)
def test_whatever_befalls_a_trial_is_its_own_end_with_a_reason(error, said):
    def train(host):
        raise error

    assert Loop(train).next() == said


# ---- what comes out


def test_the_best_is_the_best_of_those_trained_furthest_and_failures_do_not_count(tmp_path):
    ended(tmp_path, 0, {}, [0.3, 0.6])
    ended(tmp_path, 1, {}, [0.9], "stopped")
    ended(tmp_path, 2, {}, [0.5, 0.7])
    ended(tmp_path, 3, {}, [0.5, 0.99], "failed", "loss is nan")
    assert [r.number for r in record.order(record.read_all(tmp_path), "accuracy", True)] == [2, 0, 1]
    assert [r.number for r in record.order(record.read_all(tmp_path), "accuracy", False)] == [0, 2, 1]


def many(folder, value, count=60):
    found = {
        "noise": Range(0.0, 1.5),
        "learning_rate": Range(1e-4, 1e-2, "log"),
        "transformer": Choice(("loftr", "siamese")),
    }
    for n in range(count):
        values = space.draw(found, BASE["dense"], 1, 4 * n + 4)
        ended(folder, n, values, [value(values)])
    return found, record.read_all(folder)


def test_importance_is_that_of_the_setting_which_decides(tmp_path):
    found, records = many(tmp_path, lambda v: -abs(v["noise"] - 0.75))  # best in the middle: no correlation
    weights = results.importance(records, found, BASE["dense"], "accuracy", True)
    assert next(iter(weights)) == "noise" and weights["noise"] > 0.6
    assert weights["learning_rate"] < 0.15 and weights["transformer"] < 0.15


def test_importance_of_a_choice(tmp_path):
    found, records = many(tmp_path, lambda v: (v["transformer"] == "siamese") + 0.1 * v["noise"])
    weights = results.importance(records, found, BASE["dense"], "accuracy", True)
    assert next(iter(weights)) == "transformer" and weights["transformer"] > 0.6 > weights["noise"]


def test_importance_of_a_choice_of_lists(tmp_path):
    found = {"resnet_widths": Choice(((8, 8, 16), (8, 16, 24))), "noise": Range(0.0, 1.0)}
    for n in range(12):  # as JSON has them
        values = {"resnet_widths": [[8, 8, 16], [8, 16, 24]][n % 2], "noise": (n * 5 % 12) / 12}
        ended(tmp_path, n, values, [float(n % 2)])
    records = record.read_all(tmp_path)
    weights = results.importance(records, found, BASE["dense"], "accuracy", True)
    assert weights["resnet_widths"] > 0.6 > weights["noise"]
    assert [results._place(Choice((0, 1)), v) for v in (0.0, 1.0, 0.5)] == [0, 1, -1]  # whole numbers in a file
    axes = results._scatter(records, ["resnet_widths"], found, BASE["dense"], "accuracy").axes[0]
    assert sorted(set(axes.collections[0].get_offsets()[:, 0])) == [0, 1]


def test_a_best_value_at_the_edge_of_its_range_is_what_to_try_next():
    found = {"noise": Range(0.0, 1.0), "learning_rate": Range(1e-4, 1e-2, "log")}
    best = record.Record(3, {"noise": 0.5, "learning_rate": 9.9e-3})
    said = results.what_next(best, found, BASE["dense"])
    assert "learning_rate (best 0.0099) at the upper edge of 0.0001 … 0.01" in said and "noise" not in said
    inside = results.what_next(record.Record(3, {"noise": 0.0, "learning_rate": 1e-3}), found, BASE["dense"])
    assert "no best value lies at the edge" in inside  # there is no noise below 0


def test_best_toml_makes_the_same_configuration_whatever_the_preset(tmp_path):
    dense = BASE["dense"].replace(
        learning_rate=1.25e-05, resnet_widths=(8, 16, 24), transformer="siamese", num_epochs=3
    )
    match = BASE["match"].replace(enhance=False, arcface_scale=33.3, resnet_widths=(8, 16, 24), transformer="siamese")
    file = tmp_path / "best.toml"
    file.write_text(results.best_toml({"dense": dense, "match": match}, {"dense": {"learning_rate"}}, ["best"]))
    assert "learning_rate = 1.25e-05  # searched" in file.read_text()
    from ifvit.train_all import Args as TrainAll
    from ifvit.train_dense import Args as TrainDense

    handed_on = lambda config: {k: v for k, v in config.to_dict().items() if k not in keys_with(OWN)}
    found = (*TrainAll(config=str(file), preset="paper").configs(None), *TrainDense(config=str(file)).configs("cpu"))
    assert [handed_on(c) for c in found] == [handed_on(c) for c in (dense, match, dense)]


def test_trials_csv_and_the_page_have_every_trial(tmp_path):
    found, records = many(tmp_path, lambda v: v["noise"], 8)
    ended(tmp_path, 8, {"noise": 1.0}, [], "failed", "out of <memory>")
    records = record.read_all(tmp_path)
    results.write_csv(tmp_path / "trials.csv", records, found, "accuracy")
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [int(r["trial"]) for r in rows] == list(range(9)) and rows[8]["reason"] == "out of <memory>"
    assert all(float(r["accuracy"]) == float(json.loads(r["noise"])) for r in rows[:8])
    results.page(tmp_path / "index.html", "Sweep", ["a < b"], records, found, BASE["dense"], "accuracy", True)
    text = (tmp_path / "index.html").read_text()
    assert (
        text.count("data:image/svg+xml") == 3 and text.count("<tr>") == 10 and "a &lt; b" in text and "http" not in text
    )


def test_another_sweep_in_the_same_folder_is_a_mistake_that_names_the_setting(tmp_path):
    from tune.folder import check_same_sweep

    found = space.space_for("dense", BASE["dense"])
    check_same_sweep(tmp_path, plan(tmp_path), found, "prints")
    check_same_sweep(tmp_path, plan(tmp_path), found, "prints")
    with pytest.raises(UserError, match="another configuration: val_pairs was 8, and is 9"):
        check_same_sweep(tmp_path, plan(tmp_path, BASE["dense"].replace(num_epochs=9, val_pairs=9)), found, "prints")
    with pytest.raises(UserError, match="another space: noise"):
        check_same_sweep(tmp_path, plan(tmp_path), found | {"noise": Range(0, 1)}, "prints")
    with pytest.raises(UserError, match="a sweep on other prints"):
        check_same_sweep(tmp_path, plan(tmp_path), found, "others")


def test_a_sweep_on_another_module_1_is_another_sweep(tmp_path):
    from tune.folder import check_same_sweep

    for name in "ab":
        (tmp_path / f"{name}.pkl").write_bytes(name.encode())
    on = lambda name: dataclasses.replace(
        plan(tmp_path), module="match", base=BASE["match"].replace(dense_reg_ckpt=str(tmp_path / f"{name}.pkl"))
    )
    assert on("a").config({}, 0).batch_size == 4  # a pickle tells nothing of what both modules have in common
    check_same_sweep(tmp_path / "sweep", on("a"), {}, "prints")
    check_same_sweep(tmp_path / "sweep", on("a"), {}, "prints")
    with pytest.raises(UserError, match="a sweep on another Module 1"):
        check_same_sweep(tmp_path / "sweep", on("b"), {}, "prints")


def test_trials_that_failed_before_their_first_step_are_no_end_of_the_summary(tmp_path):
    from tune.campaign import summarise

    ended(tmp_path, 0, {}, [0.1] * 9)
    ended(tmp_path, 1, {}, [0.1], "stopped")
    ended(tmp_path, 2, {}, [], "failed", "loss is nan at step 1")
    records = record.read_all(tmp_path)
    assert (
        summarise(records, records[0], "accuracy", plan(tmp_path))[-1]
        == "37% of the steps that all trials in full would take"
    )


def test_the_best_of_the_other_module_stays_in_the_same_folder(tmp_path):
    from tune.folder import write_best

    dense, match = BASE["dense"].replace(learning_rate=0.007), BASE["match"].replace(enhance=False)
    write_best(tmp_path, {"match": match}, {"matcher": "m"}, "smoke")
    write_best(tmp_path, {"dense": dense}, {"dense_reg": "d"}, "smoke")
    found = tomllib.loads((tmp_path / "best.toml").read_text())
    assert (
        list(found) == ["dense", "match"]
        and found["dense"]["learning_rate"] == 0.007
        and found["match"]["enhance"] is False
    )
    assert json.loads((tmp_path / "best.json").read_text()) == {"dense_reg": "d", "matcher": "m"}


def test_a_best_that_does_not_go_with_the_other_modules_replaces_it(tmp_path, capsys):
    from tune.folder import write_best

    write_best(tmp_path, dict(BASE), {"dense_reg": "d", "matcher": "m"}, "smoke")
    write_best(tmp_path, {"dense": BASE["dense"].replace(transformer_width=32)}, {"dense_reg": "e"}, "smoke")
    assert list(tomllib.loads((tmp_path / "best.toml").read_text())) == ["dense"]
    assert json.loads((tmp_path / "best.json").read_text()) == {"dense_reg": "e"}
    assert "match before goes with another transformer_width" in capsys.readouterr().out


def test_a_folder_is_one_sweeps_at_a_time(tmp_path, monkeypatch):
    from tune import folder as command

    monkeypatch.setattr(command, "PATIENCE", 0.1)
    with (
        command.alone_in(tmp_path / "sweep"),
        pytest.raises(UserError, match="Another sweep is running in"),
        command.alone_in(tmp_path / "sweep"),
    ):
        pass
    with command.alone_in(tmp_path / "sweep"):
        pass


# ---- train_all --tune, after the sweep


def test_what_is_found_wins_over_a_users_file_which_keeps_a_runs_own_affairs(tmp_path):
    from ifvit.train_all import Args as TrainAll
    from ifvit.train_all import with_best

    (tmp_path / "best.toml").write_text(
        results.best_toml({n: BASE[n].replace(learning_rate=0.0125) for n in BASE}, {}, ["best"])
    )
    file = tmp_path / "mine.toml"
    file.write_text('seed = 3\n[dense]\nlearning_rate = 0.5\nloftr_ckpt = "é.ckpt"\n[match]\nnum_classes = 77\n')
    dense, match = TrainAll(config=str(with_best(str(file), tmp_path)), preset="cpu").configs(None)
    assert (dense.learning_rate, match.learning_rate, dense.seed, match.seed) == (0.0125, 0.0125, 3, 3)
    assert (dense.loftr_ckpt, match.num_classes, dense.image_size) == ("é.ckpt", 77, 64)
    assert TrainAll(config=str(with_best("", tmp_path)), preset="cpu").configs(None)[0].learning_rate == 0.0125


def test_a_sweeps_best_is_taken_over_anew_when_it_is_another_and_no_other_run_gives_way(tmp_path, module1):
    from ifvit.checkpoint.places import duplicate
    from ifvit.train_all import adopt

    def run(folder, of, bit=0):
        """A finished checkpoint that says it was trained in `of`."""
        duplicate(checkpoint.as_path(module1.path), checkpoint.as_path(folder / "dense_reg_ckpt"))
        metadata = checkpoint.load(folder / "dense_reg_ckpt")
        state = dict(metadata.state)
        state["step"] = np.asarray(bit, np.int32)
        config = metadata.metadata["config"] | {"checkpoint_dir": str(of)}
        checkpoint.save(
            folder / "dense_reg_ckpt",
            "dense_reg",
            state,
            {
                k: metadata.metadata[k]
                for k in ("epoch", "step", "finished", "best", "value", "history", "data", "steps_per_epoch")
            }
            | {"config": config},
        )
        return folder / "dense_reg_ckpt"

    sweep = tmp_path / "sweep"
    first, second = (run(sweep / name, sweep / name, n) for n, name in enumerate(("000", "001")))
    here = tmp_path / "dense_reg"
    step = lambda: int(checkpoint.load(here / "dense_reg_ckpt").state["step"])
    (here / "dense_reg_ckpt.orbax-checkpoint-tmp-copy").mkdir(parents=True)  # what a kill within it leaves
    adopt(str(first), str(here), "dense_reg", "auto", sweep)
    assert step() == 0
    adopt(str(second), str(here), "dense_reg", "auto", sweep)
    assert step() == 1 and (here / "before_1/dense_reg_ckpt").is_dir()
    run(here, "elsewhere", 5)
    adopt(str(second), str(here), "dense_reg", "auto", sweep)
    assert step() == 5


def test_a_directory_with_a_run_of_its_own_is_told_before_the_search(command, module1):
    said = command("train_all", "--tune", 2, "--preset", "smoke", cwd=module1.cwd)
    assert said.code == 2 and "holds a run already" in said.err and "--dense_checkpoint_dir" in said.err
    assert not (module1.cwd / "checkpoints/sweep").exists()


@pytest.mark.parametrize("words", [("--num_workers", "4"), ("--devices", "gpu"), ("--workers_per_host", "2")])
def test_a_flag_that_a_search_could_not_heed_is_refused(words, command, tmp_path):
    said = command("train_all", "--tune", 2, "--preset", "smoke", *words, cwd=tmp_path)
    assert said.code == 2 and f"{words[0]} does not go with --tune" in said.err and not any(tmp_path.iterdir())


def test_what_module_2_has_in_common_with_its_module_1_cannot_be_set_for_it_alone(module1):
    config = BASE["match"].replace(dense_reg_ckpt=str(module1.path), transformer="siamese")
    assert with_module1(config, ()).transformer == BASE["dense"].transformer != "siamese"
    with pytest.raises(UserError, match="transformer is .* of Module 1 .* leave that out"):
        with_module1(config, ("match.transformer=siamese",))
