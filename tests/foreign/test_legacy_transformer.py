"""Module 1's transformer out of other code's parameters: mapped array by array, or refused with every mismatch."""

import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen, nnx
from flax.traverse_util import flatten_dict

from ifvit import legacy
from ifvit.errors import UserError
from ifvit.foreign import legacy_transformer
from ifvit.models.transformer import Transformer


def bits(tree):
    return (
        {k: bits(v) for k, v in tree.items()}
        if isinstance(tree, dict)
        else (tree.dtype.name, tree.shape, tree.tobytes())
    )


WIDTH, PAIRS = 8, 2
SHAPES = {"q_proj": (8, 8), "k_proj": (8, 8), "v_proj": (8, 8), "merge": (8, 8), "mlp.0": (16, 16), "mlp.2": (16, 8)}


def layer(seed, bias=None):
    rng = np.random.default_rng(seed)
    made = {k: {"kernel": rng.standard_normal(s, np.float32)} for k, s in SHAPES.items()}
    if bias is not None:
        for k, s in SHAPES.items():
            made[k]["bias"] = np.full(s[1], bias, np.float32)
    return made | {
        n: {"scale": rng.random(8, np.float32), "bias": rng.random(8, np.float32)} for n in ("norm1", "norm2")
    }


def original(same=True, bias=None):
    """As the original code names its layers, one for each print."""
    return {f"layers.{i}.{p}": layer(i if same else (i, p), bias) for i in range(2 * PAIRS) for p in range(2)}


def ours(tree):
    """`layer`'s arrays by our names."""
    return {k.replace(".", "_"): v for k, v in tree.items()}


OURS = {f"layer_{i}": ours(layer(i)) for i in range(2 * PAIRS)}


def test_the_mapped_names_and_shapes_are_the_models():
    model = nnx.eval_shape(lambda: Transformer(WIDTH, 2, PAIRS, "loftr", rngs=nnx.Rngs(0)))
    wanted = {"/".join(map(str, k)): v.shape for k, v in flatten_dict(nnx.to_pure_dict(nnx.state(model))).items()}
    _, tree, _ = legacy_transformer.transformer({"loftr_transformer": original()})
    assert {"/".join(k): v.shape for k, v in flatten_dict(tree).items()} == wanted


@pytest.mark.parametrize("name", ["loftr_transformer", "siamese_transformer"])
@pytest.mark.parametrize("above", [(), ("params",), ("model",), ("dense_reg",), ("params", "model")])
def test_ours_is_found_and_kept_to_the_bit(name, above):
    params = {name: OURS, "resnet": {"w": np.ones(1)}}
    for key in above:
        params = {key: params}
    found, tree, notes = legacy_transformer.transformer(params)
    assert found == name and bits(tree) == bits(OURS) and notes == []


def test_equal_layers_of_both_prints_become_one():
    _, tree, notes = legacy_transformer.transformer({"params": {"loftr_transformer": original(same=True)}})
    assert bits(tree) == bits(OURS)
    assert len(notes) == 1 and "not the same function" in notes[0]


def test_of_layers_that_differ_print_0s_are_taken_and_the_rest_is_told():
    tree = original(same=True)
    tree["layers.2.1"]["merge"]["kernel"] = tree["layers.2.1"]["merge"]["kernel"] + np.float32(0.5)
    _, mapped, notes = legacy_transformer.transformer({"loftr_transformer": tree})
    assert bits(mapped) == bits(OURS)
    assert (
        "one for both: print 0's were taken, and 40 arrays of print 1's left out, of which 1 differ by up to 0.5."
        in notes[0]
    )


def test_biases_of_zero_are_dropped_and_others_left_out_with_their_size():
    _, tree, notes = legacy_transformer.transformer({"loftr_transformer": original(bias=0.0)})
    assert bits(tree) == bits(OURS)
    assert (
        notes[0] == "48 biases of loftr_transformer's linear maps, which LoFTR's have not, were all zero and dropped."
    )
    source = original(bias=0.0)
    source["layers.0.0"]["q_proj"]["bias"][3] = -0.25
    _, tree, notes = legacy_transformer.transformer({"loftr_transformer": source})
    assert bits(tree) == bits(OURS)
    assert (
        "1 biases" in notes[0]
        and "(of 48)" in notes[0]
        and notes[0].endswith("were left out; their largest value is 0.25.")
    )


@pytest.mark.parametrize(
    "form", ["layers.{i}", "layers_{i}", "layer_{i}", "layers_{i}_0", "layers.{i}.0", "layer_{i}_0"]
)
@pytest.mark.parametrize("mlp", ["mlp.", "mlp_"])
def test_a_layer_shared_by_the_prints_is_known_by_any_name(form, mlp):
    tree = {form.format(i=i): {k.replace("mlp.", mlp): v for k, v in layer(i).items()} for i in range(4)}
    _, mapped, _ = legacy_transformer.transformer({"loftr_transformer": tree})
    assert bits(mapped) == bits(OURS)


@pytest.mark.parametrize("prints", [1, 2])
def test_nested_layers_and_nested_maps_are_known(prints):
    def nested(tree):
        return {k: v for k, v in tree.items() if "." not in k} | {
            "mlp": {"layers_0": tree["mlp.0"], "layers_2": tree["mlp.2"]}
        }

    tree = {"layers": {str(i): {str(p): nested(layer(i)) for p in range(prints)} for i in range(4)}}
    assert bits(legacy_transformer.transformer({"loftr_transformer": tree})[1]) == bits(OURS)


def test_weights_of_torchs_layout_are_transposed():
    def torch(tree):
        return {
            k: {
                "weight": v["kernel"].T if "kernel" in v else v["scale"],
                **({"bias": v["bias"]} if "scale" in v else {}),
            }
            for k, v in tree.items()
        }

    tree = {"layers": {str(i): torch(layer(i)) for i in range(4)}}
    _, mapped, notes = legacy_transformer.transformer({"loftr_transformer": tree})
    assert bits(mapped) == bits(OURS) and notes == []


def test_other_float_types_become_float32_with_a_note():
    tree = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), OURS)
    _, mapped, notes = legacy_transformer.transformer({"loftr_transformer": tree})
    assert bits(mapped) == bits(jax.tree.map(lambda a: a.astype(np.float32), tree))
    assert notes == ["loftr_transformer was converted to float32 from bfloat16."]


class Encoder(linen.Module):
    """The original's layer in linen: biases as linen has them, names with dots."""

    @linen.compact
    def __call__(self, x, source):
        norm1, norm2 = linen.LayerNorm(name="norm1"), linen.LayerNorm(name="norm2")
        q, k, v, merge = (linen.Dense(WIDTH, name=n) for n in ("q_proj", "k_proj", "v_proj", "merge"))
        message = merge(q(norm1(x)) * k(source) + v(source))
        out = linen.Dense(WIDTH, name="mlp.2")(
            linen.relu(linen.Dense(2 * WIDTH, name="mlp.0")(jnp.concatenate([x, message], -1)))
        )
        return norm2(x + out)


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        class Original(linen.Module):
            @linen.compact
            def __call__(self, x):
                for i in range(4):
                    x = Encoder(name=f"layers.{i}.0")(x, x) + Encoder(name=f"layers.{i}.1")(x, x)
                return x

        return Original(name="loftr_transformer")(x)


def test_a_transformer_that_linen_made_and_pickle_saved_is_mapped(tmp_path):
    variables = Dense().init(jax.random.key(0), jnp.ones((1, 3, WIDTH)))
    (tmp_path / "a.pkl").write_bytes(
        pickle.dumps({"state": {"params": variables["params"], "step": 1}, "metadata": {}, "timestamp": "t"})
    )
    found = legacy.read(tmp_path / "a.pkl")
    _, tree, notes = legacy_transformer.transformer(found.state["params"])
    source = jax.device_get(variables["params"]["loftr_transformer"])
    assert bits(tree["layer_3"]["mlp_0"]["kernel"]) == bits(source["layers.3.0"]["mlp.0"]["kernel"])
    assert len(flatten_dict(tree)) == 40 and len(notes) == 3  # biases of zero, another print 1, norms elsewhere


def test_the_originals_other_transformer_is_refused_with_reasons():
    attention = {
        "MultiHeadDotProductAttention_0": {"query": {"kernel": np.ones((8, 2, 4))}},
        "LayerNorm_0": {"scale": np.ones(8)},
    }
    tree = {"self_attn_1_layer_0": attention, "cross_attn_1_layer_0": attention, "pos_encoding_1": {"w": np.ones(3)}}
    with pytest.raises(
        UserError, match="siamese_transformer of this checkpoint is another architecture: .*biases.*position"
    ):
        legacy_transformer.transformer({"siamese_transformer": tree})


def test_no_transformer_is_told_with_what_there_is():
    for params in (
        {"resnet": {"w": np.ones(1)}, "head": {}},
        {"resnet": np.ones(1), "head": {"loftr_transformer": np.ones(2)}},
    ):
        with pytest.raises(
            UserError, match="^No transformer found in Module 1 checkpoint, which has head, resnet and no"
        ):
            legacy_transformer.transformer(params)


def test_every_mismatch_is_named():
    tree = original()
    del tree["layers.1.0"]["norm1"]["scale"], tree["layers.2.0"], tree["layers.0.1"]["mlp.2"]
    tree["layers.0.0"]["q_proj"]["kernel"] = np.ones((8, 4), np.float32)
    tree["layers.1.1"]["k_proj"]["kernel"] = np.ones((8, 8), np.int32)
    tree["layers.3.1"]["norm2"]["bias"] = np.array([np.nan] * 8, np.float32)
    tree["layers.3.1"]["dropout"] = {"rate": np.float32(0.1)}
    with pytest.raises(UserError) as caught:
        legacy_transformer.transformer({"loftr_transformer": tree})
    for part in (
        "layer 1 of print 0 norm1/scale is missing",
        "layer 2 of print 0 is missing",
        "layer 0 of print 1 mlp_2/kernel is missing",
        "layer 0 of print 0 q_proj/kernel is (8, 4), not (8, 8)",
        "layers.1.1/k_proj/kernel is of type int32",
        "layers.3.1/norm2/bias has values that are not finite",
        "layers.3.1/dropout/rate has no place",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "wrong, why",
    [
        ({f"layer_{i}": ours(layer(i)) for i in (0, 1, 3)}, "layer 2 is missing"),
        ({f"layer_{i}": ours(layer(i)) for i in range(3)}, "3 layers are no pairs"),
        ({"layers.0": layer(0), "layers.1.0": layer(1)}, "not all of print 0"),
        ({"layers.0.1": layer(0), "layers.1.1": layer(1)}, "not all of print 0"),
        (OURS | {"layers.0": layer(0)}, "there twice"),
        (
            OURS | {"layer_0": ours(layer(0)) | {"merge": {"kernel": np.ones((4, 4), np.float32)}}},
            r"merge/kernel is \(4, 4\), not \(8, 8\)",
        ),
        ({"layers": {}}, "it has no layers"),
        ({"layer_1000": ours(layer(0))}, "has no place"),
    ],
)
def test_layers_that_are_no_transformer_are_refused(wrong, why):
    with pytest.raises(UserError, match=why):
        legacy_transformer.transformer({"loftr_transformer": wrong})


def test_mixed_widths_are_named_against_the_commonest():
    wide = jax.tree.map(lambda a: np.ones([2 * n for n in a.shape], np.float32), ours(layer(0)))
    with pytest.raises(UserError, match=r"layer 1 k_proj/kernel is \(16, 16\), not \(8, 8\).*layer 1 q_proj/kernel"):
        legacy_transformer.transformer({"loftr_transformer": OURS | {"layer_1": wide}})
