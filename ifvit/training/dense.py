"""Module 1 as a task of the loop."""

import functools
import hashlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ifvit import checkpoint, loftr
from ifvit.config import AUTO, Config, DenseConfig, Traced, completed, keys_with
from ifvit.data.gather import overlap
from ifvit.data.impressions import Impressions
from ifvit.data.loader import PairSource, batches, fixed_batches
from ifvit.data.pairs import DensePairs
from ifvit.data.prepare import PrintSet
from ifvit.devices.sharding import fetch, make_mesh, put_whole_batch
from ifvit.errors import UserError
from ifvit.fields import COMMON
from ifvit.models.networks import Network, dense_network
from ifvit.paths import resolve
from ifvit.scoring.known_warps import dense_eval
from ifvit.scoring.scores import PairScore
from ifvit.scoring.template import description
from ifvit.scoring.template_fit import fit_template
from ifvit.training.state import init_state, learning_rates, optimizer
from ifvit.training.step import dense_step
from ifvit.training.task import Task
from ifvit.training.teacher import taught

log = logging.getLogger("ifvit")

VALIDATION_SEED = 2**31 - 1  # the same validation views in every run


class Program(NamedTuple):
    """The pure functions that are compiled for a configuration.

    Configurations that differ only in scalars get the same objects, and so the same compiled programs.
    """

    net: Network
    init: Callable  # (seed) -> state
    step: Callable  # as of `training.step.train_step`, with (learning rate, scalars) before the constants
    evaluate: Callable | PairScore  # jitted; the scalars come after the state
    describe: Callable | None = None  # jitted, of Module 1: `scoring.template.description`


@functools.lru_cache(maxsize=8)
def dense_program(config: DenseConfig) -> Program:
    """The program of a configuration, which must come from `Config.program()`."""
    net = dense_network(config)

    def step(state, batch, rate, scalars):
        return dense_step(net, Traced(config, scalars))(state, batch, rate)

    def evaluate(params, batch_stats, scalars, batch, keys):
        return dense_eval(net, Traced(config, scalars))(params, batch_stats, batch, keys)

    def describe(params, batch_stats, scalars, prints, degrees):
        return description(net, Traced(config, scalars))(params, batch_stats, prints, degrees)

    return Program(
        net, lambda seed: init_state(net, optimizer(config, 0.0), seed), step, jax.jit(evaluate), jax.jit(describe)
    )


def dense_task(config: DenseConfig, train: PrintSet, held_out: PrintSet, validation: DenseConfig | None = None) -> Task:
    """Trains on known warps of the prints in `train`, validates on those in `held_out`.

    `validation`: a configuration from which the validation views take their corruption [`config`]. So trials of a
    search for the corruption itself are compared on the same views.
    """
    check_outside(config)
    program = dense_program(config.program())
    steps = steps_per_epoch(config, len(train))
    impressions = mapped_impressions(config, train)
    pairs = DensePairs(
        train.prints,
        config.impostor_share,
        config.synthetic_share,
        config.seed,
        config.impression_share,
        impressions,
    )
    seen = validation or config

    def host_batches(first, last):
        source = PairSource(
            train,
            pairs,
            {},
            config.batch_size,
            first,
            last,
            jax.process_index(),
            jax.process_count(),
            config.accumulate,
            impressions,
        )
        return batches(source, config.input_workers)

    def validate(state, epoch):
        return warp_metrics(
            program.evaluate,
            (state.params, state.batch_stats, seen.scalars()),
            held_out,
            config.replace(impostor_share=seen.impostor_share, val_pairs=seen.val_pairs),
        )

    def template(state, finished):
        if not finished:
            return None
        return fit_template(program.describe, (state.params, state.batch_stats, config.scalars()), train, config)

    return Task(
        "dense_reg",
        config,
        steps,
        data_digest(train, impressions),
        program.init,
        program.step,
        learning_rates(config, steps * config.num_epochs),
        (config.scalars(),),
        host_batches,
        validate,
        "accuracy",
        True,
        {"sample": train.sample()},
        template=template,
        seed_from=lambda params, stats: with_init(with_loftr(with_scale(params, config), config), stats, config),
    )


def check_outside(config: DenseConfig) -> None:
    """UserError where the run's folder holds what the run learns from: a new run, or a resume, would not find it."""
    for key in ("init", "teacher"):
        if config[key] not in ("", AUTO, checkpoint.PRETRAINED) and overlap((config.checkpoint_dir,), (config[key],)):
            raise UserError(
                f"{key} names {config[key]}, which lies in the run's own folder {config.checkpoint_dir}; give the run "
                "another folder (--checkpoint_dir)."
            )


def steps_per_epoch(config: Config, prints: int) -> int:
    """The number of whole batches in an epoch. The schedule, the loop and the log all count by it."""
    wanted = config.pairs_per_epoch or 4 * prints
    if wanted < config.batch_size:
        raise UserError(
            f"An epoch has {wanted} pairs and a batch {config.batch_size}; use --batch_size {wanted} or "
            f"--set pairs_per_epoch={config.batch_size}."
        )
    return wanted // config.batch_size


def mapped_impressions(config: DenseConfig, train: PrintSet) -> Impressions | None:
    """What is known of two impressions of a finger, where pairs are made of such.

    Where that is nothing the log says so, and pairs show one print twice; with a teacher it is a UserError.
    """
    if not config.impression_share:
        if config.teacher:
            raise UserError(
                "teacher names a checkpoint, and no pair would be made by it: impression_share is 0. Give it a share "
                "(--set impression_share=0.5), or leave the teacher out."
            )
        return None
    found = Impressions(train.prints, config.canvas_size, taught(config, train) if config.teacher else None)
    if found.known:
        return found
    nothing = (
        f"impression_share is {config.impression_share:g}, and of no finger are there two impressions of which is "
        "known what skin lies where"
    )
    if config.teacher:
        raise UserError(f"{nothing}: the teacher registers none; give another, or leave teacher out.")
    log.warning(
        "%s: all genuine pairs show one print twice, and much is lost by it. It is known of generated prints (--set "
        "synthetic_share=0.5, two impressions at least), and of those that a teacher registers (--set "
        "teacher=pretrained).",
        nothing,
    )
    return None


def data_digest(train: PrintSet, impressions: Impressions | None) -> str:
    """Of the prints, and of what a teacher tells of them."""
    if not (impressions and impressions.taught):
        return train.digest()
    return f"{train.digest()} {hashlib.sha256(b''.join(x.tobytes() for x in impressions.taught)).hexdigest()[:16]}"


def with_scale(params: dict, config: Config) -> dict:
    """The parameters; where they have a learned scale, it starts from `cosine_scale`."""
    return params | {"log_scale": np.log(np.float32(config.cosine_scale))} if "log_scale" in params else params


def with_loftr(params: dict, config: DenseConfig) -> dict:
    """The parameters; where `loftr_ckpt` names LoFTR's published weights, with their coarse transformer."""
    if not config.loftr_ckpt:
        return params
    name = f"{config.transformer}_transformer"
    path = resolve(config.loftr_ckpt)
    loaded = loftr.load_loftr(path, params[name])
    if config.temp_bug_fix:
        print(
            "⚠ The weights that LoFTR's authors published (outdoor_ds.ckpt) know another position encoding: they want "
            "--set temp_bug_fix=false."
        )
    print(f"LoFTR's transformer loaded from {path}: {sum(x.size for x in jax.tree.leaves(loaded)):,} parameters")
    return {**params, name: loaded}


def with_init(params: dict, stats: dict, config: DenseConfig) -> tuple[dict, dict]:
    """Parameters and BatchNorm's statistics; where `init` names a trained Module 1, its own, all of them.

    UserError where its network is another one: what of the configurations differs is named, else the first array.
    With AUTO the parameters are those of before then, as where no weights came with the package, which is said.
    """
    auto = config.init == AUTO
    if not config.init or (auto and config.loftr_ckpt):
        return params, stats
    if auto and not checkpoint.packaged().is_file():
        print("Module 1 starts from nothing, since no weights came with the package", flush=True)
        return params, stats
    found = checkpoint.load(checkpoint.PRETRAINED if auto else config.init, "dense_reg", checkpoint.NETWORK)
    checkpoint.check_ours(found.path, found.metadata)
    theirs, ours = completed(DenseConfig, found.metadata["config"]), config.to_dict()
    want, have = (
        {n: checkpoint.kind(x.dtype, x.shape) for n, x in checkpoint.leaves(tree).items()}
        for tree in ({"params": params, "batch_stats": stats}, {k: found.state[k] for k in ("params", "batch_stats")})
    )
    wrong = [f"{k} is {theirs[k]} there and {ours[k]} here" for k in keys_with(COMMON) if theirs[k] != ours[k]]
    wrong += [
        f"{n} is {have.get(n, 'missing')} there and {want.get(n, 'missing')} here"
        for n in sorted(want.keys() | have.keys())
        if want.get(n) != have.get(n)
    ][: not wrong]
    if wrong and auto:
        print(f"Module 1 starts from nothing, since the package's is another network: {'; '.join(wrong)}", flush=True)
        return params, stats
    if wrong:
        raise UserError(
            f"The Module 1 in {found.path}, which init names, is another network than this run's: {'; '.join(wrong)}. "
            "Give the same settings, or leave init out."
        )
    print(f"Module 1 starts from {found.path}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters", flush=True)
    return found.state["params"], found.state["batch_stats"]


def warp_metrics(
    evaluate: Callable, state: tuple, prints: PrintSet, config: Config, count: int | None = None
) -> dict[str, float]:
    """Known-warp accuracy over fixed views of `prints`, and the mean confidence that impostor pairs get.

    The views are the same whatever the batch size. Accuracy is the share of the cells with a known match that are
    matched within one cell (8 px).
    """
    pairs = DensePairs(prints.prints, config.impostor_share, 0.0, VALIDATION_SEED)
    wanted = [pairs[n] for n in range(config.val_pairs if count is None else count)]
    if not wanted:
        return {}
    mesh = make_mesh(config.micro_batch, config.model_parallel)
    totals: dict[str, float] = {}
    keys_of = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(VALIDATION_SEED)))
    for i, (batch, real) in enumerate(fixed_batches(prints, wanted, config.micro_batch)):
        batch["counts"] = np.arange(config.micro_batch) < real
        keys = keys_of(i * config.micro_batch + np.arange(config.micro_batch, dtype=np.uint32))
        for k, v in fetch(evaluate(*state, put_whole_batch(batch, mesh), keys)).items():
            totals[k] = totals.get(k, 0.0) + float(v)
    impostors = max(1, sum(not p.genuine for p in wanted))
    return {
        "accuracy": totals["correct"] / max(totals["known"], 1),
        "impostor_confidence": totals["impostor_confidence"] / impostors,
    }
