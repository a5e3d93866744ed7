"""The twelve mistakes of an earlier public attempt: each has a test that fails where it is made again.

Those of a subject stand with it, as `test_mistake_N_…`:

1. the LoFTR layer and its cross-attention  test_models
2. "4 layers" read as 2 + 2                 test_models; test_loftr: of more layers the first are taken and it is said
3. stride 16, truth divided by 8            test_augment; test_models: one cell for 8 by 8 px; and here
4. root of the dual softmax, no mutual check  test_matching
8. impostors, corruption, corners, labels   test_losses, test_augment, test_geometry; and here
9. thickness; aspect and ppi                test_augment; test_images: a period is scaled in both directions
10. person as identity                      test_pairs; test_sources: a person's fingers are ten identities
11. alignment                               test_geometry, test_alignment

Here: 3, 5, 6, 7, 8, 12, and settings that are misspelt or out of range.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cluster.host import Host
from ifvit import checkpoint, train_dense, train_match
from ifvit.config import (
    DENSE_CONFIG,
    MATCH_CONFIG,
    PRESETS,
    DenseConfig,
    MatchConfig,
    parse_value,
    preset,
    with_changes,
)
from ifvit.data.canvases import Files
from ifvit.data.prepare import PrintSet
from ifvit.data.sources import Print
from ifvit.devices.batch_axes import over_batch
from ifvit.errors import UserError
from ifvit.models import matcher
from ifvit.models.networks import Network, dense_network, match_network
from ifvit.models.resnet import ConvBN
from ifvit.pixels.views import plain_view, truth
from ifvit.scoring.known_warps import dense_eval
from ifvit.training.dense import steps_per_epoch, warp_metrics
from ifvit.training.loop import train
from ifvit.training.state import TrainState, learning_rate, learning_rates, optimizer
from ifvit.training.step import dense_step, match_step, train_step
from ifvit.training.task import Task

TINY = dict(
    {k: v for k, v in PRESETS["smoke"][0].items() if k != "template_size"},
    image_size=32,
    resnet_widths=(2, 2, 2),
    transformer_width=8,
    input_ppi=400.0,
    canvas_size=64,
    batch_size=2,
    partial=0.0,
)
DENSE = DenseConfig(**TINY)
MATCH = MatchConfig(
    **TINY, roi_size=16, embedding_size=4, embedding_grid=2, embedding_channels=2, min_matches=2, arcface_scale=4.0
)
CLASSES = 5


def quickly(f):
    """`f` compiled with little optimisation: these networks are small."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def drawn_state(net: Network, tx) -> TrainState:
    """A state with drawn parameters, batch statistics at their start (mean 0, variance 1)."""
    rng = np.random.default_rng(0)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(lambda p: rng.normal(0.1, 0.4, p.shape).astype(np.float32), params)
    stats = jax.tree_util.tree_map_with_path(lambda path, s: np.full(s.shape, path[-1].key == "var", np.float32), stats)
    return TrainState(params, stats, tx.init(params), jnp.int32(0))


def flat(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def batch():
    """A genuine and an impostor pair of ridges, classes of their fingers."""
    y, x = np.mgrid[:64, :64]
    prints = [(128 + 100 * np.sin(np.hypot(y + s, x - s) * 2 * np.pi / 9)).astype(np.uint8) for s in (0, 40, 90)]
    mask = np.ones((2, 8, 8), bool)
    return {
        "canvas0": np.stack([prints[0], prints[1]]),
        "canvas1": np.stack([prints[0], prints[2]]),
        "mask0": mask,
        "mask1": mask,
        "genuine": np.array([True, False]),
        "label0": np.array([0, 1], np.int32),
        "label1": np.array([0, 2], np.int32),
    }


@pytest.fixture(scope="module")
def dense_steps(batch):
    """A state, and (state, metrics) after the step numbered 0 and after that numbered 1, both from that state.

    Module 1's network is a table of confidences here, whatever it sees, and counts its training passes.
    """

    def table(params, stats, image0, image1, mask0, mask1, train):
        return jnp.broadcast_to(jax.nn.log_sigmoid(params["table"]), (2, 16, 16)), {"passes": stats["passes"] + train}

    schedule = learning_rate(DENSE.replace(warmup=0.0), 10)
    tx = optimizer(DENSE, 0.0)
    params = {"table": np.random.default_rng(2).normal(-4, 0.5, (16, 16)).astype(np.float32)}
    start = TrainState(params, {"passes": np.zeros(1)}, tx.init(params), jnp.int32(0))
    step = quickly(dense_step(Network(None, table), DENSE))
    impostors = batch | {"genuine": np.array([False, False])}
    return start, [
        jax.device_get(step(start._replace(step=jnp.int32(s)), b, schedule(s)))
        for s, b in ((0, batch), (1, batch), (0, impostors))
    ]


class OneLayer(nnx.Module):
    """Stands for ResNet-18 where the step is what is tested: a convolution of stride 8 and BatchNorm."""

    def __init__(self, widths, out_width, *, rngs, **how):
        self.layer = ConvBN(1, out_width, 8, 8, rngs=rngs)

    def __call__(self, x, train):
        return self.layer(x, train)


@pytest.fixture(scope="module")
def match_steps(batch):
    """Module 2's state before a step, and (state, metrics) after it; Module 1 is sure that nothing moved."""

    def sure(params, stats, image0, image1, mask0, mask1, train, method):
        assert not train
        return jnp.broadcast_to(jnp.where(jnp.eye(16, dtype=bool), -0.1, -9.0), (2, 16, 16)), stats

    schedule = learning_rate(MATCH.replace(warmup=0.0), 10)
    tx = optimizer(MATCH, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matcher, "ResNet18", OneLayer)
        net = match_network(MATCH, CLASSES)
        start = drawn_state(net, tx)
    step = quickly(match_step(net, Network(None, sure), MATCH))
    # The schedule's first rate is 0, so that the second step is the first that moves.
    once, _ = step(start, batch, schedule(0), ({}, {}))
    return jax.device_get(once), *jax.device_get(step(once, batch, schedule(1), ({}, {})))


# --- 3. stride ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 128])
def test_mistake_3_the_truth_has_a_label_for_each_cell_of_the_networks_grid(size):
    config = DENSE.replace(image_size=size)
    image, mask = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32), jax.ShapeDtypeStruct((1, size, size), bool)
    net = dense_network(config)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    log_conf, _ = jax.eval_shape(lambda *a: net.apply(*a, train=False), params, stats, image, image, mask, mask)
    cells = jax.ShapeDtypeStruct(((size // 8) ** 2,), bool)
    view = plain_view(config)
    labels = jax.eval_shape(lambda m0, m1: truth(view, view, m0, m1, config), cells, cells)
    assert log_conf.shape == (1, labels.shape[0], labels.shape[0])


# --- 5. BatchNorm ---------------------------------------------------------------------------------


def strided_convolution(images, kernel):
    """7 × 7, stride 2, as many outputs as half the inputs, zero outside ("SAME")."""
    size = images.shape[1]
    before = (2 * (size // 2 - 1) + 7 - size) // 2
    p = np.pad(images, ((0, 0), (before, 7 - before), (before, 7 - before), (0, 0)))
    rows = range(0, size, 2)
    return np.array(
        [
            [[np.tensordot(p[n, r : r + 7, c : c + 7], kernel, 3) for c in rows] for r in rows]
            for n in range(len(images))
        ]
    )


@pytest.fixture(scope="module")
def clean_and_corrupted():
    """Module 1, its state, and two prints unlike each other: the second brighter, and of more contrast."""
    rng = np.random.default_rng(1)
    net = dense_network(DENSE)
    image0, image1 = (rng.normal(m, s, (2, 16, 16, 1)).astype(np.float32) for m, s in ((0, 1), (2, 3)))
    mask = np.ones((2, 16, 16), bool)
    state = drawn_state(net, optax.identity())
    return net, state, (image0, image1, mask, mask)


def test_mistake_5_batchnorm_sees_the_clean_and_the_corrupted_print_as_one_batch(clean_and_corrupted):
    """The stem's running mean and variance move by 5 % towards those of both prints together."""
    net, state, inputs = clean_and_corrupted
    _, stats = quickly(lambda p, s, *i: net.apply(p, s, *i, train=True))(state.params, state.batch_stats, *inputs)
    both = strided_convolution(np.concatenate(inputs[:2]), state.params["resnet"]["stem"]["conv"]["kernel"])
    found = stats["resnet"]["stem"]["bn"]
    np.testing.assert_allclose(found["mean"], 0.05 * both.mean((0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(found["var"], 0.95 + 0.05 * both.var((0, 1, 2)), rtol=1e-3)
    apart = np.mean(
        [strided_convolution(i, state.params["resnet"]["stem"]["conv"]["kernel"]).var((0, 1, 2)) for i in inputs[:2]],
        axis=0,
    )
    assert not np.allclose(found["var"], 0.95 + 0.05 * apart, rtol=1e-2)


def test_mistake_5_evaluation_uses_the_running_statistics_and_leaves_them(clean_and_corrupted):
    net, state, inputs = clean_and_corrupted
    evaluate = quickly(lambda p, s, *i: net.apply(p, s, *i, train=False))
    out, stats = evaluate(state.params, state.batch_stats, *inputs)
    jax.tree.map(np.testing.assert_array_equal, stats, state.batch_stats)
    moved = jax.tree.map(lambda s: s + 0.5, state.batch_stats)
    assert np.abs(evaluate(state.params, moved, *inputs)[0] - out).max() > 1e-3
    other_mate = *(np.stack([i[0], 9 * i[1]]) for i in inputs[:2]), *inputs[2:]
    beside_another, _ = evaluate(state.params, state.batch_stats, *other_mate)
    np.testing.assert_allclose(beside_another[0], out[0], rtol=1e-4, atol=1e-5)


def test_mistake_5_a_training_step_keeps_the_running_statistics_in_the_state(dense_steps, match_steps):
    start, [(after, _), *_] = dense_steps
    assert start.batch_stats["passes"] == 0 and after.batch_stats["passes"] == 1
    before, after, _ = match_steps
    changed = {name for name, leaf in flat(after.batch_stats).items() if (leaf != flat(before.batch_stats)[name]).all()}
    assert len(changed) == 2 * 2 and changed == flat(before.batch_stats).keys()  # mean and variance, two branches


# --- 7. ArcFace -----------------------------------------------------------------------------------


def test_mistake_7_arcfaces_class_weights_are_parameters_with_optimiser_state_and_move_in_a_step(match_steps):
    before, after, metrics = match_steps
    for name in ("arcface_global", "arcface_local"):
        assert before.params[name].shape == (MATCH.embedding_size, CLASSES)
        moments = {k: v for k, v in flat(after.opt_state).items() if name in k}
        assert len(moments) == 2 and all(v.shape == (MATCH.embedding_size, CLASSES) for v in moments.values())
        assert all((v != 0).all() for v in moments.values())
        assert (after.params[name] != before.params[name]).all()
    assert np.isfinite(list(metrics.values())).all() and metrics["l_a"] > 0


def test_every_parameter_of_module_2_learns(match_steps):
    """Adam's first moment is zero only where no gradient ever came."""
    state = match_steps[1]
    moments = {k: v for k, v in flat(state.opt_state).items() if ".mu" in k}
    assert len(moments) == len(flat(state.params)) > 30
    assert [k for k, v in moments.items() if not v.any()] == []


def test_module_2s_step_aligns_by_module_1_and_learns_dense_matching(match_steps):
    assert match_steps[2]["aligned"] == 1 and match_steps[2]["l_d"] > 0


# --- 8. corruption --------------------------------------------------------------------------------


def test_mistake_8_the_same_prints_are_seen_otherwise_in_the_next_step(dense_steps):
    """Same parameters, same batch; only the step's number differs."""
    (_, first), (_, second), _ = dense_steps[1]
    assert first["loss"] != second["loss"] and first["grad_norm"] != second["grad_norm"]


def test_mistake_8_a_step_on_impostors_alone_learns(dense_steps):
    _, metrics = dense_steps[1][2]
    assert metrics["loss"] > 0 and metrics["grad_norm"] > 0 and metrics["accuracy"] == 0


# --- 6. the loop ----------------------------------------------------------------------------------


def test_mistake_6_an_epoch_has_the_steps_its_pairs_make():
    """The paper's 25,090 prints make 100,360 pairs: 784 batches of 128."""
    assert steps_per_epoch(DENSE_CONFIG, 25_090) == 784
    assert steps_per_epoch(DENSE_CONFIG.replace(pairs_per_epoch=1000), 25_090) == 7
    with pytest.raises(UserError, match="--batch_size 40"):
        steps_per_epoch(DENSE_CONFIG, 10)


def test_mistake_6_the_schedule_ends_with_the_run():
    """Linear to the peak, then a cosine to a hundredth of it at the very last step."""
    config = DENSE_CONFIG.replace(learning_rate=2e-3, warmup=0.05, final_lr=0.01)
    rate = learning_rate(config, 1000)
    assert rate(0) == 0 and rate(25) == pytest.approx(1e-3) and rate(50) == pytest.approx(2e-3)
    middle = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 475 / 950))
    assert rate(525) == pytest.approx(2e-3 * middle, rel=1e-4)
    assert rate(1000) == pytest.approx(2e-5, rel=1e-3)
    np.testing.assert_allclose(learning_rates(config, 1000), [rate(s) for s in range(1000)], rtol=1e-4, atol=1e-9)


STEPS = 2  # of an epoch of the small task


def small_task(folder, validated):
    """Three epochs of a line that follows its batches; `validated` notes the epochs of validation."""
    pairs = 2 * jax.device_count()
    config = DENSE.replace(checkpoint_dir=str(folder), num_epochs=3, save_every=1, seed=7, batch_size=pairs)
    tx = optimizer(config, 0.0)

    def create(seed):
        params = {"w": jnp.arange(6.0).reshape(2, 3)}
        return TrainState(params, {"mean": jnp.zeros(())}, tx.init(params), jnp.int32(0))

    def loss(params, batch_stats, batch, keys):
        mean = over_batch(batch["x"].sum()) / pairs
        share = batch["x"].size / pairs  # this device's of the global batch
        return share * ((params["w"] - mean) ** 2).mean(), ({"mean": 0.9 * batch_stats["mean"] + 0.1 * mean}, {})

    def read(first, last):
        return ({"x": np.full(pairs, s, np.float32), "genuine": np.ones(pairs, bool)} for s in range(first, last))

    def validate(state, epoch):
        validated.append((epoch, int(state.step)))
        return {"eer": 1 / epoch}

    return Task(
        "dense_reg",
        config,
        STEPS,
        "digest",
        create,
        train_step(loss, config),
        learning_rates(config, 3 * STEPS),
        (),
        read,
        validate,
        "eer",
        False,
        {},
    )


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder, validated = tmp_path_factory.mktemp("run"), []
    final = train(small_task(folder, validated), "auto", Host())
    return folder, final, validated


def test_mistake_6_validation_runs_after_every_epoch_and_chooses_the_best(small_run):
    folder, _, validated = small_run
    assert validated == [(1, 2), (2, 4), (3, 6)]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["eer"] for r in rows if r["split"] == "val"] == [1, 1 / 2, 1 / 3]
    assert [r["step"] for r in rows if r["split"] == "train"] == [2, 4, 6]
    assert checkpoint.load(folder / "dense_reg_best").metadata["best"] == {"value": 1 / 3, "epoch": 3, "metric": "eer"}


def test_mistake_6_a_checkpoint_holds_all_that_a_resume_reads_and_the_resumed_run_ends_to_the_bit(small_run, tmp_path):
    folder, final, _ = small_run
    validated = []
    resumed = train(small_task(tmp_path, validated), str(folder / "dense_reg_epoch_1"), Host())
    assert validated == [(2, 4), (3, 6)]
    unbroken, again = (checkpoint.leaves(checkpoint.load(path).state) for path in (final, resumed))
    assert unbroken.keys() == again.keys()
    assert {name.split("/")[0] for name in unbroken} == {"params", "batch_stats", "opt_state", "step"}
    assert {"mu", "nu", "count"} <= {part for name in unbroken for part in name.split("/")}
    for name in unbroken:
        np.testing.assert_array_equal(unbroken[name], again[name])
    assert unbroken["step"] == 6 and unbroken["batch_stats/mean"] > 0


def test_validation_counts_a_pair_once_where_the_last_batch_is_filled_up(tmp_path):
    """One pair less than two batches; impostors get confidence 1, of a genuine pair's 10 cells half are right."""
    np.save(tmp_path / "c.npy", np.zeros((4, 8, 8), np.uint8))
    np.save(tmp_path / "m.npy", np.ones((4, 1, 1), bool))
    prints = PrintSet(
        tuple(Print("", "A", str(i), "1", 500) for i in range(4)),
        tuple((0, row) for row in range(4)),
        (Files(str(tmp_path / "c.npy"), str(tmp_path / "m.npy")),),
    )
    seen, drawn = [], []

    def evaluate(batch, keys):
        seen.append(int(batch["counts"].sum()))
        drawn.extend(map(tuple, jax.random.key_data(keys).tolist()))
        impostor, genuine = batch["counts"] & ~batch["genuine"], batch["counts"] & batch["genuine"]
        return {"correct": 5 * genuine.sum(), "known": 10 * genuine.sum(), "impostor_confidence": impostor.sum()}

    size = 4 * jax.device_count()
    config = DENSE.replace(batch_size=size, val_pairs=2 * size - 1, impostor_share=0.9)
    assert warp_metrics(evaluate, (), prints, config) == {"accuracy": 0.5, "impostor_confidence": 1.0}
    assert seen == [size, size - 1]
    one = drawn[: 2 * size - 1]  # a view belongs to its pair, whatever the batch
    drawn.clear()
    warp_metrics(evaluate, (), prints, config.replace(batch_size=2 * size))
    assert drawn[: 2 * size - 1] == one and len(set(one)) == len(one)


def test_a_pair_that_fills_a_batch_up_has_no_part_in_the_metrics(batch):
    """Of a network that matches every cell to itself with confidence 1/2."""
    log_conf = np.log(np.broadcast_to(0.5 * np.eye(16) + 1e-9, (2, 16, 16)))
    half = Network(None, lambda params, stats, *inputs, train: (jnp.asarray(log_conf), stats))
    evaluate = quickly(dense_eval(half, DENSE.replace(partial=0.0)))
    keys = jax.random.split(jax.random.key(0), 2)
    both, first, second = (
        evaluate({}, {}, batch | {"counts": np.array(c)}, keys) for c in ([True, True], [True, False], [False, True])
    )
    assert 0 < first["known"] == both["known"] and first["impostor_confidence"] == 0
    assert 0 == second["known"] == second["correct"] and second["impostor_confidence"] == both["impostor_confidence"]
    assert both["impostor_confidence"] == pytest.approx(0.5)


# --- 12. empty data sets --------------------------------------------------------------------------


@pytest.mark.parametrize("files, message", [((), "empty"), (("readme.txt",), "no .*print"), (None, "no folder")])
@pytest.mark.parametrize("run, cls", [(train_dense.run, DenseConfig), (train_match.run, MatchConfig)])
def test_mistake_12_a_run_without_prints_is_an_error_and_saves_nothing(tmp_path, monkeypatch, run, cls, files, message):
    monkeypatch.setenv("IFVIT_CACHE", str(tmp_path / "cache"))
    root, out = tmp_path / "prints", tmp_path / "out"
    if files is not None:
        root.mkdir()
        for name in files:
            (root / name).write_text("")
    config = preset("smoke", cls).replace(dataset_root=(str(root),), checkpoint_dir=str(out))
    if cls is MatchConfig:
        config = config.replace(dense_reg_ckpt="")
    with pytest.raises(UserError, match=f"(?i){message}"):
        run(config, "auto", Host())
    assert not out.exists()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("learning_rte", "learning_rate"),
        ("batchsize", "batch_size"),
        ("num_epoch", "num_epochs"),
        ("rotations", "rotation"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key, nearest):
    for attempt in (
        lambda: DENSE_CONFIG[key],
        lambda: with_changes(DENSE_CONFIG, {key: 1}),
        lambda: parse_value(DenseConfig, key, "1"),
    ):
        with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
            attempt()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("learning_rate", 0.0, "more than 0"),
        ("learning_rate", math.nan, "out of range"),
        ("batch_size", 0, "at least 1"),
        ("rotation", 181.0, "at most 180"),
        ("impostor_share", -0.1, "at least 0"),
        ("batch_size", 2.5, "type int"),
        ("batch_size", True, "type int"),
        ("grad_clip", math.inf, "out of range"),
        ("transformer", "swin", "loftr, siamese"),
        ("image_size", 100, "use 104"),
        ("canvas_size", 130, "use 136"),
        ("resnet_widths", (64, 128), "3 to 5"),
        ("resnet_widths", (64, 128, 2.5), "list of int"),
        ("transformer_heads", 7, "not a multiple of transformer_heads"),
        ("transformer_width", 6, "multiple"),
        ("dataset_root", (), "at least one"),
        ("temp_bug_fix", 1, "type bool"),
    ],
)
def test_a_value_out_of_range_or_of_another_type_is_refused_with_its_range(key, value, message):
    with pytest.raises(UserError, match=message) as e:
        DENSE_CONFIG.replace(**{key: value})
    assert key in str(e.value)


def test_a_region_of_interest_larger_than_the_window_is_refused():
    with pytest.raises(UserError, match="roi_size is 200"):
        MATCH_CONFIG.replace(roi_size=200)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("resnet_widths", "16,32,64", (16, 32, 64)),
        ("learning_rate", "1e-3", 1e-3),
        ("temp_bug_fix", "false", False),
        ("dataset_root", "a,b", ("a", "b")),
        ("batch_size", "8", 8),
        ("loftr_ckpt", "x.ckpt", "x.ckpt"),
    ],
)
def test_text_becomes_the_fields_type(key, text, value):
    assert parse_value(DenseConfig, key, text) == value


@pytest.mark.parametrize("key, text", [("batch_size", "8.5"), ("learning_rate", "fast"), ("temp_bug_fix", "maybe")])
def test_text_of_another_type_is_refused(key, text):
    with pytest.raises(UserError, match=f"--set {key}={text}"):
        parse_value(DenseConfig, key, text)


def test_configurations_read_by_key_and_hold_the_papers_values():
    assert DENSE_CONFIG["checkpoint_dir"] == "./checkpoints/dense_reg"
    assert MATCH_CONFIG["dense_reg_ckpt"] == "./checkpoints/dense_reg/dense_reg_ckpt.pkl"
    paper = {
        "batch_size": 128,
        "learning_rate": 1e-3,
        "weight_decay": 2e-4,
        "num_epochs": 100,
        "rotation": 60,
        "transformer_layers": 4,
        "transformer_heads": 8,
        "transformer_width": 256,
        "image_size": 128,
        "match_threshold": 0.2,
        "impostor_share": 0.25,
    }
    assert {k: DENSE_CONFIG[k] for k in paper} == paper
    paper = {
        "learning_rate": 1e-4,
        "num_epochs": 70,
        "loss_dense": 0.5,
        "loss_embedding": 0.1,
        "loss_arcface": 1.0,
        "embedding_margin": 0.4,
        "arcface_margin": 0.4,
        "arcface_scale": 64,
        "roi_size": 90,
        "global_weight": 0.6,
        "embedding_size": 256,
    }
    assert {k: MATCH_CONFIG[k] for k in paper} == paper


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("cls", [DenseConfig, MatchConfig])
def test_every_preset_is_within_its_ranges_and_no_ridge_of_cpu_is_finer_than_5_px(name, cls):
    config = preset(name, cls)
    assert config.to_dict().keys() == DenseConfig().to_dict().keys() or cls is MatchConfig
    if name == "cpu":
        assert config.input_ppi / 500 * 9 >= 5
    with pytest.raises(UserError, match="choose from paper"):
        preset(name + "x", cls)
