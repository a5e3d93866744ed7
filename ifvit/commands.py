"""What the training commands share: flags, and how preset, file and flags make a configuration."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ifvit import cli
from ifvit.config import DenseConfig, MatchConfig, default_preset, parse_value, preset, read_toml, with_changes
from ifvit.data.pairs import SYNTHETIC
from ifvit.errors import UserError
from ifvit.paths import cache_dir, resolve
from ifvit.training.sharding import use_cpu_cores


@dataclass(frozen=True)
class TrainArgs:
    """Flags of every training command."""

    dataset_root: tuple[str, ...] = ()
    """folders of prints, one or several, or `synthetic`; left out, prints are generated"""
    preset: Literal["paper", "cpu", "quick", "smoke"] | None = None
    """size of everything; left out, `paper` with an accelerator, else `cpu`"""
    config: str = ""
    """TOML file of configuration keys; yields to flags, wins over the preset"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """one configuration key, `--set key=value`; may be repeated"""
    resume: str = "auto"
    """`auto` goes on from the newest checkpoint, `never` trains anew, or a checkpoint's path"""
    seed: int | None = None
    """of everything that is random; left out, the configuration's (0)"""
    ppi: float | None = None
    """resolution of the prints, where neither the file nor the set tells"""

    def common(self) -> dict:
        """Flags that are configuration keys of both modules, those given."""
        flags = {"seed": self.seed, "ppi": self.ppi, "dataset_root": tuple(self.dataset_root) or (SYNTHETIC,)}
        return {k: v for k, v in flags.items() if v is not None}


def given(**flags) -> dict:
    """The flags that were given."""
    return {k: v for k, v in flags.items() if v is not None}


def build_config(cls, args: TrainArgs, flags: dict, table: str = ""):
    """Preset, then the TOML file, then `--set`, then flags; every key checked.

    `table` (`dense` or `match`, in train_all) picks the keys of `[table]` in the file and `table.key`
    of `--set`; without it both are plain keys.
    """
    use_cpu_cores()
    config = preset(args.preset or default_preset(), cls)
    if args.config:
        raw = read_toml(args.config)
        tables = {"dense": DenseConfig, "match": MatchConfig}
        plain = {k: v for k, v in raw.items() if k not in tables}
        mine = table or ("dense" if cls is DenseConfig else "match")
        config = with_changes(config, plain | raw.get(mine, {}))
    for item in args.set:
        key, sep, value = item.partition("=")
        if not sep:
            raise UserError(f"--set {item} has no value; write --set {item}=VALUE.")
        if table:
            prefix, dot, key = key.partition(".")
            if not dot or prefix not in ("dense", "match"):
                raise UserError(f"--set {item} names no module; write --set dense.{prefix}=… or --set match.{prefix}=….")
            if prefix != table:
                continue
        config = with_changes(config, {key: parse_value(cls, key, value)})
    config = with_changes(config, args.common() | flags)
    return config.replace(checkpoint_dir=resolve(config.checkpoint_dir))


def start(args: TrainArgs, name: str) -> None:
    """The first log line, and the compilation cache."""
    import jax


    roots = " ".join(args.dataset_root) or "synthetic (no --dataset_root given: prints are generated)"
    devices = jax.devices()
    print(f"{name}: dataset_root {roots}; preset {args.preset or default_preset()}; {len(devices)} × "
          f"{devices[0].device_kind}", flush=True)
    cli.use_compilation_cache(cache_dir() / "compiled")
