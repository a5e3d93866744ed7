"""Prints that are numbers, and a score of pairs of them."""

import numpy as np

from ifvit.scoring.scores import PairScore


class Numbers:
    """Prints that show their number."""

    prints = ()

    def __init__(self):
        self.asked = []

    def canvas(self, i):
        self.asked.append(i)
        return np.full((8, 8), i, np.uint8), np.ones((1, 1), bool)


# The score is an order of the two prints: 100 · first + second.
NUMBERED = PairScore(
    lambda prints: {"number": prints["canvas"][:, 0, 0].astype(np.float32)},
    lambda batch: {"score": 100 * batch["number0"] + batch["number1"], "matches": batch["number1"].astype(np.int32)},
).jitted()
