"""Whose finger is it, among generated prints: first impressions enrolled, the other impressions probes.

    python tests/bench/identification.py --root DATA/FVC2002 [--checkpoint CKPT] [--background 10000]

Each finger of each database is enrolled by its first impression, beside so many generated prints that no run sees
unless it asks for their data_seed. Printed are rank-1 by the templates alone, how often the finger is in the shortlist,
rank-1 after the shortlist was compared pairwise, and for each the Wilson interval of 95 % (probes of a finger count as
independent), with the seconds that enrolling and a probe took.
"""

import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from ifvit import cli
from ifvit.data import synthetic
from ifvit.data.protocols import by_finger, first_impression
from ifvit.data.single import Canvases
from ifvit.data.sources import read_roots
from ifvit.devices.cores import cores
from ifvit.devices.sharding import use_cpu_cores
from ifvit.enroll import Args as Enroll
from ifvit.gallery.store import Gallery
from ifvit.identify import TURNS
from ifvit.identify import Args as Identify
from ifvit.matcher import Matcher
from ifvit.paths import cache_dir

SEED, IMPRESSIONS = 7001, 8
AT_ONCE = 40  # probes, whose shortlists are compared together


@dataclass(frozen=True)
class Args:
    root: str
    checkpoint: str = "pretrained"
    background: int = 10_000
    rescore: int = 50
    gallery: str = ""
    """where it is kept for another run; a folder that is removed"""


def wilson(hits: int, count: int) -> str:
    p, z = hits / count, 1.96
    middle, half = p + z * z / 2 / count, z * math.sqrt(p * (1 - p) / count + z * z / 4 / count**2)
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return f"{p:.1%} [{low:.1%}, {high:.1%}]"


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    prints = read_roots([args.root])
    with tempfile.TemporaryDirectory() as scratch:
        folder, gallery, probes = Path(scratch) / "first", args.gallery or f"{scratch}/gallery", []
        for fingers in by_finger(prints).values():
            for members in fingers:
                first = first_impression(prints, members)
                there = folder / Path(prints[first].path).relative_to(args.root)
                there.parent.mkdir(parents=True, exist_ok=True)
                there.symlink_to(Path(prints[first].path).resolve())
                probes += [prints[i] for i in members if i != first]
        made = synthetic.prints(SEED, -(-args.background // IMPRESSIONS), IMPRESSIONS, cache_dir(), workers=cores())
        began = time.perf_counter()
        for root in (folder, made[0].parent):
            Enroll(roots=(str(root),), gallery=gallery, checkpoint=args.checkpoint).run()
        enrolled = time.perf_counter() - began
        matcher = Matcher.load(args.checkpoint)
        identify = Identify(prints=(), gallery=gallery, checkpoint=args.checkpoint, rescore=args.rescore)
        found = Gallery.open(Path(gallery), matcher.scorer.digest)
        began, by_template, listed, by_pair = time.perf_counter(), 0, 0, 0
        for at in range(0, len(probes), AT_ONCE):
            some = probes[at : at + AT_ONCE]
            read = [matcher.read(p.path) for p in some]
            turned = matcher.scorer.templates(Canvases(read), 16, TURNS)
            for p, turns, told in zip(some, turned, identify.candidates(found, matcher.scorer, read)):
                own = f"{p.database}/{p.finger}"
                (likest,) = found.likest(turns, 1)
                by_template += f"{likest.database}/{likest.finger}" == own
                listed += own in {c["finger"] for c in told}
                by_pair += told[0]["finger"] == own
        seconds = (time.perf_counter() - began) / len(probes)
        count = len(probes)
        print(
            f"{count} probes of {len({p.identity for p in probes})} fingers, {len(found)} enrolled prints\n"
            f"rank-1 by the templates {wilson(by_template, count)}\nin the shortlist of {args.rescore} "
            f"{wilson(listed, count)}\nrank-1 after it was compared {wilson(by_pair, count)}\n"
            f"enrolled in {enrolled:.0f} s; {seconds:.2f} s a probe, {AT_ONCE} at once"
        )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
