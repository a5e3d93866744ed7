"""The networks against LoFTR's and He's definitions, written out in plain numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from ifvit.config import DenseConfig, MatchConfig
from ifvit.constants import STRIDE
from ifvit.models import transformer
from ifvit.models.cells import cell_mask
from ifvit.models.dense_reg import DenseRegistration
from ifvit.models.matcher import Aligned, EmbeddingHead, Matcher
from ifvit.models.resnet import ConvBN, ResNet18
from ifvit.models.transformer import EncoderLayer, Transformer, position_encoding

linear_attention, softmax_attention = jax.jit(transformer.linear_attention), jax.jit(transformer.softmax_attention)
TINY = dict(resnet_widths=(2, 3, 4), transformer_width=8, transformer_heads=2, transformer_layers=1, image_size=16)


# --- references -----------------------------------------------------------------------------------


def attention_by_definition(q, k, v, q_mask, kv_mask):
    """Katharopoulos et al. 2020, eq. 5 with φ = elu + 1, query by query and key by key: O(L · S)."""

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    out = np.zeros(q.shape[:3] + v.shape[3:])
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        for i in np.flatnonzero(q_mask[b]):
            weights = [phi(q[b, i, h]) @ phi(k[b, j, h]) * kv_mask[b, j] for j in range(k.shape[1])]
            out[b, i, h] = sum(w * v[b, j, h] for j, w in enumerate(weights)) / (sum(weights) + 1e-6)
    return out


def softmax_by_definition(q, k, v, q_mask, kv_mask):
    out = np.zeros(q.shape[:3] + v.shape[3:])
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        for i in np.flatnonzero(q_mask[b]):
            weights = np.exp(k[b, :, h] @ q[b, i, h] / math.sqrt(q.shape[3])) * kv_mask[b]
            out[b, i, h] = weights @ v[b, :, h] / weights.sum()
    return out


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


def loftr_layer(p, heads, x, source, x_mask, source_mask, attention=attention_by_definition):
    """LoFTREncoderLayer: x + norm2(mlp([x, norm1(merge(attention))])); p maps our names to arrays."""

    def split(y):
        return y.reshape(*y.shape[:2], heads, -1)

    message = attention(
        split(x @ p["q_proj/kernel"]),
        split(source @ p["k_proj/kernel"]),
        split(source @ p["v_proj/kernel"]),
        x_mask,
        source_mask,
    ).reshape(x.shape)
    message = layer_norm(message @ p["merge/kernel"], p["norm1/scale"], p["norm1/bias"])
    hidden = np.maximum(np.concatenate([x, message], -1) @ p["mlp_0/kernel"], 0)
    return x + layer_norm(hidden @ p["mlp_2/kernel"], p["norm2/scale"], p["norm2/bias"])


# --- fixtures -------------------------------------------------------------------------------------


def arrays(module) -> dict[str, np.ndarray]:
    pure = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return {k: np.asarray(v, np.float64) for k, v in flatten_dict(pure, sep="/").items()}


def shapes(make) -> dict[str, tuple]:
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
    return {k: v.shape for k, v in flatten_dict(state, sep="/").items()}


def filled(make, seed=0):
    """The module with drawn parameters: norms are away from scale 1 and bias 0, so one in the wrong place shows."""
    rng = np.random.default_rng(seed)
    graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params = jax.tree.map(lambda p: rng.normal(0.1, 0.4, p.shape).astype(np.float32), params)
    rest = jax.tree.map(lambda p: np.ones(p.shape, np.float32), rest)
    return nnx.merge(graph, params, rest)


def forward(module, *inputs, **options):
    return nnx.jit(lambda m, *a: m(*a, **options))(module, *inputs)


@pytest.fixture(scope="module")
def two_prints():
    """Features of two images of 6 and 9 cells, width 8, and masks that hide some of each."""
    rng = np.random.default_rng(1)
    f0, f1 = (rng.normal(0.5, 2, (2, n, 8)).astype(np.float32) for n in (6, 9))  # of mean ≠ 0, deviation ≠ 1
    m0, m1 = np.ones((2, 6), bool), np.ones((2, 9), bool)
    m0[0, 4:], m1[1, :3] = False, False
    return f0, f1, m0, m1


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention, definition", [(linear_attention, attention_by_definition), (softmax_attention, softmax_by_definition)]
)
def test_attention_equals_its_definition_query_by_query(attention, definition):
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(2, n, 2, 3)).astype(np.float32) for n in (4, 5, 5))
    q_mask, kv_mask = rng.random((2, 4)) < 0.7, rng.random((2, 5)) < 0.6
    assert not q_mask.all() and not kv_mask.all() and kv_mask.any(1).all()
    np.testing.assert_allclose(attention(q, k, v, q_mask, kv_mask), definition(q, k, v, q_mask, kv_mask), atol=1e-5)


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_a_masked_key_is_as_if_it_were_not_there(attention):
    rng = np.random.default_rng(3)
    q, k, v = (rng.normal(size=(1, n, 1, 4)).astype(np.float32) for n in (3, 6, 6))
    v[:, 4:] = 1e3
    kv_mask, q_mask = np.array([[True] * 4 + [False] * 2]), np.ones((1, 3), bool)
    masked = attention(q, k, v, q_mask, kv_mask)
    np.testing.assert_allclose(masked, attention(q, k[:, :4], v[:, :4], q_mask, kv_mask[:, :4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_with_every_key_masked_the_message_is_zero_and_finite(attention):
    q = jnp.ones((1, 2, 1, 4))
    out = attention(q, q, q, jnp.ones((1, 2), bool), jnp.zeros((1, 2), bool))
    np.testing.assert_array_equal(out, 0)


# --- LoFTR's transformer --------------------------------------------------------------------------


@pytest.mark.parametrize("kind, attention", [("loftr", attention_by_definition), ("siamese", softmax_by_definition)])
def test_mistake_1_the_encoder_layer_is_loftrs_layer(two_prints, kind, attention):
    layer = filled(lambda: EncoderLayer(8, 2, kind, rngs=nnx.Rngs(0)))
    expected = loftr_layer(arrays(layer), 2, *two_prints, attention)
    np.testing.assert_allclose(forward(layer, *two_prints), expected, atol=2e-4)


def test_mistake_1_self_and_cross_alternate_and_image_1_attends_to_the_updated_image_0(two_prints):
    f0, f1, m0, m1 = two_prints
    model = filled(lambda: Transformer(8, 2, 2, "loftr", rngs=nnx.Rngs(0)))
    p = arrays(model)
    layers = [{k.removeprefix(f"layer_{i}/"): v for k, v in p.items() if k.startswith(f"layer_{i}/")} for i in range(4)]
    x0, x1 = np.float64(f0), np.float64(f1)
    for i, layer in enumerate(layers):
        if i % 2 == 0:  # one layer serves both images
            x0, x1 = loftr_layer(layer, 2, x0, x0, m0, m0), loftr_layer(layer, 2, x1, x1, m1, m1)
        else:  # sequential
            x0 = loftr_layer(layer, 2, x0, x1, m0, m1)
            x1 = loftr_layer(layer, 2, x1, x0, m1, m0)
    out0, out1 = forward(model, f0, f1, m0, m1)
    np.testing.assert_allclose(out0, x0, atol=1e-3)
    np.testing.assert_allclose(out1, x1, atol=1e-3)


def test_mistake_2_four_layers_are_eight_encoder_layers_of_loftrs_80_arrays_and_5251072_parameters():
    tree = shapes(lambda: Transformer(256, 8, 4, "loftr", rngs=nnx.Rngs(0)))
    ours = {
        "q_proj/kernel": (256, 256),
        "k_proj/kernel": (256, 256),
        "v_proj/kernel": (256, 256),
        "merge/kernel": (256, 256),
        "mlp_0/kernel": (512, 512),
        "mlp_2/kernel": (512, 256),
        "norm1/scale": (256,),
        "norm1/bias": (256,),
        "norm2/scale": (256,),
        "norm2/bias": (256,),
    }
    assert tree == {f"layer_{i}/{name}": shape for i in range(8) for name, shape in ours.items()}
    assert len(tree) == 80
    assert sum(math.prod(s) for s in tree.values()) == 5_251_072


# --- position encoding ----------------------------------------------------------------------------


@pytest.mark.parametrize("temp_bug_fix", [True, False])
def test_the_position_encoding_counts_from_one_and_interleaves_sines_and_cosines(temp_bug_fix):
    channels, pe = 16, np.asarray(position_encoding(3, 5, 16, temp_bug_fix))
    expected = np.zeros((3, 5, channels))
    for row, col, k in np.ndindex(3, 5, channels // 4):
        exponent = 2 * k * (math.log(10000) / (channels / 2) if temp_bug_fix else 1)
        x, y = (col + 1) * math.exp(-exponent), (row + 1) * math.exp(-exponent)
        expected[row, col, 4 * k : 4 * k + 4] = math.sin(x), math.cos(x), math.sin(y), math.cos(y)
    np.testing.assert_allclose(pe, expected, atol=1e-6)


def test_the_published_weights_precedence_bug_is_reproduced():
    """`-math.log(10000.0) / d_model // 2` of LoFTR at d = 256 floors to −1."""
    assert -math.log(10000.0) / 256 // 2 == -1
    pe = np.asarray(position_encoding(1, 1, 256, temp_bug_fix=False))[0, 0, 0::4]
    div = np.exp(np.arange(0, 128, 2) * (-math.log(10000.0) / 256 // 2))
    np.testing.assert_allclose(pe, np.sin(div), atol=1e-6)


# --- ResNet-18 ------------------------------------------------------------------------------------


def test_the_resnet_has_resnet_18s_parameters():
    """torchvision's resnet18 has 11,689,512; less its classifier, less two input channels, plus our projection."""
    tree = shapes(lambda: ResNet18((64, 128, 256, 512), 256, rngs=nnx.Rngs(0)))
    expected = 11_689_512 - (512 * 1000 + 1000) - 2 * 64 * 7 * 7 + 512 * 256
    assert sum(math.prod(s) for s in tree.values()) == expected


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_the_feature_map_has_one_cell_for_8_by_8_px_whatever_the_stages(widths):
    out = nnx.eval_shape(lambda: ResNet18(widths, 12, rngs=nnx.Rngs(0))(jnp.zeros((2, 64, 48, 1)), False))
    assert STRIDE == 8 and out.shape == (2, 8, 6, 12)


# --- Module 1 -------------------------------------------------------------------------------------


def test_running_statistics_are_float32_whatever_is_computed_in():
    """bfloat16 has 8 bits: a mean of 10.03 would be 10."""
    layer = ConvBN(1, 1, 1, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.conv.kernel[...] = jnp.ones((1, 1, 1, 1))
    layer.bn.mean[...], layer.bn.var[...] = jnp.array([10.03]), jnp.array([0.01])
    out = layer(jnp.full((1, 2, 2, 1), 10.0), train=False)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), -0.03 / math.sqrt(0.01 + 1e-5), rtol=0.01)


def test_a_cell_is_foreground_when_half_of_its_pixels_are():
    mask = np.zeros((1, 16, 24), bool)
    mask[0, :4, :8] = True  # 32 of cell 0's 64 px
    mask[0, :4, 8:16] = True
    mask[0, 0, 8] = False  # 31 of cell 1's
    mask[0, 8:, 16:] = True
    np.testing.assert_array_equal(cell_mask(jnp.asarray(mask)), [[True, False, False, False, False, True]])


def test_confidences_have_image_0_in_rows_and_vanish_outside_the_masks():
    config = DenseConfig(**TINY, similarity="cosine")
    model = filled(lambda: DenseRegistration(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(4)
    image0, image1 = rng.normal(size=(2, 2, 16, 16, 1)).astype(np.float32)
    mask0, mask1 = np.zeros((2, 2, 16, 16), bool)
    mask0[:, :8, 8:], mask0[1, 8:, :8] = True, True  # cell 1 of both pairs, cell 2 of the second
    mask1[:, :8], mask1[0, 8:] = True, True  # all of the first, cells 0 and 1 of the second
    run = jax.jit(lambda *a: jnp.exp(model(*a, train=False)))
    conf = np.asarray(run(image0, image1, mask0, mask1))
    assert conf.shape == (2, 4, 4)
    rows, columns = np.array([[0, 1, 0, 0], [0, 1, 1, 0]], bool), np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(conf > 0, rows[:, :, None] & columns[:, None, :])
    # where there is one row alone every column's softmax is 1, and the row's own sums to 1
    assert conf[0, 1].sum() == pytest.approx(1, abs=1e-5)
    # pairs do not mix
    np.testing.assert_allclose(run(image0[::-1], image1[::-1], mask0[::-1], mask1[::-1]), conf[::-1], atol=1e-5)


@pytest.mark.parametrize("kind", ["loftr", "siamese"])
def test_module_1s_transformer_bears_the_name_of_its_kind(kind):
    tree = shapes(lambda: DenseRegistration(DenseConfig(**TINY, transformer=kind), rngs=nnx.Rngs(0)))
    assert {k.split("/")[0] for k in tree} == {"resnet", f"{kind}_transformer"}


# --- Module 2 -------------------------------------------------------------------------------------

MATCH = MatchConfig(**TINY | {"image_size": 32}, roi_size=20, embedding_size=6, embedding_grid=2, embedding_channels=3)


def test_a_tied_transformer_is_one_and_an_untied_one_is_two():
    both = {"loftr_transformer_global", "loftr_transformer_local"}
    for share, count in ((True, 1), (False, 2)):
        config = MATCH.replace(share_global_local=share)
        tree = shapes(lambda: Matcher(config, 5, rngs=nnx.Rngs(0)))
        assert len({k.split("/")[0] for k in tree} & both) == count


def test_a_local_window_need_not_be_a_multiple_of_the_stride():
    pair = Aligned(
        *np.zeros((2, 2, 32, 32, 1), np.float32),
        np.ones((2, 32, 32), bool),
        *np.zeros((2, 2, 20, 20, 1), np.float32),
        np.ones((2, 20, 20), bool),
    )
    e = nnx.eval_shape(lambda: Matcher(MATCH, 5, rngs=nnx.Rngs(0))(pair, train=False))
    assert [v.shape for v in e] == [(2, 6)] * 4 + [(2, 16, 16), (2, 16)]


def test_an_embedding_is_a_unit_vector_of_where_the_features_lie_and_not_of_the_background():
    rng = np.random.default_rng(6)
    head = filled(lambda: EmbeddingHead(MATCH, rngs=nnx.Rngs(0)))
    f = rng.normal(size=(1, 16, 8)).astype(np.float32)
    mask = np.ones((1, 16), bool)
    mask[0, 12:] = False
    mirrored = f.reshape(1, 4, 4, 8)[:, :, ::-1].reshape(1, 16, 8)
    other_background = np.where(mask[..., None], f, 9).astype(np.float32)
    run = jax.jit(lambda f, mask: head(f, mask))
    e = np.asarray(run(f, mask))
    assert e.shape == (1, 6) and np.linalg.norm(e) == pytest.approx(1, abs=1e-4)
    assert abs(e - run(mirrored, mask)).max() > 0.01
    np.testing.assert_array_equal(e, run(other_background, mask))


@pytest.mark.run
def test_prints_without_a_cell_in_common_are_not_alike_and_their_gradients_are_finite():
    """Not the head's bias in place of both."""
    head = EmbeddingHead(MATCH, rngs=nnx.Rngs(0))
    f = jnp.asarray(np.random.default_rng(6).normal(size=(2, 16, 8)), jnp.float32)
    mask = jnp.stack([jnp.zeros(16, bool), jnp.ones(16, bool)])
    gradients = nnx.grad(lambda head: head(f, mask).sum())(head)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(nnx.state(gradients)))
    head.embed.bias[...] = 0.3
    np.testing.assert_array_equal(head(f, mask)[0], 0)
    assert np.linalg.norm(head(f, mask)[1]) == pytest.approx(1, abs=1e-4)


def test_the_mask_that_both_prints_of_a_pair_share_does_not_show_in_the_embedding():
    """Features that are alike everywhere say nothing: whatever part of them is seen, the embedding is the same."""
    masked = filled(lambda: EmbeddingHead(MATCH.replace(masked_pooling=True), rngs=nnx.Rngs(0)))
    before = filled(lambda: EmbeddingHead(MATCH, rngs=nnx.Rngs(0)))
    f = np.broadcast_to(np.linspace(0.5, 2, 8, dtype=np.float32), (3, 16, 8))
    masks = np.ones((3, 4, 4), bool)
    masks[1, :, 3], masks[2, :2, :] = False, False  # a part of two bins; two bins
    whole, *parts = np.asarray(forward(masked, f, masks.reshape(3, 16)))
    np.testing.assert_allclose(parts, [whole, whole], atol=1e-5)
    whole, *parts = np.asarray(forward(before, f, masks.reshape(3, 16)))
    assert min(abs(part - whole).max() for part in parts) > 0.01  # zeros outside the mask counted


@pytest.mark.run
def test_a_bin_is_the_mean_of_its_foreground_by_hand():
    """4 × 4 cells into one bin: cells of 2, 4 and 6 are seen, all of like weight in the middle of the grid."""
    head = EmbeddingHead(MATCH.replace(masked_pooling=True, embedding_grid=1), rngs=nnx.Rngs(0))
    head.reduce.kernel[...] = jnp.eye(8, 3)
    head.embed.kernel[...], head.embed.bias[...] = jnp.eye(3, 6), jnp.arange(6.0) == 3
    f, mask = np.full((1, 16, 8), 50, np.float32), np.zeros((1, 16), bool)
    f[0, [5, 6, 9], 0], f[0, [5, 6, 9], 1:3], mask[0, [5, 6, 9]] = (2, 4, 6), 0, True
    np.testing.assert_allclose(
        head(jnp.asarray(f), jnp.asarray(mask))[0], np.array([4, 0, 0, 1, 0, 0]) / np.sqrt(17), atol=1e-5
    )


@pytest.mark.run
def test_arcfaces_centres_begin_with_norm_1():
    model = Matcher(MATCH, 7, rngs=nnx.Rngs(0))
    for centres in (model.arcface_global, model.arcface_local):
        np.testing.assert_allclose(jnp.linalg.norm(centres[...], axis=0), np.ones(7), rtol=1e-5)


@pytest.mark.run
def test_positions_may_begin_elsewhere():
    moved = position_encoding(3, 5, 16, shift=np.array([[2, 1], [0, 0]]))
    np.testing.assert_array_equal(moved[0], position_encoding(4, 7, 16)[1:, 2:])
    np.testing.assert_array_equal(moved[1], position_encoding(3, 5, 16))


@pytest.mark.run
def test_where_a_cell_lies_does_not_tell_its_match_once_the_frame_is_shifted():
    """Blank prints have nothing but positions. In one frame cell i is like cell i; a shift makes it like another."""
    model = filled(lambda: Matcher(MATCH.replace(similarity="cosine"), 5, rngs=nnx.Rngs(0)))
    model.loftr_transformer_global = lambda f0, f1, m0, m1: (f0, f1)
    pair = Aligned(
        *np.zeros((2, 2, 32, 32, 1), np.float32),
        np.ones((2, 32, 32), bool),
        *np.zeros((2, 2, 20, 20, 1), np.float32),
        np.ones((2, 20, 20), bool),
    )
    best = lambda shift: np.asarray(model(pair, shift, train=False).log_conf.argmax(2)).reshape(2, 4, 4)
    cells = np.arange(16).reshape(4, 4)
    np.testing.assert_array_equal(best(None), [cells, cells])
    shifted = best(jnp.array([[1, 0], [0, 2]]))
    np.testing.assert_array_equal(shifted[0, :, :3], cells[:, 1:])
    np.testing.assert_array_equal(shifted[1, :2], cells[2:])
