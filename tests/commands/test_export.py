"""`export`: the scorer as one file, run by JAX alone, gives the scorer's own scores."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ifvit.data.pairs import Pair
from ifvit.data.single import Canvases
from ifvit.matcher import Matcher

ALONE = """\
import sys
import numpy as np
from jax import export

exported = export.deserialize(bytearray(open("scorer.stablehlo", "rb").read()))
with np.load("pair.npz") as pair:
    found = exported.call(*(pair[name] for name in ("canvas0", "mask0", "canvas1", "mask1")))
print(float(found["score"][0]), float(found["log_odds"][0]))
assert "ifvit" not in sys.modules
"""


def pair_of(matcher, generated):
    return [matcher.read(generated[1, i]) for i in (1, 2)]


@pytest.mark.run
def test_a_program_without_this_package_gets_the_same_score(command, packed, generated, tmp_path):
    said = command("export", "--checkpoint", "pretrained", cwd=tmp_path)
    assert said.code == 0 and "scorer.stablehlo" in said.out, said
    matcher = Matcher.load("pretrained")
    a, b = pair_of(matcher, generated)
    arrays = {"canvas0": a.canvas[None], "mask0": a.mask[None], "canvas1": b.canvas[None], "mask1": b.mask[None]}
    np.savez(tmp_path / "pair.npz", **arrays)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = matcher.scorer.score(Canvases([a, b]), [Pair(0, 1, True)], 1)
    found = [float(x) for x in done.stdout.split()]
    np.testing.assert_allclose(found, [expected["score"][0], expected["log_odds"][0]], rtol=1e-5)
    told = json.loads((tmp_path / "scorer.stablehlo.json").read_text())
    assert [x["name"] for x in told["inputs"]] == ["canvas0", "mask0", "canvas1", "mask1"]
    assert told["inputs"][0]["shape"] == [1, *a.canvas.shape] and told["outputs"]["score"]["shape"] == [1]
    assert told["platforms"] == ["cpu", "cuda", "tpu"] and told["module"] == "dense_reg"


@pytest.mark.slow
def test_module_2s_fused_score_is_in_the_file(module2, generated, command, tmp_path):
    from jax import export

    path = module2.path
    said = command(
        "export", "--checkpoint", path, "--out", "s.bin", "--batch_size", 2, "--platforms", "cpu", cwd=tmp_path
    )
    assert said.code == 0, said
    matcher = Matcher.load(path)
    a, b = pair_of(matcher, generated)
    exported = export.deserialize(bytearray((tmp_path / "s.bin").read_bytes()))
    found = exported.call(*(np.stack([x, x]) for x in (a.canvas, a.mask, b.canvas, b.mask)))
    expected = matcher.scorer.score(Canvases([a, b]), [Pair(0, 1, True)], 1)
    for name in ("score", "log_odds", "global", "local"):
        np.testing.assert_allclose(np.asarray(found[name]), expected[name].repeat(2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "words, told",
    [
        (("--batch_size", 0), "--batch_size is 0"),
        (("--out", "."), "is a folder"),
        (("--checkpoint", "nowhere"), "Checkpoint not found: nowhere"),
        (("--platforms", "abacus"), "abacus"),
    ],
)
def test_a_mistake_is_one_sentence(command, packed, tmp_path, words, told):
    if "--checkpoint" not in words:
        words = ("--checkpoint", "pretrained", *words)
    said = command("export", *words, cwd=tmp_path)
    assert said.code == 2 and told in said.err, said
    assert not list(tmp_path.glob("scorer*"))
