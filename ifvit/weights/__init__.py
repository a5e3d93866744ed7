"""The weights that come with the package: Module 1, trained on generated prints alone. CARD.md beside them tells more.

    python -m ifvit.weights pack CKPT    writes them and their card from a checkpoint

`--checkpoint pretrained` names them in every command.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
FILE = "dense_reg.safetensors"
CARD = "CARD.md"
