"""Searches the settings of one module or of both.

    python -m tune --module both --num_samples 24 --dataset_root DIR
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from cluster.host import ClusterError, Host
from ifvit import cli
from ifvit.cli import Failure
from ifvit.commands import ConfigArgs, build_config, given
from ifvit.config import Config, DenseConfig, MatchConfig, config_of, read_toml, with_changes
from ifvit.errors import UserError
from ifvit.paths import resolve
from tune import space as spaces
from tune.space import RUNS, Choice

METRICS = {"dense": ("accuracy", True), "match": ("eer", False)}  # by default, and whether more is better
LESS_IS_BETTER = ("eer", "loss", "l_d", "l_e", "l_a", "impostor", "seconds")  # in a metric's name


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
    """of validation, by which trials are judged; with `both` one for each module [accuracy eer]"""
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
        if self.num_samples < 1:
            raise UserError(f"--num_samples is {self.num_samples}; give at least 1.")
        if self.trial_epochs is not None and self.trial_epochs < 1:
            raise UserError(f"--trial_epochs is {self.trial_epochs}; give at least 1.")
        if self.trial_workers < 1:
            raise UserError(f"--trial_workers is {self.trial_workers}; give at least 1.")
        if self.trial_workers > 1 and (self.trial_cpus or self.trial_accelerators):
            raise UserError("A trial of several workers takes whole hosts; leave --trial_cpus and --trial_accelerators out.")
        if self.resume not in ("auto", "never"):
            raise UserError(f"--resume {self.resume}: a sweep takes auto or never.")
        if self.metric and len(self.metric) != (2 if self.module == "both" else 1):
            raise UserError(f"--metric names {len(self.metric)} metrics; give one for each module that is searched.")
        if "://" in self.sweep_dir:
            raise UserError(f"--sweep_dir {self.sweep_dir}: a sweep lies in a directory that all hosts share; give its path.")
        if self.joint and self.module != "both":
            raise UserError("--joint searches both modules; give --module both with it.")
        if self.joint and self.trial_epochs:
            raise UserError("--joint takes Module 1 from trials that were trained to the end; leave --trial_epochs out.")
        self._plans(self.preset or "paper")  # what is wrong with flags and files shows before Ray is started
        try:
            from cluster.session import session
        except ImportError:
            raise UserError("Ray is not installed, and a sweep needs it; pip install 'ray[default,train,tune]'.") from None
        import jax

        jax.config.update("jax_platforms", "cpu")  # here prints are read, no more: accelerators are the trials'
        from tune import sweep

        try:
            with session(**sweep.session_options()):
                self._sweeps(sweep.platform())
        except ClusterError as e:
            raise UserError(str(e)) from None
        return 0

    def _sweeps(self, platform: str) -> None:
        from ifvit import checkpoint

        out = Path(os.path.abspath(resolve(self.sweep_dir)))
        if self.resume == "never":
            _move_away(out)
        preset = self.preset or ("cpu" if platform == "CPU" else "paper")
        roots = " ".join(self.dataset_root) or "synthetic (no --dataset_root given: prints are generated)"
        print(f"tune: dataset_root {roots}; preset {preset}; sweep in {out}", flush=True)
        best: dict[str, Config] = {}
        trained: dict[str, str] = {}  # the best ones' checkpoints
        for name, (config, space) in self._plans(preset).items():
            if name == "match":
                if trained:
                    config = config.replace(dense_reg_ckpt=finished[0])
                config = _like_module1(config)
                if self.joint and len(finished) > 1:
                    space["dense_reg_ckpt"] = Choice(tuple(finished), "Module 1 decides what can be aligned")
            best[name], finished = self._sweep(name, config, space, out / name)
            trained[RUNS[name]] = finished[0]
        if self.joint:  # the Module 1 that goes with the best Module 2
            trained["dense_reg"] = best["match"].dense_reg_ckpt
            best["dense"] = config_of(DenseConfig, checkpoint.read_metadata(checkpoint.locate(trained["dense_reg"]))["config"])
        _write_best(out, best, trained, preset)
        for name, path in trained.items():
            print(f"Module {1 if name == 'dense_reg' else 2} checkpoint: {path}")
        command = {"dense": "train_dense", "matcher": "train_match", "both": "train_all"}[self.module]
        print(f"best settings: {out / 'best.toml'} (python -m ifvit.{command} --config {out / 'best.toml'} …)")

    def _plans(self, preset: str) -> dict[str, tuple[Config, spaces.Space]]:
        """Of each module that is searched, the configuration to begin with, and the space. UserError for what is wrong with them."""
        names = {"dense": ("dense",), "matcher": ("match",), "both": ("dense", "match")}[self.module]
        table = spaces.read_space(read_toml(self.space)) if self.space else {"dense": {}, "match": {}}
        spaces.check_names(self.search, names, table)
        plans = {}
        for name in names:
            cls, prefix = spaces.CONFIGS[name], name if self.module == "both" else ""
            more = given(dense_reg_ckpt=self.pretrained_ckpt) if name == "match" else {}
            config = build_config(cls, self, more, preset, prefix)
            config = with_changes(config, spaces.fixed(table[name]))
            items = [item.partition("=")[0].rpartition(".") for item in self.set]
            asked = {key for of, _, key in items if of == prefix}  # is not searched
            space = {k: p for k, p in spaces.space_for(name, config, table[name], self.search).items() if k not in asked}
            plans[name] = config, spaces.changeable(space) if self.scheduler == "pbt" else space
        return plans

    def _sweep(self, name: str, full: Config, space: spaces.Space, out: Path) -> tuple[Config, list[str]]:
        """One module's sweep: its best configuration, and the checkpoints of those that were trained to the end, best first."""
        from ifvit.data.gather import gather
        from ifvit.training.match import checkpoint_of_module1
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
        gather(base, Host())  # prints are read and generated once, and what is wrong with them shows here
        if name == "match":
            checkpoint_of_module1(base)
        plan = Plan(name, base, str(out), metric, higher, frozenset(space) if pbt else frozenset(), os.getcwd(), "", {})
        _check_same_sweep(out, plan, space)
        print(f"\n{name}: {samples} trial{'s' * (samples > 1)} of at most {epochs} epochs, {len(space)} settings", flush=True)
        for line in spaces.describe(space):
            print(f"  {line}")
        request = sweep.Request(samples, self.searcher, self.scheduler, concurrent=self.max_concurrent, seed=base.seed,
                                wait_for_hosts=self.wait_for_hosts, cpus=self.trial_cpus, workers=self.trial_workers,
                                accelerators=self.trial_accelerators)
        records = sweep.run(plan, space, request)

        ends = [r for r in record.order(records, metric, higher) if (r.end or {}).get("how") == "finished"]
        if not ends:
            raise Failure(f"No trial of {name} was trained to its end; their logs are in {out / 'trials'}.")
        best = ends[0]
        summary = _summary(records, best, metric, plan)
        hint = results.what_next(best, space, base)
        results.write_csv(out / "trials.csv", records, space, metric)
        results.page(out / "index.html", f"Sweep of {name}", [*summary, hint], records, space, base, metric, higher)
        print("\n" + "\n".join([*summary, hint, f"trials: {out / 'trials.csv'}; page: {out / 'index.html'}"]), flush=True)
        run_name = RUNS[name]
        if epochs < full.num_epochs:  # the best one to its end
            last = dataclasses.replace(plan, base=with_changes(full, best.values), folder=str(out / "best"))
            sweep.run(last, space, dataclasses.replace(request, num_samples=1, scheduler="none"))
            finished = [str(record.folder_of(last.folder, 0) / f"{run_name}_ckpt")]
        else:
            finished = [str(record.folder_of(out, r.number) / f"{run_name}_ckpt") for r in ends]
        chosen = plan.config(best.values, best.number).replace(num_epochs=full.num_epochs)
        return chosen, finished


def _summary(records, best, metric: str, plan) -> list[str]:
    ends = [r.end["how"] for r in records if r.end]
    first = records[0].last(metric)
    full = max((r.steps for r in records if (r.end or {}).get("how") == "finished"), default=0)
    share = sum(r.steps / max(r.steps, _steps_in_full(r, plan)) for r in records) / len(records)
    values = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in best.values.items()) or "the configuration as it is"
    lines = [f"{len(records)} trials: " + ", ".join(f"{ends.count(h)} {h}" for h in ("finished", "stopped", "failed")),
             f"best: trial {best.number}, {metric} {best.last(metric):.4g} after {best.epochs} epochs: {values}"]
    if best.number != 0 and first is not None:
        lines.append(f"the configuration as it is: {metric} {first:.4g} after {records[0].epochs} epochs")
    if full:
        lines.append(f"{share:.0%} of the steps that all trials in full would take")
    return lines


def _steps_in_full(r, plan) -> int:
    """Steps that a trial would have taken, had it not been stopped."""
    return round(r.steps / r.epochs * plan.base.num_epochs) if r.epochs else 0


def _like_module1(config: MatchConfig) -> MatchConfig:
    """With what it has in common with its Module 1 taken from that one."""
    from ifvit import checkpoint
    from ifvit.training.match import COMMON

    if not config.dense_reg_ckpt:
        return config
    try:
        found = checkpoint.locate(config.dense_reg_ckpt)
    except UserError as e:
        raise UserError(f"Module 1 checkpoint not found: {config.dense_reg_ckpt}; train Module 1 first (python -m "
                        "ifvit.train_dense), or give its path with --pretrained_ckpt.") from e
    if not found.is_dir():
        return config
    theirs = checkpoint.read_metadata(found)["config"]
    return with_changes(config, {k: theirs[k] for k in COMMON if k in theirs})


def _check_same_sweep(out: Path, plan, space) -> None:
    """Notes what the sweep is; UserError where the folder holds another one."""
    from ifvit.training.loop import FREE

    base = {k: v for k, v in plan.base.to_dict().items() if k not in FREE}
    ours = json.loads(json.dumps({"metric": plan.metric, "configuration": base,
                                  "space": {k: {**dataclasses.asdict(p), "why": ""} for k, p in space.items()}}))
    file = out / "sweep.json"
    if file.exists():
        try:
            theirs = json.loads(file.read_text())
        except ValueError:
            raise UserError(f"{file} is damaged; give --resume never, or another --sweep_dir.") from None
        for part in ("configuration", "space"):
            for key in ours[part].keys() | theirs[part].keys():
                if ours[part].get(key) != theirs[part].get(key):
                    raise UserError(f"{out} holds a sweep with another {part}: {key} was {theirs[part].get(key)}, and is "
                                    f"{ours[part].get(key)}. Give the same, or --resume never, or another --sweep_dir.")
        if ours["metric"] != theirs["metric"]:
            raise UserError(f"{out} holds a sweep by the metric {theirs['metric']}; give the same, or another --sweep_dir.")
        return
    out.mkdir(parents=True, exist_ok=True)
    part = out / "sweep.json.part"
    part.write_text(json.dumps(ours, indent=1) + "\n")
    os.replace(part, file)


def _write_best(out: Path, best: dict[str, Config], trained: dict[str, str], preset: str) -> None:
    from tune import results
    from tune.record import read_all

    searched = {name: {k for r in read_all(out / name) for k in r.values} for name in best}
    header = [f"The best of a sweep from preset {preset}; --config of every training command."]
    for name, text in (("best.toml", results.best_toml(best, searched, header)), ("best.json", json.dumps(trained, indent=1))):
        part = out / f"{name}.part"
        part.write_text(text)
        os.replace(part, out / name)


def _move_away(out: Path) -> None:
    if out.exists():
        number = next(n for n in range(1, 10**6) if not out.with_name(f"{out.name}_before_{n}").exists())
        out.rename(out.with_name(f"{out.name}_before_{number}"))


if __name__ == "__main__":
    sys.exit(cli.main(Args, Args.command))
