"""Enrols folders of prints in a gallery, for python -m ifvit.identify.

python -m ifvit.enroll DIR [DIR …] --gallery G [--checkpoint CKPT]
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cluster.host import ClusterError
from cluster.job import Request
from ifvit import cli
from ifvit.errors import UserError
from ifvit.evaluate import check_ppi
from ifvit.paths import cache_dir, resolve

if TYPE_CHECKING:
    from ifvit.data.sources import Print
    from ifvit.gallery.making import Made
    from ifvit.gallery.store import Gallery
    from ifvit.matcher import Matcher

log = logging.getLogger("ifvit")
AT_ONCE = 64  # prints of one transaction: what a kill costs
NAMED = 10  # prints that are left out, at most


@dataclass(frozen=True)
class Args:
    """Enrols the prints of folders; those that are enrolled already are passed over."""

    roots: Annotated[tuple[str, ...], tyro.conf.Positional]
    """folders of prints, as --dataset_root of the training commands takes them"""
    gallery: str = ""
    """its folder; made where it is not there"""
    checkpoint: str | None = None
    """Module 2's final checkpoint, or one of Module 1 [./checkpoints/matcher/matcher_ckpt, else `pretrained`]"""
    replace: bool = False
    """where a file has another content than the one that was enrolled under its name, take the new one"""
    batch_size: int = 16
    """prints at once"""
    ppi: float | Literal["auto"] | None = None
    """resolution of all prints, whatever files and sets tell; `auto`: what they tell, unless the ridges tell another"""
    ridges: Literal["dark", "light"] = "dark"
    """in the prints' images; `light` of sensors that show them white on black"""
    names: str = ""
    """how to read paths below the folder, without extension: '{database}/{finger}_{impression}' [known sets' names]"""
    runtime: Literal["auto", "local", "ray"] = "auto"
    """`local`: this process; `ray`: the hosts of RAY_ADDRESS share the prints; `auto`: `ray` with RAY_ADDRESS"""
    devices: Literal["auto", "gpu", "tpu", "cpu"] = "auto"
    """of Ray's workers; `auto`: what the cluster has now"""
    workers_per_host: int = 0
    """of Ray [one, with all the host has]"""
    wait_for_hosts: float = Request.wait_for_hosts
    """seconds that a cluster gets to have a host"""

    def run(self) -> int:
        check_ppi(self.ppi)
        if not self.gallery:
            raise UserError("--gallery is needed, the folder of the gallery.")
        if not self.roots:
            raise UserError("No folder is named; give one or more: python -m ifvit.enroll DIR --gallery G.")
        if self.batch_size < 1:
            raise UserError(f"--batch_size is {self.batch_size}; give at least 1.")
        request = self.request()
        from ifvit.data.gather import local_root
        from ifvit.data.sources import read
        from ifvit.devices.sharding import use_cpu_cores
        from ifvit.gallery.store import Gallery
        from ifvit.matcher import Matcher

        prints = read([local_root(r) for r in self.roots], self.ppi, self.ridges, self.names).prints
        use_cpu_cores()
        cli.use_compilation_cache(cache_dir() / "compiled")
        matcher = Matcher.load(self.checkpoint)
        scorer = matcher.scorer
        gallery = Gallery.create(Path(resolve(self.gallery)), scorer.digest, scorer.template_size)
        if not scorer.template_size:
            log.info(
                "This checkpoint makes no template of one print: a probe will be compared with all enrolled prints."
            )
        todo = self.new(gallery, prints)
        enrolled = self.enroll(gallery, self.made(matcher, todo, request), len(todo)) if todo else 0
        print(
            f"{enrolled} prints enrolled, {len(prints) - len(todo)} were already, {len(todo) - enrolled} left out; "
            f"{self.gallery} has {len(gallery)} prints of {gallery.fingers} fingers"
        )
        return 0

    def new(self, gallery: "Gallery", prints: list["Print"]) -> list["Print"]:
        """Those that are not enrolled, under whatever name. UserError for a name that stands for another content."""
        from ifvit.data.walk import file_digest

        known = gallery.known([p.path for p in prints])
        differ = [p for p in prints if known.get(p.path) != file_digest(p.path)]
        todo = [p for p in differ if p.path in known or not gallery.has(file_digest(p.path))]
        if not self.replace and (changed := [p.path for p in todo if p.path in known]):
            raise UserError(
                f"{changed[0]} is enrolled with another content; give --replace to take the new one of "
                f"{len(changed)} such prints."
            )
        return todo

    def request(self) -> Request:
        """Where the prints are to be worked on; UserError where the flags make no sense."""
        try:
            request = Request(self.runtime, "", self.wait_for_hosts, self.devices, self.workers_per_host)
            request.on_ray()
        except ClusterError as e:
            raise UserError(str(e)) from None
        return request

    def made(self, matcher: "Matcher", todo: list["Print"], request: Request) -> Iterator["Made"]:
        """What is to be enrolled, some prints at a time; on Ray in the order in which hosts are done."""
        from ifvit.commands import JOB
        from ifvit.data.prepare import decoded
        from ifvit.devices.cores import cores
        from ifvit.gallery.making import File, make, make_there

        if self.ppi == "auto":  # the ridges of all prints of a database tell
            records = decoded(todo, matcher.scorer.config.canvas_size, cache_dir()).records
            todo = [replace(p, ppi=r.get("ppi"), ppi_from="--ppi") for p, r in zip(todo, records)]
        pieces = ([File.read(p) for p in todo[at : at + AT_ONCE]] for at in range(0, len(todo), AT_ONCE))
        if not request.on_ray():
            yield from map(partial(make, matcher.scorer, self.batch_size), pieces)
            return
        from cluster.tasks import results

        there = partial(make_there, matcher.checkpoint, matcher.scorer.digest, self.batch_size)
        try:
            yield from results(there, pieces, request, cores(), JOB["variables"])
        except ClusterError as e:
            raise UserError(str(e)) from None

    def enroll(self, gallery: "Gallery", found: Iterator["Made"], count: int) -> int:
        """How many of `count` prints were enrolled: others cannot be read, or show no ridges, as the log says."""
        from ifvit.bar import bar

        enrolled = left_out = 0
        with bar("enrolling", count, "print") as shown, closing(found):
            for made in found:
                gallery.add(made.entries, made.templates, self.replace)
                enrolled += len(made.entries)
                for why in made.left_out[: max(0, NAMED - left_out)]:
                    log.warning("Left out: %s", why)
                left_out += len(made.left_out)
                shown.update(len(made.entries) + len(made.left_out))
        return enrolled


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.enroll", huge_pages=True))
