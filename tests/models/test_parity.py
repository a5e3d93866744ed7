"""Module 1's transformer, matching and losses give the numbers of kornia's LoFTR and of plain torch.

    make parity    # installs torch (the CPU build) and kornia beside the tests' environment, and runs this file

Weights and features are drawn; the weights go from kornia to ours through a checkpoint file under LoFTR's names.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ifvit.loftr import loftr_from_transformer, transformer_from_loftr
from ifvit.models import losses, matching, transformer
from ifvit.models.losses import IGNORE, NO_MATCH

pytest.importorskip("torch", reason="torch is not installed: `make parity` installs it, and runs these tests")
pytest.importorskip("kornia", reason="kornia is not installed: `make parity` installs it, and runs these tests")
import torch
from kornia.feature import loftr
from kornia.feature.loftr.loftr_module.linear_attention import FullAttention, LinearAttention
from kornia.feature.loftr.loftr_module.transformer import LocalFeatureTransformer, LoFTREncoderLayer
from kornia.feature.loftr.utils.coarse_matching import CoarseMatching
from kornia.feature.loftr.utils.position_encoding import PositionEncodingSine

COARSE = loftr.loftr.default_cfg["coarse"]  # width 256, 8 heads, 4 self and 4 cross layers
HALF = {"layer_names": ["self", "cross"] * 2}
SMALL = {"d_model": 32, "nhead": 4, **HALF}
MATCH = loftr.loftr.default_cfg["match_coarse"]  # temperature 0.1, threshold 0.2, border 2
KINDS = {"loftr": "linear", "siamese": "full"}  # our names of the attentions, and LoFTR's
ATTENTIONS = {"loftr": LinearAttention, "siamese": FullAttention}
GRIDS = [(6, 9), (16, 20)]  # rows × columns of two images: not square, of two sizes, fewer and more keys than channels


# --- helpers --------------------------------------------------------------------------------------


def same(ours, theirs, where=..., within=1e-5):
    """No number of ours is farther than `within` from theirs."""
    difference = np.abs(np.asarray(ours) - theirs.detach().numpy())[where]
    assert difference.size and difference.max() <= within, f"they differ by up to {difference.max():.2g}"


def same_gradient(ours, theirs):
    """The same by the largest of its numbers: a mean's gradient is small."""
    assert theirs.abs().max() > 0
    same(ours, theirs, within=1e-5 * float(theirs.abs().max()))


def features(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def padding(grid, rows, columns):
    """Masks of two images on one grid, as LoFTR pads them: the first fills it, the second its upper left corner."""
    mask = np.ones((2, *grid), bool)
    mask[1, rows:], mask[1, :, columns:] = False, False
    return mask.reshape(2, -1)


def masks_of(masked):
    """Masks of images 0 and 1 of a batch of two pairs, for ours, and for theirs."""
    ours = [padding(grid, grid[0] - 2, grid[1] - 3) if masked else np.ones((2, np.prod(grid)), bool) for grid in GRIDS]
    return ours, [torch.from_numpy(m) if masked else None for m in ours]


def drawn(module):
    """The module with drawn norms: one that is left out, or in the wrong place, shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in module.named_parameters():
            if x.dim() > 1:
                torch.nn.init.xavier_uniform_(x)
            else:
                x.copy_((0.3 if name.endswith("weight") else 0) + 0.1 * torch.randn_like(x))
    return module.eval()


def both(kind, folder, config=COARSE):
    """A transformer of kornia's, and ours with the weights of its checkpoint."""
    theirs = drawn(LocalFeatureTransformer(COARSE | config | {"attention": KINDS[kind]}))
    path = folder / "loftr.ckpt"
    torch.save({"state_dict": {f"matcher.loftr_coarse.{k}": x for k, x in theirs.state_dict().items()}}, path)
    pairs = len(theirs.layers) // 2
    ours = nnx.eval_shape(lambda: transformer.Transformer(theirs.d_model, theirs.nhead, pairs, kind, rngs=nnx.Rngs(0)))
    nnx.update(ours, jax.tree.map(jnp.asarray, transformer_from_loftr(path)))
    return ours, theirs


@nnx.jit
def forward(module, *inputs):
    return module(*inputs)


def tensors(*arrays):
    return [torch.tensor(np.asarray(a)) for a in arrays]


# --- the transformer ------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [40, 300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_loftrs(kind, masked, keys):
    q, k, v = (features(2, n, 8, 32, seed=i) for i, n in enumerate((25, keys, keys)))
    q_mask, kv_mask = np.ones((2, 25), bool), np.ones((2, keys), bool)
    if masked:
        q_mask[1, 20:], kv_mask[0, 7:], kv_mask[1, ::3] = False, False, False
    theirs = ATTENTIONS[kind]()(*tensors(q, k, v), *(tensors(q_mask, kv_mask) if masked else ()))
    ours = jax.jit(transformer.ATTENTION[kind])(q, k, v, q_mask, kv_mask)
    same(ours, theirs, q_mask)  # a masked query is 0 to us; LoFTR's full attention makes it NaN
    np.testing.assert_array_equal(np.asarray(ours)[~q_mask], 0)


@pytest.mark.parametrize("grid", [(60, 80), (13, 7)])
@pytest.mark.parametrize("temp_bug_fix", [True, False])
def test_the_position_encoding_is_loftrs(temp_bug_fix, grid):
    theirs = PositionEncodingSine(256, temp_bug_fix=temp_bug_fix)(torch.zeros(1, 256, *grid))
    same(transformer.position_encoding(*grid, 256, temp_bug_fix), theirs[0].permute(1, 2, 0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_layer_is_loftrs(kind, masked, tmp_path):
    ours, theirs = both(kind, tmp_path)
    f0, f1 = (features(2, np.prod(grid), 256, seed=i) for i, grid in enumerate(GRIDS))
    (m0, m1), masks = masks_of(masked)
    assert isinstance(theirs.layers[1], LoFTREncoderLayer)
    same(forward(ours.layer_1, f0, f1, m0, m1), theirs.layers[1](*tensors(f0, f1), *masks), m0)
    same(forward(ours.layer_1, f1, f0, m1, m0), theirs.layers[1](*tensors(f1, f0), *masks[::-1]), m1)


@pytest.mark.parametrize("kind, masked", [("loftr", False), ("loftr", True), ("siamese", False)])
def test_the_transformer_is_loftrs(kind, masked, tmp_path):
    ours, theirs = both(kind, tmp_path)
    f0, f1 = (features(2, np.prod(grid), 256, seed=i) for i, grid in enumerate(GRIDS))
    masks, their_masks = masks_of(masked)
    for a, b in zip(forward(ours, f0, f1, *masks), theirs(*tensors(f0, f1), *their_masks)):
        same(a, b)


def test_with_full_attention_a_padded_image_is_as_loftrs_without_its_padding(tmp_path):
    """Padding itself makes LoFTR's full attention NaN."""
    ours, theirs = both("siamese", tmp_path)
    f0, f1 = (features(2, np.prod(grid), 256, seed=i) for i, grid in enumerate(GRIDS))
    m0, m1 = masks_of(True)[0]
    found = forward(ours, f0, f1, m0, m1)
    for b in range(2):
        for a, x, m in zip(found, theirs(*tensors(f0[b : b + 1, m0[b]], f1[b : b + 1, m1[b]])), (m0, m1)):
            same(a[b][m[b]], x[0])


@pytest.mark.parametrize("kind, masked", [("loftr", False), ("loftr", True), ("siamese", False)])
def test_in_float64_nothing_but_the_last_rounding_is_left(kind, masked, tmp_path):
    """What float32 leaves is rounding, then, and no other formula: no epsilon, no order of the layers."""
    ours, theirs = both(kind, tmp_path, SMALL)
    f0, f1 = (features(2, np.prod(grid), 32, seed=i).astype(np.float64) for i, grid in enumerate(GRIDS))
    masks, their_masks = masks_of(masked)
    with jax.enable_x64(True):
        for i in range(4):
            layer = getattr(ours, f"layer_{i}")
            nnx.update(layer, jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), nnx.state(layer)))
        layer = forward(ours.layer_1, f0, f1, *masks)
        found = forward(ours, f0, f1, *masks)
        assert layer.dtype == jnp.float64 and found[0].dtype == jnp.float32
    theirs = theirs.double()
    same(layer, theirs.layers[1](*tensors(f0, f1), *their_masks), within=1e-12)
    for a, b in zip(found, theirs(*tensors(f0, f1), *their_masks)):
        same(a, b, within=2e-7 * float(b.detach().abs().max()))


def test_our_transformer_goes_back_into_kornias_loftr_to_the_bit(tmp_path):
    """Out of a whole LoFTR, backbone and all, through ours, and back by the names of its own state."""
    whole, other = (loftr.LoFTR(pretrained=None) for _ in range(2))
    torch.save({"state_dict": {f"matcher.{k}": x for k, x in whole.state_dict().items()}}, tmp_path / "outdoor_ds.ckpt")
    params = transformer_from_loftr(tmp_path / "outdoor_ds.ckpt")
    state = loftr_from_transformer(params)
    assert len(state) == 80
    safetensors.numpy.save_file(state, tmp_path / "ours.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    found = other.load_state_dict({k: torch.from_numpy(x) for k, x in back.items()}, strict=False)
    assert not found.unexpected_keys and not any(k.startswith("loftr_coarse.") for k in found.missing_keys)
    for a, b in zip(whole.loftr_coarse.parameters(), other.loftr_coarse.parameters()):
        assert torch.equal(a, b)


# --- matching -------------------------------------------------------------------------------------


def coarse(theirs, f0, f1, grids, masks=(None, None)):
    """LoFTR's coarse stage after its backbone: position encoding, transformer, dual softmax, matches."""
    encoding = PositionEncodingSine(f0.shape[-1], temp_bug_fix=True)
    x0, x1 = (
        encoding(torch.from_numpy(f).unflatten(1, grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        for f, grid in zip((f0, f1), grids)
    )
    data = {"hw0_c": grids[0], "hw1_c": grids[1], "stride_c": 8}
    CoarseMatching(MATCH).eval()(*theirs(x0, x1, *masks), data, *masks)
    return data


@jax.jit
def log_confidence(f0, f1, m0, m1):
    return matching.log_dual_softmax(matching.similarity(f0, f1), m0, m1)


def our_coarse(ours, f0, f1, grids, m0, m1):
    width = f0.shape[-1]
    x0, x1 = (f + transformer.position_encoding(*g, width).reshape(-1, width) for f, g in zip((f0, f1), grids))
    return log_confidence(*forward(ours, x0, x1, m0, m1), m0, m1)


@pytest.mark.parametrize("masked", [False, True])
def test_confidences_of_images_of_two_sizes_are_loftrs(masked, tmp_path):
    ours, theirs = both("loftr", tmp_path, HALF)
    f1 = features(2, 320, 256)
    f0 = f1[:, np.arange(320).reshape(16, 20)[4:10, 5:14].ravel()] + 0.1 * features(2, 54, 256, seed=1)  # a part of it
    masks, their_masks = masks_of(masked)
    data = coarse(theirs, f0, f1, GRIDS, their_masks)
    assert (data["conf_matrix"].amax(2) > 0.2).float().mean() > 0.5
    same(jnp.exp(our_coarse(ours, f0, f1, GRIDS, *masks)), data["conf_matrix"])


@pytest.mark.parametrize("kind, masked", [("loftr", False), ("loftr", True), ("siamese", False)])
def test_matches_are_loftrs(kind, masked, tmp_path):
    grid = (12, 17)
    ours, theirs = both(kind, tmp_path, HALF)
    f0 = features(2, 204, 256)
    f1 = np.roll(f0.reshape(2, *grid, 256), (1, 2), (1, 2)).reshape(f0.shape) + features(2, 204, 256, seed=1)
    m0, m1 = (padding(grid, 10, 13) if masked else np.ones((2, 204), bool) for _ in range(2))
    data = coarse(theirs, f0, f1, (grid, grid), tensors(m0, m1) if masked else (None, None))
    log_conf = our_coarse(ours, f0, f1, (grid, grid), m0, m1)
    same(jnp.exp(log_conf), data["conf_matrix"])

    found = jax.jit(matching.mutual_matches, static_argnums=(1, 3, 4))(log_conf, 204, 0.2, 2, grid)
    b, k = np.nonzero(np.asarray(found.valid))
    cell0, cell1, confidence = (np.asarray(x)[b, k] for x in (found.cell0, found.cell1, found.confidence))
    found = dict(zip(zip(b.tolist(), cell0.tolist(), cell1.tolist()), confidence.tolist()))
    expected = dict(zip(zip(*(data[x].tolist() for x in ("b_ids", "i_ids", "j_ids"))), data["mconf"].tolist()))
    assert len(expected) > 40 and found.keys() == expected.keys()
    assert max(abs(found[m] - expected[m]) for m in expected) <= 1e-5


# --- the losses -----------------------------------------------------------------------------------


def loftr_dual_softmax(sim, m0, m1):
    """Section 3.3; masked pairs have similarity -1e9, and confidence 0."""
    valid = m0[:, :, None] & m1[:, None, :]
    sim = sim.masked_fill(~valid, -1e9)
    return (sim.softmax(1) * sim.softmax(2)).masked_fill(~valid, 0)


def loftr_coarse_loss(conf, truth, weight):
    """LoFTR's coarse loss with dense supervision: alpha 0.25, gamma 2, confidences clamped at 1e-6, and the published
    weights of the two means, 1 and 1. `truth` is 1 at matches; `weight` is 0 at padded pairs, which LoFTR's mean of
    the negatives counts all the same. The two terms."""
    conf = conf.clamp(1e-6, 1 - 1e-6)
    positive = -0.25 * (1 - conf) ** 2 * conf.log() * weight
    negative = -0.25 * conf**2 * (1 - conf).log() * weight
    return positive[truth == 1].mean(), negative[truth == 0].mean()


def torch_nll(conf, labels, m0):
    """Of the match, and of "no match at all" for the cells without one."""
    picked = conf.gather(2, labels.long().clamp(min=0)[:, :, None])[..., 0]
    some = conf.sum(2).clamp(max=1 - 1e-6)
    return -picked[labels >= 0].log().mean() - torch.log1p(-some)[(labels == NO_MATCH) & m0].mean()


@pytest.fixture(params=[False, True], ids=["whole", "padded"])
def batch(request):
    """Features of two pairs of 54 and 80 cells, the labels of image 0, and the masks: one pair may be padded.

    Some of the matches are found, some are not, so confidences lie on both sides of the clamps.
    """
    rng = np.random.default_rng(0)
    m0, m1 = padding((6, 9), 4, 6), padding((8, 10), 6, 7)
    if not request.param:
        m0, m1 = np.ones_like(m0), np.ones_like(m1)
    f0, f1 = (1.5 * features(2, n, 32, seed=n) for n in (54, 80))
    labels = np.full((2, 54), NO_MATCH)
    for n in range(2):
        cells0, cells1 = rng.permutation(np.flatnonzero(m0[n]))[:16], rng.permutation(np.flatnonzero(m1[n]))[:16]
        labels[n, cells0] = cells1
        f0[n, cells0[:10]] = f1[n, cells1[:10]] * np.linspace(0.1, 1, 10, dtype=np.float32)[:, None]
    labels[~m0] = IGNORE
    return tuple(jnp.asarray(x) for x in (f0, f1, labels, m0, m1))


def truth_of(labels, columns):
    return (labels[:, :, None] == torch.arange(columns)).float()


def their_focal(conf, labels, m0, m1):
    """LoFTR's loss; its mean of the negatives over the unpadded pairs alone, which is what differs in ours."""
    truth, weight = truth_of(labels, conf.shape[2]), (m0[:, :, None] & m1[:, None, :]).float()
    positive, negative = loftr_coarse_loss(conf, truth, weight)
    return positive + negative * (truth == 0).sum() / ((truth == 0) & (weight == 1)).sum()


def their_nll(conf, labels, m0, m1):
    return torch_nll(conf, labels, m0)


LOSSES = {"focal": their_focal, "nll": their_nll}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradient_by_the_features_are_torchs(name, batch):
    f0, f1, labels, m0, m1 = batch

    def loss(f0, f1):
        log_conf = matching.log_dual_softmax(matching.similarity(f0, f1), m0, m1)
        return losses.DENSE_LOSSES[name](log_conf, labels, m0, m1)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(f0, f1)
    x0, x1, labels, m0, m1 = tensors(f0, f1, labels, m0, m1)
    x0.requires_grad_(), x1.requires_grad_()
    conf = loftr_dual_softmax(torch.einsum("blc,bsc->bls", x0 / 32**0.5, x1 / 32**0.5) / 0.1, m0, m1)
    expected = LOSSES[name](conf, labels, m0, m1)
    expected.backward()
    of_matches = conf[truth_of(labels, 80) == 1]
    assert of_matches.min() < 1e-6 and of_matches.max() > 0.9  # clamped, and found
    same(value, expected)
    same_gradient(gradients[0], x0.grad)
    same_gradient(gradients[1], x1.grad)


@pytest.mark.parametrize("batch", [False], indirect=True, ids=["whole"])
def test_without_padding_the_focal_loss_is_loftrs_own(batch):
    f0, f1, labels, m0, m1 = batch
    log_conf = log_confidence(f0, f1, m0, m1)
    (conf,) = tensors(jnp.exp(log_conf))
    expected = sum(loftr_coarse_loss(conf, truth_of(*tensors(labels), 80), torch.ones_like(conf)))
    same(losses.focal_loss(log_conf, labels, m0, m1), expected)


def test_the_focal_losss_gradient_by_every_weight_is_torchs(batch, tmp_path):
    f0, f1, labels, m0, m1 = batch
    ours, theirs = both("loftr", tmp_path, SMALL)

    def loss(ours):
        log_conf = matching.log_dual_softmax(matching.similarity(*ours(f0, f1, m0, m1)), m0, m1)
        return losses.focal_loss(log_conf, labels, m0, m1)

    gradients = nnx.to_pure_dict(nnx.state(nnx.jit(nnx.grad(loss))(ours)))
    labels, m0, m1 = tensors(labels, m0, m1)
    y0, y1 = theirs(*tensors(f0, f1), m0, m1)
    conf = loftr_dual_softmax(torch.einsum("blc,bsc->bls", y0 / 32**0.5, y1 / 32**0.5) / 0.1, m0, m1)
    their_focal(conf, labels, m0, m1).backward()
    found = loftr_from_transformer(gradients)  # each under the name of its weight, turned as torch has it
    expected = {f"matcher.loftr_coarse.{name}": x.grad for name, x in theirs.named_parameters()}
    assert found.keys() == expected.keys() and len(found) == 40
    largest = float(max(x.abs().max() for x in expected.values()))
    for name, x in expected.items():
        same(found[name], x, within=1e-5 * largest)
