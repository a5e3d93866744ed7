"""Templates of prints, of a network that nobody has trained."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ifvit.config import DenseConfig, preset
from ifvit.data.placement import Placement
from ifvit.data.single import Canvases, OnCanvas
from ifvit.errors import UserError
from ifvit.models.networks import dense_network
from ifvit.scoring.scorer import Scorer
from ifvit.scoring.template import as_template, description
from ifvit.scoring.template_fit import clustered, discriminant, drawn, fit_template

CONFIG = preset("smoke", DenseConfig)  # a window of 64 px at 200 ppi, of a canvas of 256

NEVER = lambda *_: pytest.fail("asked")


class Several(Canvases):
    """Prints in memory, whose fingers are told."""

    def __init__(self, some, fingers):
        self.some = tuple(some)
        self.prints = tuple(SimpleNamespace(identity=("DB", f)) for f in fingers)


def on_canvas(n, size, turn):
    rows, columns = np.mgrid[:256, :256]
    mask = np.zeros((32, 32), bool)
    mask[6 : 6 + size, 8 : 8 + size] = True
    inside = np.kron(mask, np.ones((8, 8), bool))
    grey = np.where(inside, 128 + 100 * np.sin(2 * np.pi * (columns + turn * rows) / 11), 255).astype(np.uint8)
    return OnCanvas(f"print {n}", grey, mask, Placement())


@pytest.fixture(scope="module")
def network():
    net = dense_network(CONFIG)
    return net, jax.jit(net.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def fitted(network):
    """Fitted to two impressions of each of three fingers, whose ridges run each in a way of their own."""
    net, state = network
    some = [on_canvas(n, 20 - n % 2, 0.5 * (n // 2)) for n in range(6)]
    describe = jax.jit(description(net, CONFIG))
    return fit_template(describe, state, Several(some, [n // 2 for n in range(6)]), CONFIG)


@pytest.fixture(scope="module")
def ours(network, fitted):
    return Scorer("dense_reg", CONFIG, *network[1], None, None, 0, None, template=as_template(fitted))


@pytest.fixture(scope="module")
def prints():
    """Three prints of ridges of a way of their own; the second fills a quarter of the window, the last is blank."""
    return Canvases([on_canvas(n, size, n) for n, size in enumerate((20, 10, 0))])


@pytest.mark.run
def test_a_template_is_a_unit_row_a_print_and_turn_in_their_order(ours, prints):
    rows = ours.templates(prints, 2, (0.0, 20.0))
    assert rows.shape == (3, 2, CONFIG.template_size) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=2), [[1, 1], [1, 1], [0, 0]], atol=1e-4)
    alone = ours.templates(Canvases(prints.some[1:2]), 1)
    np.testing.assert_allclose(alone[0, 0], rows[1, 0], atol=1e-4)
    turned = ours.templates(prints, 3, (20.0,))
    np.testing.assert_allclose(turned[:, 0], rows[:, 1], atol=1e-4)
    assert abs(rows[0, 0] - rows[0, 1]).max() > 1e-4


@pytest.mark.run
def test_what_is_fitted_has_the_size_that_is_asked_for_and_tells_its_own_fingers_apart(ours, fitted):
    assert fitted["projection"].shape == (fitted["centres"].size, 32) and fitted["bias"].shape == (32,)
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in fitted.values())
    some = [on_canvas(n, 20 - n % 2, 0.5 * (n // 2)) for n in range(6)]
    rows = ours.templates(Canvases(some), 6)[:, 0]
    likeness = rows @ rows.T
    finger = np.arange(6) // 2
    same = finger[:, None] == finger
    assert likeness[same].min() > likeness[~same].max()


def test_no_prints_have_no_templates(ours):
    assert ours.templates(Canvases([]), 4, (0.0, 10.0)).shape == (0, 2, CONFIG.template_size)


def test_a_checkpoint_that_makes_no_template_says_how_to_get_one(prints):
    with pytest.raises(UserError, match="makes no template of one print. Module 1's final checkpoint makes them"):
        Scorer("dense_reg", CONFIG, {}, {}, None, None, 0, None).templates(prints, 2)


def test_fingers_are_drawn_whole_and_only_those_with_two_impressions():
    prints = Several([None] * 9, [0, 1, 1, 2, 2, 2, 3, 3, 4])
    numbers, finger = drawn(prints, 5, seed=0)
    assert len(numbers) <= 5 and set(numbers) <= {1, 2, 3, 4, 5, 6, 7}
    by_finger = {f: sorted(numbers[finger == f]) for f in set(finger)}
    assert sorted(by_finger) == list(range(len(by_finger)))
    assert all(some in ([1, 2], [3, 4, 5], [6, 7]) for some in by_finger.values())
    assert len(drawn(prints, 100, seed=0)[0]) == 7
    assert len(set(drawn(prints, 4, seed=1)[1])) == 2  # two fingers at least, or nothing could be told apart


@pytest.mark.parametrize("fingers", [[0, 1, 2], [0, 0, 1]])
def test_without_two_fingers_of_two_impressions_there_is_no_template(fingers, caplog):
    with caplog.at_level("INFO", "ifvit"):
        assert fit_template(NEVER, (), Several([None] * 3, fingers), CONFIG) is None
    assert "makes no templates of one print" in caplog.text


def test_no_template_is_fitted_where_none_is_asked_for():
    assert fit_template(NEVER, (), Several([], []), CONFIG.replace(template_size=0)) is None


def test_centres_are_those_of_what_lies_together():
    rng = np.random.default_rng(0)
    at = np.array([[5, 0], [0, 5], [-5, -5]], np.float32)
    x = (at[rng.integers(0, 3, 300)] + rng.normal(size=(300, 2)) / 10).astype(np.float32)
    found = clustered(x, 3, seed=2)
    np.testing.assert_allclose(found[np.lexsort(found.T)], at[np.lexsort(at.T)], atol=0.1)
    assert len(clustered(x[:2], 3, seed=0)) == 2


@pytest.mark.parametrize("numbers, count", [(6, 40), (60, 8)])  # of a row, and fingers: less, and more than rows
def test_directions_are_those_in_which_fingers_differ_and_not_their_impressions(numbers, count):
    """The first number tells fingers apart; the second varies more, within each finger."""
    rng = np.random.default_rng(1)
    finger = np.repeat(np.arange(count), 4)
    rows = rng.normal(scale=0.05, size=(4 * count, numbers))
    rows[:, 0] += rng.normal(size=count)[finger]
    rows[:, 1] += rng.normal(scale=5, size=len(rows))
    projection, bias = discriminant(rows.astype(np.float32), finger, 3)
    assert projection.shape == (numbers, 3)
    first = abs(projection[:, 0])
    assert first[0] > 5 * first[1:].max()
    np.testing.assert_allclose(rows.mean(0) @ projection + bias, 0, atol=1e-3)


def test_of_two_fingers_there_is_one_direction_and_the_rest_is_0():
    rows = np.float32([[0, 0, 1], [0.1, 0, 1], [1, 0, 1], [1.1, 0, 1]])
    projection, _ = discriminant(rows, np.array([0, 0, 1, 1]), 4)
    assert projection[:, 0].any() and not projection[:, 1:].any()
