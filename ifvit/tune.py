"""`python -m tune` by another name, for a folder that has a tune.py of the user's own.

python -m ifvit.tune --module both --num_samples 24 --dataset_root DIR
"""

import sys

from ifvit import cli
from tune.__main__ import Args

if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.tune"))
