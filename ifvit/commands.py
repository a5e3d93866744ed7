"""What the training commands share: flags, how preset, file and flags make a configuration, and where it is run."""

import functools
import importlib
import logging
import os
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from cluster.host import ClusterError, Host
from cluster.job import Job, Request
from cluster.launch import launch
from ifvit import cli
from ifvit.config import (
    Config,
    DenseConfig,
    MatchConfig,
    default_preset,
    keys_with,
    parse_value,
    preset,
    read_toml,
    with_changes,
)
from ifvit.data.sources import SYNTHETIC
from ifvit.devices.cores import cores
from ifvit.devices.sharding import use_cpu_cores
from ifvit.errors import UserError
from ifvit.fields import COMMON
from ifvit.paths import absolute, cache_dir, resolve
from ifvit.training.watch import TENSORBOARD, Watch, watch


@dataclass(frozen=True)
class ConfigArgs:
    """Flags that make a configuration."""

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
    """of the training; `--set data_seed=N` chooses held-out fingers and generated prints [0]"""
    ppi: float | Literal["auto"] | None = None
    """resolution of all prints, whatever their files and sets tell; `auto`: what these tell, unless the ridges tell another"""
    ridges: Literal["dark", "light"] | None = None
    """in the prints' images; `light` of sensors that show them white on black [dark]"""
    names: str | None = None
    """how names are to be read, such as '{database}/{finger}_{impression}': of paths below the folder, without the extension [known sets' names]"""
    tracker: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = TENSORBOARD
    """who is told the metrics, one or several"""

    command: ClassVar[str]  # the module's name

    def common(self) -> dict:
        """Flags that are configuration keys of both modules, those given."""
        flags = {
            "seed": self.seed,
            "ppi": self.ppi,
            "ridges": self.ridges,
            "names": self.names,
            "dataset_root": tuple(self.dataset_root) or None,
        }
        return {k: v for k, v in flags.items() if v is not None}


@dataclass(frozen=True)
class TrainArgs(ConfigArgs):
    """Flags of every training command."""

    runtime: Literal["auto", "local", "ray"] = "auto"
    """`local`: this process with all its devices; `ray`: Ray Train; `auto`: `ray` where RAY_ADDRESS is set (in a Ray job it is), or with several workers"""
    num_workers: str = ""
    """of Ray, N or MIN:MAX (as many as there are hosts for) [one a host]"""
    devices: Literal["auto", "gpu", "tpu", "cpu"] = "auto"
    """of Ray's workers; `auto`: what the cluster has now. Name them where an autoscaler still has to bring the hosts"""
    workers_per_host: int = 0
    """of Ray [one, with all the host has; on a Ray of this machine alone, all]"""
    wait_for_hosts: float = Request.wait_for_hosts
    """seconds that a cluster gets to have the hosts that are asked for"""
    max_failures: int = Request.max_failures
    """failures in a row without a new checkpoint, before the run is given up"""
    hang_timeout: float = Request.hang_timeout
    """seconds without a step after which a process of several ends itself, to be started again; 0: never"""
    coordinator_port: int = Request.coordinator_port
    """of JAX's coordinator, on the first worker's host; 0: any free one"""
    profile: str = ""
    """START:STOP: the steps after START, to STOP, are traced into the run's `profile/`, for TensorBoard, XProf [none]"""

    def configs(self, preset: str | None) -> tuple:
        """The configurations of the modules that are trained; `preset` where no flag names one."""
        raise NotImplementedError

    def train(self, configs: tuple, host: Host) -> None:
        """Trains them in this process, which may be one of several."""
        raise NotImplementedError

    def run(self) -> int:
        """Trains where the flags say; returns the exit code."""
        request = self.request()
        self.watch()
        try:
            code, message = launch(self._job, request, cores())
        except ClusterError as e:
            raise UserError(str(e)) from None
        cli.tell(code, message)
        return code

    def request(self) -> Request:
        """Where the flags say that it runs; UserError where they make no sense."""
        try:
            request = Request(**{f: getattr(self, f) for f in Request.__dataclass_fields__})
            request.on_ray()
        except ClusterError as e:
            raise UserError(str(e)) from None
        return request

    def watch(self) -> Watch:
        """What a run is to show; UserError where that cannot be had."""
        return watch(self.tracker, self.profile)

    def _job(self, platform: str) -> Job:
        """This command as a job for workers of that kind, its flags checked; for '' without a look at the devices."""
        name = self.command.rpartition(".")[2]
        if not platform:
            return Job(functools.partial(run_here, self.command, asdict(self), "", None, None), name)
        preset = self.preset or ("cpu" if platform == "CPU" else "paper")
        configs = tuple(c.replace(checkpoint_dir=absolute(c.checkpoint_dir)) for c in self.configs(preset))
        for config in configs:
            check_outlives_job(config.checkpoint_dir, "checkpoint_dir")
        return Job(
            functools.partial(run_here, self.command, asdict(self), platform, preset, configs),
            name,
            tuple(sorted({c.micro_batch for c in configs})),
            ("ifvit", "jax", "jaxlib", "flax", "optax"),
            **JOB,
        )


JOB = {
    "item": "pairs",
    "another_batch": "a --batch_size that is a multiple",
    "variables": ("IFVIT_", "WANDB_", "MLFLOW_"),
}  # what all of ours have


def check_outlives_job(path: str, what: str) -> None:
    """UserError for a folder that Ray removes with the job."""
    if "working_dir_files" in absolute(path):
        raise UserError(
            f"{what} {path} lies in the job's working directory, which Ray removes; give an absolute path that "
            "all hosts share."
        )


def check_set(items: tuple[str, ...]) -> None:
    """UserError for a key that `--set` has two values for: one of them would go missing in silence."""
    values: dict[str, str] = {}
    for key, sep, value in (item.partition("=") for item in items):
        if sep and values.setdefault(key, value) != value:
            raise UserError(f"--set gives {key} twice ({values[key]!r} and {value!r}); give it once.")


def check_common(items: tuple[str, ...]) -> None:
    """UserError for a `--set match.KEY=…` of a setting that a search takes from Module 1, unless that is given the same."""
    values = {key: value for key, _, value in (item.partition("=") for item in items)}
    for k in keys_with(COMMON):
        if f"match.{k}" in values and values[f"match.{k}"] != values.get(f"dense.{k}"):
            raise UserError(
                f"--set match.{k}=… is for Module 2 alone, which has that of its Module 1; give --set dense.{k}=… too, the same."
            )


def check_backend(platform: str, name: str) -> None:
    """UserError where Ray has given this process, `name`, devices that JAX does not find; `platform`: GPU, TPU or CPU, '' without Ray."""
    import jax

    if platform not in ("", "CPU") and jax.default_backend() == "cpu":
        if os.environ.get("JAX_PLATFORMS"):
            raise UserError(
                f"{name or 'This process'} has a {platform} from Ray, and there JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} forbids "
                "it; unset that where Ray is started on that host, or give --devices cpu."
            )
        raise UserError(
            f"{name or 'This process'} has a {platform} from Ray, and JAX finds none there; install the project with the "
            f"extra {'cuda' if platform == 'GPU' else 'tpu'} on every host, or look after its driver."
        )


def given(**flags) -> dict:
    """The flags that were given."""
    return {k: v for k, v in flags.items() if v is not None}


def run_here(
    command: str, flags: dict, platform: str, preset: str | None, configs: tuple | None, host: Host
) -> tuple[int, str]:
    """A training command in this process: (exit code, message). Of several processes JAX's first one prints.

    `platform`: the devices that Ray gave it, '' where it is to find out.
    """
    args = importlib.import_module(command).Args(**flags)

    def call() -> None:
        import jax

        use_cpu_cores()
        ours = configs or args.configs(preset)
        check_backend(platform, host.name)
        if jax.process_index():  # not Ray's rank: a TPU slice numbers its hosts itself
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it stays open as long as the process)
            logging.getLogger().handlers.clear()
            cli.prepare_output()
        start(args, preset, ours[0])
        args.train(ours, host)

    cli.prepare_output()
    return cli.outcome(call, tried_again=bool(platform))


def build_config(cls, args: ConfigArgs, flags: dict, preset_name: str | None, table: str = ""):
    """Preset, then the TOML file, then `--set`, then flags; every key checked.

    `table` (`dense` or `match`, in train_all) picks the keys of `[table]` in the file and `table.key`
    of `--set`; without it both are plain keys.
    """
    use_cpu_cores()
    check_set(args.set)
    config = preset(args.preset or preset_name or default_preset(), cls)
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
                raise UserError(
                    f"--set {item} names no module; write --set dense.{prefix}=… or --set match.{prefix}=…."
                )
            if prefix != table:
                continue
        config = with_changes(config, {key: parse_value(cls, key, value)})
    config = with_changes(config, args.common() | flags)
    return config.replace(checkpoint_dir=resolve(config.checkpoint_dir))


def tried(make, preset_name: str | None):
    """`make(preset)`; where none is named, of either that the devices may choose: UserError where neither will do."""
    if preset_name:
        return make(preset_name)
    try:
        return make("paper")
    except UserError:
        return make("cpu")


def named_roots(args: ConfigArgs, config: Config) -> str:
    """The folders of prints, for the first log line."""
    generated = not args.dataset_root and config.dataset_root == (SYNTHETIC,)
    return "synthetic (no --dataset_root given: prints are generated)" if generated else " ".join(config.dataset_root)


def start(args: ConfigArgs, preset_name: str | None, config: Config) -> None:
    """The first log line, and the compilation cache."""
    import jax

    devices = jax.devices()
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"{args.command.rpartition('.')[2]}: dataset_root {named_roots(args, config)}; preset {args.preset or preset_name or default_preset()}; "
        f"{len(devices)} × {devices[0].device_kind}{processes}",
        flush=True,
    )
    cli.use_compilation_cache(cache_dir() / "compiled")
