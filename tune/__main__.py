"""Searches the settings of one module or of both.

python -m tune --module both --num_samples 24 --dataset_root DIR
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from cluster.host import ClusterError, Host
from ifvit import cli
from ifvit.commands import ConfigArgs, build_config, check_common, check_outlives_job, given, named_roots, tried
from ifvit.config import Config, DenseConfig, MatchConfig, completed, config_of, keys_with, read_toml, with_changes
from ifvit.errors import Failure, UserError
from ifvit.fields import COMMON, FREE
from ifvit.files import write_whole
from ifvit.paths import resolve
from ifvit.training.watch import watch
from tune import space as spaces
from tune.space import RUNS, Choice

PARENT = "IFVIT_SWEEP_OF"  # environment variable: the process whose end also ends the sweep
PATIENCE = 30.0  # seconds to wait for a sweep that is ending and still has the folder
METRICS = {"dense": ("accuracy", True), "match": ("eer", False)}  # the default metric, and whether more is better
LESS_IS_BETTER = ("eer", "loss", "l_d", "l_e", "l_a", "impostor", "seconds")  # parts of such metrics' names


@dataclass(frozen=True)
class Args(ConfigArgs):
    """Searches settings with Ray Tune; best.toml, which it leaves, is a --config of every training command."""

    module: Literal["dense", "matcher", "both"] = "both"
    """`both`: Module 1, then Module 2 on the best Module 1"""
    num_samples: int = 24
    """trials of each module; the first has the configuration as it is"""
    space: str = ""
    """TOML file that narrows the search space or adds to it, tables [dense] and [match]"""
    search: tuple[str, ...] = ()
    """these settings alone [all of the space]"""
    metric: tuple[str, ...] = ()
    """of an epoch's end, by which trials are judged; with `both` one for each module [accuracy eer]"""
    searcher: Literal["random", "optuna"] = "random"
    """`optuna` learns from the trials before (pip install 'ifvit[optuna]')"""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """`asha` stops the weaker trials at epoch ends; `pbt` clones the better ones and changes their settings"""
    trial_epochs: int | None = None
    """of a trial at most; the best is then trained to the end [the configuration's num_epochs]"""
    joint: bool = False
    """with `both`: Module 2 is searched on every Module 1 that was trained to the end, not on the best alone"""
    pretrained_ckpt: str | None = None
    """Module 1 for `matcher` [./checkpoints/dense_reg/dense_reg_ckpt.pkl]"""
    sweep_dir: str = "./checkpoints/sweep"
    """where trials and results go"""
    trial_cpus: int = 0
    """cores of a trial [as many as keep all of them busy]"""
    trial_accelerators: float = 0.0
    """GPUs or TPU chips of a trial, 0.5 for two trials on one GPU [one, where there are any]"""
    trial_workers: int = 1
    """whole hosts of a trial, a process on each"""
    max_concurrent: int = 0
    """trials at once [as many as there is room for]"""
    wait_for_hosts: float = 50.0
    """seconds that a cluster gets to have room for a trial"""

    command: ClassVar[str] = "tune"

    def run(self) -> int:
        watch(self.tracker)  # UserError where one is not installed
        if self.num_samples < 1:
            raise UserError(f"--num_samples is {self.num_samples}; give at least 1.")
        if self.trial_epochs is not None and self.trial_epochs < 1:
            raise UserError(f"--trial_epochs is {self.trial_epochs}; give at least 1.")
        if self.trial_workers < 1:
            raise UserError(f"--trial_workers is {self.trial_workers}; give at least 1.")
        for name in ("trial_cpus", "trial_accelerators", "max_concurrent", "wait_for_hosts"):
            if not 0 <= getattr(self, name) < math.inf:  # this refuses NaN too
                raise UserError(f"--{name} is {getattr(self, name)}; give a number from 0 on.")
        if self.trial_accelerators > 1 and self.trial_accelerators % 1:
            raise UserError(
                f"--trial_accelerators is {self.trial_accelerators}; give a part of one, or a whole number."
            )
        if self.trial_workers > 1 and (self.trial_cpus or self.trial_accelerators):
            raise UserError(
                "A trial of several workers takes whole hosts; leave --trial_cpus and --trial_accelerators out."
            )
        if self.resume not in ("auto", "never"):
            raise UserError(f"--resume {self.resume}: a sweep takes auto or never.")
        if self.metric and len(self.metric) != (2 if self.module == "both" else 1):
            raise UserError(f"--metric names {len(self.metric)} metrics; give one for each module that is searched.")
        if "://" in self.sweep_dir:
            raise UserError(
                f"--sweep_dir {self.sweep_dir}: a sweep lies in a directory that all hosts share; give its path."
            )
        if self.searcher == "optuna" and self.scheduler == "pbt":
            raise UserError(
                "Population-based training draws its settings itself; leave --searcher out, or give another "
                "--scheduler."
            )
        if self.joint and self.module != "both":
            raise UserError("--joint searches both modules; give --module both with it.")
        if self.joint and self.scheduler == "pbt":
            raise UserError(
                "--joint tries one Module 1 after the other, and population-based training changes numbers alone; "
                "give another --scheduler."
            )
        if self.joint and self.trial_epochs:
            raise UserError(
                "--joint takes Module 1 from trials that were trained to the end; leave --trial_epochs out."
            )
        check_outlives_job(resolve(self.sweep_dir), "sweep_dir")
        tried(self._plans, self.preset)  # shows mistakes in flags and files before Ray is started
        if self.scheduler == "pbt" and (self.max_concurrent or self.trial_workers > 1):
            raise UserError(
                "Population-based training goes round by round through all its trials; leave --max_concurrent and "
                "--trial_workers out, or give another --scheduler."
            )
        try:
            from cluster.session import session
        except ImportError:
            raise UserError(
                "Ray is not installed, and a sweep needs it; pip install 'ray[default,train,tune]'."
            ) from None
        import jax

        jax.config.update("jax_platforms", "cpu")  # this process only reads prints; the trials have the accelerators
        from tune import sweep

        if parent := os.environ.pop(PARENT, ""):
            threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
        out = Path(os.path.abspath(resolve(self.sweep_dir)))
        try:
            if self.resume == "never":
                with _alone_in(out):
                    if any(out.glob("*/sweep.json")):
                        _move_away(out)
            with _alone_in(out), session(**sweep.session_options()):
                self._sweeps(out, sweep.platform())
        except ClusterError as e:
            raise UserError(str(e)) from None
        return 0

    def _sweeps(self, out: Path, platform: str) -> None:
        from ifvit import checkpoint

        # Where accelerators are asked for, hosts that have them may be still to come.
        preset = self.preset or ("cpu" if platform == "CPU" and not self.trial_accelerators else "paper")
        plans = self._plans(preset)
        roots = named_roots(self, next(iter(plans.values()))[0])
        print(f"tune: dataset_root {roots}; preset {preset}; sweep in {out}", flush=True)
        best: dict[str, Config] = {}
        trained: dict[str, str] = {}  # the checkpoint of each module's best trial
        finished: list[str] = []  # checkpoints of the trials that were trained to their end, the best first
        for name, (config, space) in plans.items():
            if name == "match":
                if trained:
                    config = config.replace(dense_reg_ckpt=finished[0])
                config = _with_module1(config, self.set)
                if self.joint and len(finished) > 1:
                    space["dense_reg_ckpt"] = Choice(
                        tuple(finished), "Module 1 decides what can be aligned", in_turn=True
                    )
                if trained and _noted(out / name).get("module1") not in (None, _modules1(config, space)):
                    print(
                        "Module 1 is another one now: what was tried on the one before is moved to "
                        f"{_move_away(out / name)}"
                    )
            best[name], finished = self._sweep(name, config, space, out / name)
            trained[RUNS[name]] = finished[0]
        if self.joint:  # the Module 1 that goes with the best Module 2
            trained["dense_reg"] = best["match"].dense_reg_ckpt
            best["dense"] = config_of(
                DenseConfig, checkpoint.read_metadata(checkpoint.locate(trained["dense_reg"]))["config"]
            )
        _write_best(out, best, trained, preset)
        for name, path in trained.items():
            print(f"Module {1 if name == 'dense_reg' else 2} checkpoint: {path}")
        command = {"dense": "train_dense", "matcher": "train_match", "both": "train_all"}[self.module]
        print(f"best settings: {out / 'best.toml'} (python -m ifvit.{command} --config {out / 'best.toml'} …)")

    def _plans(self, preset: str) -> dict[str, tuple[Config, spaces.Space]]:
        """For each module that is searched, its first configuration and its search space. UserError for mistakes."""
        names = {"dense": ("dense",), "matcher": ("match",), "both": ("dense", "match")}[self.module]
        if self.module == "both":
            check_common(self.set)
        table = spaces.read_space(read_toml(self.space)) if self.space else {"dense": {}, "match": {}}
        spaces.check_names(self.search, names, table)
        plans = {}
        for name in names:
            cls, prefix = spaces.CONFIGS[name], name if self.module == "both" else ""
            more = given(dense_reg_ckpt=self.pretrained_ckpt) if name == "match" else {}
            config = build_config(cls, self, more, preset, prefix)
            config = with_changes(config, spaces.fixed(table[name]))
            items = [item.partition("=")[0].rpartition(".") for item in self.set]
            asked = {key for of, _, key in items if of == prefix}  # --set fixes these; they are not searched
            if name == "match" and (theirs := [k for k in keys_with(COMMON) if k in table[name]]):
                raise UserError(f"{theirs[0]} of Module 2 is that of its Module 1; leave it out of [match].")
            space = spaces.space_for(name, config, table[name], self.search, asked)
            if self.scheduler == "pbt":
                kept = spaces.changeable(space)
                if lost := [k for k in (*self.search, *table[name]) if k in space and k not in kept]:
                    raise UserError(
                        f"{lost[0]} cannot change while a trial runs, as population-based training would have it; "
                        "leave it out, or give another --scheduler."
                    )
                space = kept
            plans[name] = config, space
        return plans

    def _sweep(self, name: str, full: Config, space: spaces.Space, out: Path) -> tuple[Config, list[str]]:
        """Runs one module's sweep.

        Returns its best configuration, and the checkpoints of the trials that were trained to the end, best first.
        """
        from ifvit.data.gather import gather
        from ifvit.training.match import checkpoint_of_module1, warn_of_seen_fingers
        from tune import record, results, sweep
        from tune.trial import Plan

        metric, higher = METRICS[name]
        if self.metric:
            metric = self.metric[-1 if name == "match" else 0]
            higher = not any(part in metric for part in LESS_IS_BETTER)
        epochs = min(self.trial_epochs or full.num_epochs, full.num_epochs)
        pbt = self.scheduler == "pbt"
        base = full.replace(num_epochs=epochs, keep_best=1, save_every=1 if pbt else 10**6)
        samples = self.num_samples if space else 1
        # Reads and generates the prints once for all trials, and shows here what is wrong with them.
        _, prints, held_out = gather(base, Host())
        if name == "match" and (module1 := checkpoint_of_module1(base)):
            warn_of_seen_fingers(base, module1, held_out)
        changing = frozenset(space) if pbt else frozenset()
        plan = Plan(name, base, str(out), metric, higher, changing, os.getcwd(), "", {}, watch=watch(self.tracker))
        _check_same_sweep(out, plan, space, prints.digest())
        print(
            f"\n{name}: {samples} trial{'s' * (samples > 1)} of at most {epochs} epochs, {len(space)} settings",
            flush=True,
        )
        for line in spaces.describe(space):
            print(f"  {line}")
        request = sweep.Request(
            samples,
            self.searcher,
            self.scheduler,
            concurrent=self.max_concurrent,
            seed=base.seed,
            wait_for_hosts=self.wait_for_hosts,
            cpus=self.trial_cpus,
            workers=self.trial_workers,
            accelerators=self.trial_accelerators,
        )
        records = sweep.run(plan, space, request)

        ends = [r for r in record.order(records, metric, higher) if (r.end or {}).get("how") == "finished"]
        if not ends:
            raise Failure(f"No trial of {name} was trained to its end; their logs are in {out / 'trials'}.")
        best = ends[0]
        summary = _summary(records, best, metric, plan)
        hint = results.what_next(best, space, base)
        results.write_csv(out / "trials.csv", records, space, metric)
        results.page(out / "index.html", f"Sweep of {name}", [*summary, hint], records, space, base, metric, higher)
        print(
            "\n" + "\n".join([*summary, hint, f"trials: {out / 'trials.csv'}; page: {out / 'index.html'}"]), flush=True
        )
        folders = [record.folder_of(out, r.number) for r in ends]
        if epochs < full.num_epochs:
            best, folder = _to_its_end(plan, full, space, request, ends)
            folders = [folder]
        chosen = plan.config(best.values, best.number).replace(num_epochs=full.num_epochs)
        return chosen, [str(folder / f"{RUNS[name]}_ckpt") for folder in folders]


def _with_module1(config: MatchConfig, given: tuple[str, ...]) -> MatchConfig:
    """The configuration with the settings that Module 2 takes from its Module 1.

    UserError where --set gives another value for one of them.
    """
    from ifvit.training.match import like_module1

    found = like_module1(config)
    for k in keys_with(COMMON):
        if found[k] != config[k] and any(item.startswith((f"{k}=", f"match.{k}=")) for item in given):
            raise UserError(
                f"{k} is {found[k]} of Module 1 ({config.dense_reg_ckpt}), and --set gives Module 2 {config[k]}; "
                "leave that out."
            )
    return found


def _to_its_end(plan, full: Config, space: spaces.Space, request, ends: list):
    """Trains the best trial for as long as the configuration says; where it fails, the next best.

    Returns the trial and its run's folder. Failure where every trial fails.
    """
    from tune import record, sweep

    folders = [Path(plan.folder, f"best_{r.number:03d}") for r in ends]
    for best, folder in zip(ends, folders):
        last = dataclasses.replace(plan, base=with_changes(full, best.values), folder=str(folder))
        try:
            sweep.run(last, space, dataclasses.replace(request, num_samples=1, scheduler="none"))
            return best, record.folder_of(folder, 0)
        except Failure:
            end = record.read(folder, 0).end
            print(
                f"trial {best.number} fails when it is trained to its end: {end['reason'] if end else 'see its log'}",
                flush=True,
            )
    for folder in folders:  # without this file the same command tries them again
        (record.folder_of(folder, 0) / "ended.json").unlink(missing_ok=True)
    raise Failure(
        f"No trial of {plan.module} could be trained to its end; mend that, and the same command goes on. Their logs "
        f"are in {plan.folder}/best_*/trials."
    )


def _summary(records, best, metric: str, plan) -> list[str]:
    ends = [r.end["how"] for r in records if r.end]
    first = records[0].last(metric)
    full = max((r.steps for r in records if (r.end or {}).get("how") == "finished"), default=0)
    # The steps that each trial would have taken to its end.
    whole = {r.number: r.rows[-1]["step"] / r.epochs * plan.base.num_epochs for r in records if r.rows}
    share = full and sum(r.steps / whole.get(r.number, full) for r in records) / len(records)
    values = (
        ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in best.values.items())
        or "the configuration as it is"
    )
    lines = [
        f"{len(records)} trials: " + ", ".join(f"{ends.count(h)} {h}" for h in ("finished", "stopped", "failed")),
        f"best: trial {best.number}, {metric} {best.last(metric):.4g} after {best.epochs} epochs: {values}",
    ]
    # Population-based training has changed trial 0, which then does not have the configuration as it is.
    if best.number != 0 and first is not None and not plan.changing:
        lines.append(f"the configuration as it is: {metric} {first:.4g} after {records[0].epochs} epochs")
    if full:
        lines.append(f"{share:.0%} of the steps that all trials in full would take")
    return lines


def _modules1(config: MatchConfig, space: spaces.Space) -> list[str]:
    """A short digest of each Module 1 of a sweep, which tells it from others.

    It is made from the checkpoint's own digests, or from the whole file where Module 1 is a pickle.
    """
    from ifvit import checkpoint
    from ifvit.training.match import module1_folder

    def of(path: str) -> str:
        if not path:
            return "none"
        found = module1_folder(config.replace(dense_reg_ckpt=path))
        content = (
            json.dumps(checkpoint.read_metadata(found)["digests"]).encode() if found.is_dir() else found.read_bytes()
        )
        return hashlib.sha256(content).hexdigest()[:16]

    return [
        of(path) for path in (space["dense_reg_ckpt"].values if "dense_reg_ckpt" in space else (config.dense_reg_ckpt,))
    ]


def _noted(out: Path) -> dict:
    """The content of a folder's `sweep.json`; UserError where it is damaged."""
    file = out / "sweep.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        raise UserError(f"{file} is damaged; give --resume never, or another --sweep_dir.") from None


def _check_same_sweep(out: Path, plan, space, data: str) -> None:
    """Writes `sweep.json`, which says what the sweep is. UserError where the folder holds another sweep.

    `data`: digest of the prints.
    """
    free = keys_with(FREE)

    base = {k: v for k, v in plan.base.to_dict().items() if k not in free}
    ours = json.loads(
        json.dumps(
            {
                "metric": plan.metric,
                "configuration": base,
                "data": data,
                "module1": _modules1(plan.base, space) if plan.module == "match" else [],
                "space": {k: {**dataclasses.asdict(p), "why": ""} for k, p in space.items()},
            }
        )
    )
    if theirs := _noted(out):
        theirs["configuration"] = {
            k: v for k, v in completed(type(plan.base), theirs["configuration"]).items() if k not in free
        }
        for part in ("configuration", "space"):
            for key in ours[part].keys() | theirs[part].keys():
                if ours[part].get(key) != theirs[part].get(key):
                    raise UserError(
                        f"{out} holds a sweep with another {part}: {key} was {theirs[part].get(key)}, and is "
                        f"{ours[part].get(key)}. Give the same, or --resume never, or another --sweep_dir."
                    )
        if ours["metric"] != theirs["metric"]:
            raise UserError(
                f"{out} holds a sweep by the metric {theirs['metric']}; give the same, or another --sweep_dir."
            )
        for part, what in (("data", "other prints"), ("module1", "another Module 1")):
            if theirs.get(part) != ours[part]:
                raise UserError(
                    f"{out} holds a sweep on {what}; give the same, or --resume never, or another --sweep_dir."
                )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "sweep.json", json.dumps(ours, indent=1) + "\n")


def _write_best(out: Path, best: dict[str, Config], trained: dict[str, str], preset: str) -> None:
    """Writes best.toml and best.json, with what an earlier sweep in this folder has found for the other module."""
    from tune import results
    from tune.record import read_all

    if (out / "best.toml").exists() and (out / "best.json").exists():
        found = {
            name: config_of(spaces.CONFIGS[name], table) for name, table in read_toml(str(out / "best.toml")).items()
        }
        best, trained, new = found | best, json.loads((out / "best.json").read_text(encoding="utf-8")) | trained, best
        if len(best) > len(new) and (other := [k for k in keys_with(COMMON) if best["dense"][k] != best["match"][k]]):
            (old,) = best.keys() - new.keys()
            print(
                f"What was found for {old} before goes with another {other[0]}: it is left out of {out / 'best.toml'}."
            )
            best.pop(old), trained.pop(RUNS[old], None)
        best, trained = (
            {name: table[name] for name in order if name in table}
            for table, order in ((best, RUNS), (trained, RUNS.values()))
        )
    searched = {name: {k for r in read_all(out / name) for k in r.values} for name in best}
    header = [f"The best of a sweep from preset {preset}; --config of every training command."]
    write_whole(out / "best.toml", results.best_toml(best, searched, header))
    write_whole(out / "best.json", json.dumps(trained, indent=1))


def _move_away(out: Path) -> Path:
    """Gives a sweep's folder another name, and returns that."""
    number = next(n for n in range(1, 10**6) if not out.with_name(f"{out.name}_before_{n}").exists())
    return out.rename(out.with_name(f"{out.name}_before_{number}"))


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """A block in which this process alone has a sweep's folder. UserError where another one has it and does not end."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("ab") as file:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"Another sweep is running in {out}; wait for its end, or give another --sweep_dir."
                    ) from None
                time.sleep(0.5)
        yield


def _end_with(parent: int) -> None:
    """Sends SIGTERM to this process when the process that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(cli.main(Args, Args.command))
