"""The weights that come with the package: Module 1, trained on generated prints alone. CARD.md beside them tells more.

    python -m ifvit.weights pack CKPT    writes them and their card from a checkpoint

`--checkpoint pretrained` names them in every command. `prints` has two generated prints of one finger and one of
another: of `data.synthetic` with the seed 2026, which no run sees unless it asks for that data_seed, finger 2
(impressions 2 and 3) and finger 1 (impression 3).
"""

from pathlib import Path

FOLDER = Path(__file__).parent
FILE = "dense_reg.safetensors"
CARD = "CARD.md"
