"""CMC curves, and rates of templates, by hand."""

import numpy as np

from ifvit.config import DenseConfig, preset
from ifvit.data.prepare import PrintSet
from ifvit.data.protocols import Pairs, pairs_all
from ifvit.data.sources import Print
from ifvit.scoring import identification
from ifvit.scoring.scorer import Scorer


def test_rates_of_templates_by_hand(monkeypatch):
    """Two fingers of two impressions; one second impression is likest the other finger's first."""
    prints = tuple(Print(f"{f}_{i}", "DB", str(f), str(i), None) for f in (1, 2) for i in (1, 2))
    turned = lambda degrees: [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]
    rows = np.array([turned(d) for d in (0, 10, 90, 40)], np.float32)[:, None]
    monkeypatch.setattr(Scorer, "templates", lambda self, prints, batch_size: rows)
    scorer = Scorer("dense_reg", preset("smoke", DenseConfig), {}, {}, None, None, 0, None)
    set_ = PrintSet(prints, tuple((0, i) for i in range(4)), ())
    found = identification.template_rates(scorer, set_, Pairs(tuple(pairs_all(prints))), 2)
    # genuine at 10° and 50°, impostor at 90°, 40°, 80° and 30°: where two of the four pass, one of the two is refused
    assert found == {"DB": {"eer_template": 0.5, "rank1_template": 0.5, "cmc_template": [0.5, 1.0]}}


def test_a_curve_counts_probes_by_the_rank_of_their_own_finger():
    likeness = np.array([[9, 1, 2], [5, 5, 0], [3, 4, 5], [0, 0, 0]])
    assert identification.cmc(likeness, np.array([0, 1, 0, 2])) == [0.25, 0.5, 1.0]  # ranks 1, 2, 3 and 3
    assert len(identification.cmc(np.zeros((1, 99)), np.array([7]))) == identification.RANKS


def test_a_curve_by_the_scores_of_all_pairs():
    """Probes are found by their pairs with first impressions alone; an altered print is no probe."""
    prints = [Print(f"{f}_{i}", "DB", f, i, None, altered=i == "x") for f in "ab" for i in ("1", "2", "x")]
    pairs = Pairs(tuple(pairs_all(prints)))
    of = {("a_1", "a_2"): 3.0, ("b_1", "b_2"): 1.0, ("a_1", "b_2"): 2.0, ("a_2", "b_2"): 9.0, ("a_x", "b_1"): 9.0}
    score = np.array([of.get((prints[p.print0].path, prints[p.print1].path), 0.0) for p in pairs])
    assert identification.by_scores(prints, pairs, "DB", score) == {"rank1": 0.5, "cmc": [0.5, 1.0]}
