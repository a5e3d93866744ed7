"""How well the templates of one print tell fingers apart, on the pairs of an evaluation."""

import numpy as np

from ifvit.data.prepare import PrintSet
from ifvit.data.protocols import Pairs, by_finger, first_impression
from ifvit.scoring import rates
from ifvit.scoring.scorer import Scorer


def template_rates(scorer: Scorer, prints: PrintSet, pairs: Pairs, batch_size: int) -> dict[str, dict[str, float]]:
    """A database's `eer_template`, of its pairs by the cosine of their templates, and `rank1_template`.

    That is the share of probes whose likest enrolled print is of their own finger: the first impression of every
    finger is enrolled, the others are probes, upright as they are.
    """
    rows = scorer.templates(prints, batch_size)[:, 0]
    cosines = lambda which: np.concatenate([(rows[ij[:, 0]] * rows[ij[:, 1]]).sum(1) for _, ij in pairs.blocks(which)])
    fingers, found = by_finger(prints.prints), {}
    for database in (d.database for d in pairs.databases):
        genuine, impostor = (cosines(pairs.of(database, kind)) for kind in (True, False))
        first = [first_impression(prints.prints, members) for members in fingers[database]]
        right = [
            (rows[[i for i in members if i != first[n]]] @ rows[first].T).argmax(1) == n
            for n, members in enumerate(fingers[database])
        ]
        found[database] = {
            "eer_template": rates.equal_error_rate(genuine, impostor),
            "rank1_template": float(np.concatenate(right).mean()),
        }
    return found
