"""Trains Module 1, seeds Module 2 from it, trains that, evaluates both: from folders of prints to a matcher.

python -m ifvit.train_all --dataset_root DIR [DIR …]
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from etils import epath

from cluster.host import PREEMPTED, Host
from cluster.job import Request
from ifvit import cli
from ifvit.commands import TrainArgs, build_config, check_common, check_outlives_job, given, tried
from ifvit.config import DenseConfig, MatchConfig, keys_with, read_toml
from ifvit.errors import UserError
from ifvit.fields import COMMON
from ifvit.files import write_whole
from ifvit.paths import resolve


@dataclass(frozen=True)
class Args(TrainArgs):
    """Trains both modules and evaluates them on the held-out fingers; `--set dense.KEY=…`, `--set match.KEY=…`."""

    dense_checkpoint_dir: str | None = None
    """Module 1's checkpoints and metrics [./checkpoints/dense_reg]"""
    matcher_checkpoint_dir: str | None = None
    """Module 2's checkpoints and metrics [./checkpoints/matcher]; the evaluation goes into its folder `evaluation`"""
    num_classes: int | None = None
    """ArcFace classes, at least the number of training fingers [counted]"""
    batch_size: int | None = None
    """pairs a step of both modules, over all devices [the preset's]"""
    loftr_ckpt: str | None = None
    """LoFTR weights (.ckpt, .pt, .safetensors) that start Module 1's transformer [none]"""

    tune: int = 0
    """search each module's settings in so many trials first (python -m tune); --set fixes a setting [no search]"""
    sweep_dir: str = "./checkpoints/sweep"
    """of --tune: where its trials and results go"""

    command: ClassVar[str] = "ifvit.train_all"

    def run(self) -> int:
        if self.tune < 0:
            raise UserError(f"--tune is {self.tune}; give the number of trials, or leave it out.")
        if not self.tune:
            return super().run()
        sweep = Path(os.path.abspath(resolve(self.sweep_dir)))
        self._check(sweep)
        if code := self._search():
            return code
        found = replace(self, tune=0, config=str(with_best(self.config, sweep)))
        for config, (name, ckpt) in zip(
            tried(found.configs, self.preset), json.loads((sweep / "best.json").read_text(encoding="utf-8")).items()
        ):
            adopt(ckpt, config.checkpoint_dir, name, self.resume, sweep)
        return replace(found, resume="auto").run()

    def _check(self, sweep: Path) -> None:
        """UserError for what would show after the search only."""
        from ifvit import checkpoint
        from ifvit.training import run_folder

        self.request()
        self.watch()
        if self.profile:
            raise UserError(
                "--profile does not go with --tune: trials are not traced; search first, then train with --config "
                "best.toml and --profile."
            )
        check_outlives_job(str(sweep), "sweep_dir")
        for name, where in (
            ("num_workers", "--trial_workers"),
            ("workers_per_host", "--trial_workers"),
            ("devices", "--trial_accelerators"),
        ):
            if getattr(self, name) != getattr(Request, name):
                raise UserError(
                    f"--{name} does not go with --tune: its trials take what the cluster has. Search with python -m "
                    f"tune and {where}, then train with --config best.toml and --{name}."
                )
        check_common(self.set)
        for config, name, flag in zip(tried(self.configs, self.preset), ("dense_reg", "matcher"), ("dense", "matcher")):
            check_outlives_job(config.checkpoint_dir, "checkpoint_dir")
            here = checkpoint.as_writable_path(config.checkpoint_dir)
            if (
                self.resume == "auto"
                and not (sweep / "dense/sweep.json").exists()
                and run_folder.candidates(here, name, 1)
            ):
                raise UserError(
                    f"{here} holds a run already, and the search would end in another one; give another "
                    f"--{flag}_checkpoint_dir, or --resume never."
                )

    def _search(self) -> int:
        """The sweep, in a process of its own: it must not hold the accelerators of this one. Its exit code."""
        from tune.folder import PARENT

        flags = {
            "preset": self.preset,
            "config": self.config,
            "resume": self.resume,
            "seed": self.seed,
            "ppi": self.ppi,
            "ridges": self.ridges,
            "names": self.names,
            "num_samples": self.tune,
            "sweep_dir": self.sweep_dir,
            "wait_for_hosts": self.wait_for_hosts,
        }
        fixed = {
            "dense.batch_size": self.batch_size,
            "match.batch_size": self.batch_size,
            "match.num_classes": self.num_classes,
            "dense.loftr_ckpt": self.loftr_ckpt,
        }
        words = [w for k, v in given(**flags).items() if v != "" for w in (f"--{k}", str(v))]
        # Flags win over --set.
        words += [w for item in self.set if item.partition("=")[0] not in given(**fixed) for w in ("--set", item)]
        words += [w for k, v in given(**fixed).items() for w in ("--set", f"{k}={v}")]
        words += ["--dataset_root", *self.dataset_root] if self.dataset_root else []
        words += ["--tracker", *self.tracker]
        sweep = subprocess.Popen(
            [sys.executable, "-m", "ifvit.tune", "--module", "both", *words],
            env=os.environ | {PARENT: str(os.getpid())},
        )
        before = signal.signal(signal.SIGTERM, lambda *_: sweep.terminate())
        try:
            code = sweep.wait()
        except KeyboardInterrupt:
            try:
                code = sweep.wait(10)  # a terminal has told the sweep too
            except subprocess.TimeoutExpired:  # others have not
                sweep.send_signal(signal.SIGINT)
                code = sweep.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        return PREEMPTED if code == -signal.SIGTERM else code  # it had not begun yet

    def configs(self, preset: str | None) -> tuple[DenseConfig, MatchConfig]:
        if self.resume not in ("auto", "never"):
            raise UserError(
                f"--resume {self.resume}: train_all has two modules and takes auto or never; give a path to "
                "train_dense or train_match."
            )
        dense = build_config(
            DenseConfig,
            self,
            given(checkpoint_dir=self.dense_checkpoint_dir, batch_size=self.batch_size, loftr_ckpt=self.loftr_ckpt),
            preset,
            "dense",
        )
        match = build_config(
            MatchConfig,
            self,
            given(checkpoint_dir=self.matcher_checkpoint_dir, batch_size=self.batch_size, num_classes=self.num_classes),
            preset,
            "match",
        )
        if not self.tune:  # a search gives Module 2 what its Module 1 has
            for k in keys_with(COMMON):
                if dense[k] != match[k]:
                    raise UserError(
                        f"{k} is {dense[k]} for Module 1 and {match[k]} for Module 2, which starts from its "
                        f"transformer; give both the same (--set dense.{k}=… --set match.{k}=…)."
                    )
        return dense, match

    def train(self, configs: tuple, host: Host) -> None:
        from ifvit import train_dense, train_match
        from ifvit.training.startup import check_folder

        dense, match = configs
        check_folder(match, host)  # not when Module 1 has been trained
        print("Module 1: dense registration", flush=True)
        module1 = train_dense.run(dense, self.resume, host, watch=self.watch())
        print("Module 2: matcher", flush=True)
        match = match.replace(dense_reg_ckpt=str(module1))
        module2 = train_match.run(match, self.resume, host, watch=self.watch())
        self.report(match, module1, module2, host)

    def report(self, match: MatchConfig, module1: epath.Path, module2: epath.Path, host: Host) -> None:
        """Evaluates both modules on the held-out fingers; prints the table and where everything lies."""
        from ifvit.checkpoint.places import written_here
        from ifvit.data.gather import gather
        from ifvit.evaluate import evaluate, print_table
        from ifvit.scoring.report import of_curves
        from ifvit.scoring.scorer import Scorer
        from ifvit.training.metrics import read_rows

        _, _, held_out = gather(match, host)
        out = module2.parent / "evaluation"
        rows = [r for r in read_rows(module1.parent / "metrics.jsonl") if r["split"] == "val" and "accuracy" in r]
        print(f"\nEvaluation on {len({p.identity for p in held_out.prints})} held-out fingers")
        if rows:
            print(f"registration: {rows[-1]['accuracy']:.1%} of the cells of a known warp found within one cell (8 px)")
        trained = [
            of_curves(run / "curves.png", told, run.name)
            for run in (module1.parent, module2.parent)
            if (told := read_rows(run / "metrics.jsonl")) and (run / "curves.png").exists()
        ]
        for name, ckpt, folder in (
            ("Module 1, ridges that agree", module1, out / "dense_reg"),
            ("Module 2, fused score", module2, out / "matcher"),
        ):
            print(f"\n{name}")
            try:
                scorer = Scorer.from_checkpoint(ckpt)
                with written_here(folder) as here:
                    print_table(evaluate(scorer, held_out, here, told={"Checkpoint": scorer.card()}, first=trained))
                if scorer.module == "matcher" and scorer.fusion:
                    print(
                        "(The weights of the fused score were fitted on pairs of these fingers; ifvit.evaluate, on "
                        "prints of others, tells more.)"
                    )
            except UserError as e:  # the training is done and good; single impressions, say, have no genuine pair
                print(f"not evaluated: {e}")
        print()
        for what, path in (
            ("Module 1 checkpoint", module1),
            ("Module 2 checkpoint", module2),
            ("curves, Module 1", module1.parent / "curves.png"),
            ("curves, Module 2", module2.parent / "curves.png"),
            ("rates, scores, DET, histogram, matches", out),
            ("report", out / "matcher" / "report.html"),
        ):
            print(f"{what}: {path}")


def with_best(config: str, sweep: Path) -> Path:
    """A user's `--config` file ('' for none) with what a sweep has found, as a file in the sweep's folder."""
    found = read_toml(str(sweep / "best.toml"))
    asked = read_toml(config) if config else {}
    plain = {k: v for k, v in asked.items() if k not in found}
    tables = {name: asked.get(name, {}) | table for name, table in found.items()}
    lines = lambda table: [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in table.items()]
    text = "\n".join(
        [*lines(plain), *(line for name, table in tables.items() for line in ("", f"[{name}]", *lines(table)))]
    )
    file = sweep / "train_all.toml"
    write_whole(file, text + "\n")
    return file


def adopt(ckpt: str, folder: str, name: str, resume: str, sweep: Path) -> None:
    """A sweep's best run, trained to its end, as the run of a checkpoint directory that has none of its own.

    One that was adopted from the sweep before gives way where the sweep has found a better one since.
    """
    from ifvit import checkpoint
    from ifvit.checkpoint.places import duplicate
    from ifvit.training import run_folder

    here = checkpoint.as_writable_path(folder)
    if resume == "never":
        run_folder.move_away(here, name)
    source = checkpoint.locate(ckpt)
    if there := run_folder.candidates(here, name, 1):
        try:
            theirs = checkpoint.read_metadata(there[0])
        except UserError:  # training sets a damaged one aside
            return
        if not (
            Path(theirs["config"]["checkpoint_dir"]).is_relative_to(sweep)
            and theirs["digests"] != checkpoint.read_metadata(source)["digests"]
        ):
            return
        run_folder.move_away(here, name)
    here.mkdir(parents=True, exist_ok=True)
    for file in ("metrics.jsonl", "curves.png", "config.json"):
        if (source.parent / file).exists():
            (here / file).write_bytes((source.parent / file).read_bytes())
    duplicate(source, here / f"{name}_ckpt")


if __name__ == "__main__":
    sys.exit(cli.main(Args, Args.command, huge_pages=True))
