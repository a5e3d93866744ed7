"""Whose finger is it, among generated prints: first impressions enrolled, the other impressions probes.

    python tests/bench/identification.py --root DATA/FVC2002 [--checkpoint CKPT] [--background 10000]

Each finger of each database is enrolled by its first impression, beside so many generated prints that no run sees
unless it asks for their data_seed. Printed are rank-1 by the templates alone, how often the finger is in the shortlist,
rank-1 after the shortlist was compared pairwise, and for each the Wilson interval of 95 % (probes of a finger count as
independent), with the seconds that enrolling and a probe took. Where names tell subjects, the same impression of a
person's fingers is taken together: is the person the likest, is it named, and is another one where its own prints are
taken out.
"""

import math
import sys
import tempfile
import time
from collections import defaultdict
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
from ifvit.gallery.ranking import fingers as likest_fingers
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
    return f"{p:.1%} [{max(low, 0.0):.1%}, {high:.1%}]"


def main(args: Args) -> None:
    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    prints = read_roots([Path(args.root).resolve()])
    with tempfile.TemporaryDirectory() as scratch:
        # The folder is called as the root, whose name may tell the database, or the resolution of the prints.
        root = Path(args.root).resolve()
        folder, gallery, probes = Path(scratch) / "first" / root.name, args.gallery or f"{scratch}/gallery", []
        for fingers in by_finger(prints).values():
            for members in fingers:
                first = first_impression(prints, members)
                there = folder / Path(prints[first].path).relative_to(root)
                there.parent.mkdir(parents=True, exist_ok=True)
                there.symlink_to(Path(prints[first].path).resolve())
                probes += [prints[i] for i in members if i != first]
        made = synthetic.prints(SEED, -(-args.background // IMPRESSIONS), IMPRESSIONS, cache_dir(), workers=cores())
        began = time.perf_counter()
        background = Path(scratch) / "generated"  # the cache's folder may hold more than are asked for
        background.mkdir()
        for file in made[: args.background]:
            (background / file.name).symlink_to(file.resolve())
        for shown in (folder, background):
            Enroll(roots=(str(shown),), gallery=gallery, checkpoint=args.checkpoint).run()
        enrolled = time.perf_counter() - began
        matcher = Matcher.load(args.checkpoint)
        identify = Identify(prints=(), gallery=gallery, checkpoint=args.checkpoint, rescore=args.rescore)
        found = Gallery.open(Path(gallery), matcher.scorer.digest)
        began, by_template, listed, by_pair = time.perf_counter(), 0, 0, 0
        together = defaultdict(list)  # (database, subject, impression) -> what each of these prints was compared with
        for at in range(0, len(probes), AT_ONCE):
            some = probes[at : at + AT_ONCE]
            read = [matcher.read(p.path) for p in some]
            turned = matcher.scorer.templates(Canvases(read), 16, TURNS)
            for p, turns, compared in zip(some, turned, identify.compared(found, matcher.scorer, read)):
                told = likest_fingers(compared)
                if p.subject:
                    together[p.database, p.subject, p.impression].append(compared)
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
        if together:
            tell_of_persons(identify, found, matcher, together)


def tell_of_persons(identify: Identify, gallery: Gallery, matcher: Matcher, together: dict) -> None:
    right = named = wrong = 0
    for (database, subject, _), lists in together.items():
        others = [[c for c in some if c.entry.person != (database, subject)] for some in lists]
        mine, nobodys = (
            identify.persons(gallery, some, matcher.least_fmr, 1)["candidates"][0] for some in (lists, others)
        )
        own = mine["person"] == f"{database}/{subject}"
        right += own
        named += own and mine["decision"] == "match"
        wrong += nobodys["decision"] == "match"
    count, most = len(together), max(map(len, together.values()))
    print(
        f"{count} times a person's fingers together, at most {most}: rank-1 {wilson(right, count)}, named "
        f"{wilson(named, count)}; another person named, their own taken out, {wilson(wrong, count)}"
    )


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
