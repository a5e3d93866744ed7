"""Searches the settings of one module or of both.

python -m tune --module both --num_samples 24 --dataset_root DIR
"""

import math
import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from cluster.host import ClusterError, Host
from ifvit import cli
from ifvit.commands import ConfigArgs, build_config, check_common, check_outlives_job, given, named_roots, tried
from ifvit.config import Config, DenseConfig, config_of, keys_with, read_toml, with_changes
from ifvit.errors import Failure, UserError
from ifvit.fields import COMMON
from ifvit.paths import resolve
from ifvit.training.watch import watch
from tune import space as spaces
from tune.campaign import modules1, summarise, to_its_end, with_module1
from tune.folder import PARENT, alone_in, check_same_sweep, end_with, move_away, noted, write_best
from tune.space import RUNS, Choice

METRICS = {"dense": ("accuracy", True), "match": ("eer", False)}  # the default metric, and whether more is better
LESS_IS_BETTER = re.compile("eer|loss|^l_|impostor|seconds")  # what such metrics' names have


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
            threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
        out = Path(os.path.abspath(resolve(self.sweep_dir)))
        try:
            if self.resume == "never":
                with alone_in(out):
                    if any(out.glob("*/sweep.json")):
                        move_away(out)
            with alone_in(out), session(**sweep.session_options()):
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
                config = with_module1(config, self.set)
                if self.joint and len(finished) > 1:
                    space["dense_reg_ckpt"] = Choice(
                        tuple(finished), "Module 1 decides what can be aligned", in_turn=True
                    )
                if trained and noted(out / name).get("module1") not in (None, modules1(config, space)):
                    print(
                        "Module 1 is another one now: what was tried on the one before is moved to "
                        f"{move_away(out / name)}"
                    )
            best[name], finished = self._sweep(name, config, space, out / name)
            trained[RUNS[name]] = finished[0]
        if self.joint:  # the Module 1 that goes with the best Module 2
            trained["dense_reg"] = best["match"].dense_reg_ckpt
            best["dense"] = config_of(
                DenseConfig, checkpoint.read_metadata(checkpoint.locate(trained["dense_reg"]))["config"]
            )
        write_best(out, best, trained, preset)
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
            higher = not LESS_IS_BETTER.search(metric)
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
        check_same_sweep(out, plan, space, prints.digest())
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
        summary = summarise(records, best, metric, plan)
        hint = results.what_next(best, space, base)
        results.write_csv(out / "trials.csv", records, space, metric)
        results.page(out / "index.html", f"Sweep of {name}", [*summary, hint], records, space, base, metric, higher)
        print(
            "\n" + "\n".join([*summary, hint, f"trials: {out / 'trials.csv'}; page: {out / 'index.html'}"]), flush=True
        )
        folders = [record.folder_of(out, r.number) for r in ends]
        if epochs < full.num_epochs:
            best, folder = to_its_end(plan, full, space, request, ends)
            folders = [folder]
        chosen = plan.config(best.values, best.number).replace(num_epochs=full.num_epochs)
        return chosen, [str(folder / f"{RUNS[name]}_ckpt") for folder in folders]


if __name__ == "__main__":
    sys.exit(cli.main(Args, Args.command))
