"""Module 2 as a task of the loop. Module 1 gives its first weights, and aligns its pairs."""

import functools
import logging
from dataclasses import asdict

import jax
import numpy as np
from etils import epath

from ifvit import checkpoint
from ifvit.config import DenseConfig, MatchConfig, Traced, completed, config_of, keys_with, with_changes
from ifvit.data.contents import known
from ifvit.data.gather import overlap
from ifvit.data.loader import PairSource, batches
from ifvit.data.pairs import MatchPairs, Pair, class_labels
from ifvit.data.prepare import PrintSet
from ifvit.data.protocols import draw, pairs_all, take
from ifvit.errors import CheckpointNotFound, UserError
from ifvit.fields import COMMON
from ifvit.load_module1_weights import BRANCHES, check_module1, load_module1_transformer_weights
from ifvit.models.networks import dense_network, match_network
from ifvit.scoring import rates
from ifvit.scoring.fusion import evidence, fit_fusion
from ifvit.scoring.scores import PairScore, match_scores, score_pairs
from ifvit.training.dense import VALIDATION_SEED, Program, steps_per_epoch, with_scale
from ifvit.training.state import init_state, learning_rates, optimizer
from ifvit.training.step import match_step
from ifvit.training.task import Task

log = logging.getLogger("ifvit")


@functools.lru_cache(maxsize=8)
def match_program(config: MatchConfig, aligner_config: DenseConfig | None, num_classes: int) -> Program:
    """The program of a configuration, and of the Module 1 that aligns its pairs (None: there is none).

    Both configurations must come from `Config.program()`.
    """
    net, aligner = match_network(config, num_classes), aligner_config and dense_network(aligner_config)

    def step(state, batch, rate, scalars, aligner_state):
        return match_step(net, aligner, Traced(config, scalars))(state, batch, rate, aligner_state)

    def scores(scalars):
        wide_window = aligner_config.wide_window if aligner_config else 1.0
        return match_scores(net, aligner, Traced(config, scalars), True, wide_window)

    def with_scalars(of):
        """A `PairScore` whose state has the scalars too, as `of` finds it among `match_scores`."""

        def prepare(params, batch_stats, aligner_state, scalars, prints):
            return of(scores(scalars)).prepare(params, batch_stats, aligner_state, prints)

        def score(params, batch_stats, aligner_state, scalars, batch):
            return of(scores(scalars)).score(params, batch_stats, aligner_state, batch)

        return PairScore(prepare, score)

    made, evaluate = scores({}), with_scalars(lambda how: how)
    if made.wide:
        evaluate = evaluate._replace(wide=with_scalars(lambda how: how.wide), cut=made.cut)
    evaluate = evaluate.jitted()
    return Program(net, lambda seed: init_state(net, optimizer(config, 0.0), seed), step, evaluate)


def match_task(config: MatchConfig, train: PrintSet, held_out: PrintSet) -> Task:
    """Trains on pairs of the prints in `train`; its checkpoints hold the Module 1 that aligns them."""
    classes = class_labels(train.prints)
    num_classes = config.num_classes or len(classes)
    if num_classes < len(classes):
        raise UserError(
            f"--num_classes is {num_classes}, and there are {len(classes)} fingers to train on; use "
            f"--num_classes {len(classes)} or leave it out."
        )
    module1 = checkpoint_of_module1(config)
    aligner_config = module1 and config_of(DenseConfig, module1.metadata["config"])
    if module1:
        warn_of_seen_fingers(config, module1, held_out)
    aligner_tree = module1 and {k: module1.state[k] for k in ("params", "batch_stats")}
    aligner_state = (aligner_tree["params"], aligner_tree["batch_stats"]) if module1 else ({}, {})

    program = match_program(config.program(), aligner_config and aligner_config.program(), num_classes)
    steps = steps_per_epoch(config, len(train))
    pairs = MatchPairs(train.prints, config.impostor_share, config.synthetic_share, config.seed)

    def seed_from_module1(params, stats):
        params = with_learned_scale(with_scale(params, config), module1)
        if not config.dense_reg_ckpt:
            print("⚠ Warning: No Module 1 checkpoint provided!", flush=True)
            return params, stats
        both = load_module1_transformer_weights(config.dense_reg_ckpt, with_both(params), config.share_global_local)
        params = with_one(both) if config.share_global_local else both
        if config.seed_resnet and module1:
            for branch in ("resnet_global", "resnet_local"):
                params[branch], stats[branch] = (
                    module1.state["params"]["resnet"],
                    module1.state["batch_stats"]["resnet"],
                )
        return params, stats

    def host_batches(first, last):
        source = PairSource(
            train,
            pairs,
            classes,
            config.batch_size,
            first,
            last,
            jax.process_index(),
            jax.process_count(),
            config.accumulate,
        )
        return batches(source, config.input_workers)

    scalars = config.scalars()

    def scores_of(state, chosen):
        return score_pairs(
            program.evaluate,
            (state.params, state.batch_stats, aligner_state, scalars),
            held_out,
            chosen,
            config.micro_batch,
            config.model_parallel,
        )

    newest: dict[str, dict] = {}  # the fusion that the last validation pairs give, for the checkpoint of their epoch

    def fusion_of(scores, chosen):
        genuine = np.array([p.genuine for p in chosen], bool)
        databases = np.array([held_out.prints[p.print0].database for p in chosen])
        paper = config.global_weight if config.fusion == "paper" else None
        return asdict(fit_fusion(scores, genuine, databases, paper))

    def validate(state, epoch):
        newest.clear()
        chosen = balanced_pairs(held_out, config.val_pairs)
        genuine = np.array([p.genuine for p in chosen], bool)
        if not 0 < genuine.sum() < len(chosen):
            return {}
        s = scores_of(state, chosen)
        newest["fusion"] = fusion_of(s, chosen)
        fused = evidence(s)
        return (
            {
                "eer": rates.equal_error_rate(fused[genuine], fused[~genuine]),
                "d_prime": rates.d_prime(fused[genuine], fused[~genuine]),
            }
            | {f"eer_{k}": rates.equal_error_rate(s[k][genuine], s[k][~genuine]) for k in s if k != "overlap"}
            | {
                f"{k}_{kind}": float(s[k][which].mean())
                for k in ("global", "local")
                for kind, which in (("genuine", genuine), ("impostor", ~genuine))
            }
        )

    def finish(state):
        chosen = balanced_pairs(held_out, config.calibration_pairs)
        genuine = np.array([p.genuine for p in chosen], bool)
        if genuine.all() or not genuine.any():
            log.warning(
                "The held-out fingers have no %s pairs: the score is not calibrated.",
                "genuine" if not genuine.any() else "impostor",
            )
            return {}
        return {"fusion": fusion_of(scores_of(state, chosen), chosen)}

    tied = config.share_global_local
    return Task(
        "matcher",
        config,
        steps,
        train.digest(),
        program.init,
        program.step,
        learning_rates(config, steps * config.num_epochs),
        (scalars, aligner_state),
        host_batches,
        validate,
        "eer",
        False,
        {
            "num_classes": num_classes,
            "aligner_config": module1 and module1.metadata["config"],
            "sample": train.sample(),
        },
        with_both if tied else lambda p: p,
        with_one if tied else lambda p: p,
        aligner_tree,
        finish,
        lambda state, finished: module1 and module1.template,
        lambda: dict(newest),
        seed_from_module1,
    )


def with_learned_scale(params: dict, module1: checkpoint.Checkpoint | None) -> dict:
    """The parameters; where both modules learn a scale of the cosine, it goes on from Module 1's."""
    theirs = module1 and module1.state["params"].get("log_scale")
    return params if theirs is None or "log_scale" not in params else params | {"log_scale": theirs}


def checkpoint_of_module1(config: MatchConfig) -> checkpoint.Checkpoint | None:
    """The checkpoint of Module 1 that `dense_reg_ckpt` names; UserError where Module 2 cannot use it.

    None where no checkpoint is named, or other code made it: then pairs are not aligned.
    """
    if not config.dense_reg_ckpt:
        return None
    folder = module1_folder(config)
    check_module1(config.dense_reg_ckpt)
    found = checkpoint.load(folder, "dense_reg", checkpoint.NETWORK)
    if found.metadata.get("foreign"):
        print(
            f"⚠ {folder} was made by other code: its transformer seeds Module 2, and pairs are not aligned.", flush=True
        )
        return None
    ours = config.to_dict()
    for k in keys_with(COMMON):
        if found.metadata["config"][k] != ours[k]:
            raise UserError(
                f"Module 1 in {folder} was trained with {k} = {found.metadata['config'][k]}, Module 2 is "
                f"configured with {ours[k]}; give both the same (--set {k}=…)."
            )
    return found


def warn_of_seen_fingers(config: MatchConfig, module1: checkpoint.Checkpoint, held_out: PrintSet) -> None:
    """Warns where Module 1 was trained on fingers that Module 2 holds out.

    It compares the folders' names, and the content of files that may have been copied to other folders.
    """
    theirs = completed(DenseConfig, module1.metadata["config"])
    seen = theirs["data_seed"] != config.data_seed or theirs["held_out"] < config.held_out
    if (seen and overlap(theirs["dataset_root"], config.dataset_root)) or known(
        module1.metadata.get("sample", ()), held_out.prints
    ):
        print(
            f"⚠ Module 1 in {module1.path} held out other fingers (held_out={theirs['held_out']}, "
            f"data_seed={theirs['data_seed']}): it was trained on some that validate Module 2; give both the same.",
            flush=True,
        )


def module1_folder(config: MatchConfig) -> epath.Path:
    """The folder of Module 1's checkpoint; UserError where there is none."""
    try:
        return checkpoint.locate(config.dense_reg_ckpt)
    except CheckpointNotFound:
        raise CheckpointNotFound(
            f"Module 1 checkpoint not found: {config.dense_reg_ckpt}; train Module 1 first (python -m "
            "ifvit.train_dense), or give its path with --pretrained_ckpt."
        ) from None


def like_module1(config: MatchConfig) -> MatchConfig:
    """The configuration with the settings that both modules share, taken from Module 1's checkpoint.

    It stays as it is where there is no Module 1, or where that is a pickle.
    """
    if not config.dense_reg_ckpt or checkpoint.is_pickle(folder := module1_folder(config)):
        return config
    theirs = checkpoint.read_metadata(folder)["config"]
    return with_changes(config, {k: theirs[k] for k in keys_with(COMMON) if k in theirs})


def balanced_pairs(prints: PrintSet, count: int) -> list[Pair]:
    """Up to `count` pairs of a set: genuine ones, at most half of them, then impostors of the same databases.

    The draw is fixed: every run and every epoch sees the same pairs.
    """
    rng = np.random.default_rng(VALIDATION_SEED)
    databases = pairs_all(prints.prints)
    genuine, impostor = [d.genuine for d in databases], [d.impostor for d in databases]
    chosen = draw(rng, sum(map(len, genuine)), count // 2)
    pairs = [Pair(i, j, True) for i, j in take(genuine, chosen).tolist()]
    chosen = draw(rng, sum(map(len, impostor)), count - len(pairs))
    return pairs + [Pair(i, j, False) for i, j in take(impostor, chosen).tolist()]


def with_both(params: dict) -> dict:
    """The parameters with the tied transformer under both names, as in checkpoints."""
    return {**params, BRANCHES[1]: params[BRANCHES[0]]}


def with_one(params: dict) -> dict:
    """The inverse of `with_both`."""
    return {k: v for k, v in params.items() if k != BRANCHES[1]}
