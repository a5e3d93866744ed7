"""Writes a trained scorer as one file that JAX alone runs.

python -m ifvit.export --checkpoint CKPT --out scorer.stablehlo [--batch_size 16] [--platforms cpu cuda tpu]
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ifvit import cli
from ifvit.errors import UserError
from ifvit.files import write_whole
from ifvit.matcher import DEFAULT
from ifvit.paths import resolve


@dataclass(frozen=True)
class Args:
    """Writes the scorer of a checkpoint as StableHLO, and beside it a JSON file that tells what goes in and out."""

    checkpoint: str | None = None
    """Module 2's, or one of Module 1 [./checkpoints/matcher/matcher_ckpt, else `pretrained`, the package's Module 1]"""
    out: str = "scorer.stablehlo"
    """the file; what goes in and out stands in the same name with .json"""
    batch_size: int = 1
    """pairs that it scores at once"""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """where it is to run"""

    def run(self) -> int:
        out = Path(resolve(self.out))
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; give at least 1.")
        if out.is_dir() or self.out.endswith(os.sep):
            raise UserError(f"--out {self.out} is a folder; give the path of a file in it, such as scorer.stablehlo.")
        from ifvit import checkpoint
        from ifvit.checkpoint import or_packaged
        from ifvit.checkpoint.metadata import versions
        from ifvit.scoring.exported import described, stable_hlo
        from ifvit.scoring.scorer import Scorer

        path = or_packaged(self.checkpoint, DEFAULT)
        scorer = Scorer.from_checkpoint(path)
        if scorer.module == "matcher" and scorer.fusion is None:
            raise UserError(f"{path} has no calibrated score; give Module 2's final checkpoint (matcher_ckpt).")
        exported = stable_hlo(scorer, self.batch_size, tuple(dict.fromkeys(self.platforms)))
        metadata = checkpoint.load(path, parts=checkpoint.NETWORK).metadata
        told = {"module": scorer.module, "checkpoint": metadata["digest"], "versions": versions()} | described(exported)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, bytes(exported.serialize()))
            write_whole(out.with_name(out.name + ".json"), json.dumps(told, indent=1) + "\n")
        except OSError as e:
            raise UserError(f"Cannot write {out} ({e.strerror}); give another --out, or make room.") from e
        print(
            f"{out}: {out.stat().st_size / 1e6:.1f} MB for {', '.join(told['platforms'])}; {out.name}.json tells of it"
        )
        return 0


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.export"))
