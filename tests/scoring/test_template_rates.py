"""Rates of templates by hand."""

import numpy as np

from ifvit.config import DenseConfig, preset
from ifvit.data.prepare import PrintSet
from ifvit.data.protocols import Pairs, pairs_all
from ifvit.data.sources import Print
from ifvit.scoring.scorer import Scorer
from ifvit.scoring.template_rates import template_rates


def test_rates_of_templates_by_hand(monkeypatch):
    """Two fingers of two impressions; one second impression is likest the other finger's first."""
    prints = tuple(Print(f"{f}_{i}", "DB", str(f), str(i), None) for f in (1, 2) for i in (1, 2))
    turned = lambda degrees: [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]
    rows = np.array([turned(d) for d in (0, 10, 90, 40)], np.float32)[:, None]
    monkeypatch.setattr(Scorer, "templates", lambda self, prints, batch_size: rows)
    scorer = Scorer("dense_reg", preset("smoke", DenseConfig), {}, {}, None, None, 0, None)
    set_ = PrintSet(prints, tuple((0, i) for i in range(4)), ())
    found = template_rates(scorer, set_, Pairs(tuple(pairs_all(prints))), 2)
    # genuine at 10° and 50°, impostor at 90°, 40°, 80° and 30°: where two of the four pass, one of the two is refused
    assert found == {"DB": {"eer_template": 0.5, "rank1_template": 0.5}}
