"""What a gallery keeps of prints, made of their files by a checkpoint: pictures and templates."""

import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from ifvit.data.images import BrokenImage, place, read_bytes, read_picture
from ifvit.data.prepare import resolution
from ifvit.data.single import Canvases, OnCanvas
from ifvit.data.sources import Print
from ifvit.devices.cores import cores
from ifvit.errors import UserError
from ifvit.gallery.pictures import as_png
from ifvit.gallery.store import Entry
from ifvit.scoring.scorer import Scorer


@dataclass(frozen=True)
class File:
    """A print and what its file holds, so that another host needs no way to the file."""

    print: Print
    data: bytes

    @classmethod
    def read(cls, p: Print) -> "File":
        return cls(p, read_bytes(p.path))


@dataclass(frozen=True)
class Made:
    """Entries of a gallery with their templates, a row each, and why prints were left out."""

    entries: list[Entry]
    templates: Float32[np.ndarray, "N E"]
    left_out: list[str]


def make(scorer: Scorer, batch_size: int, files: Sequence[File]) -> Made:
    """The entries of some prints; those that are broken, or show no ridges, are left out.

    UserError for a file that needs a package that is missing, or is too large.
    """

    def one(file: File) -> tuple[Entry, OnCanvas] | str:
        p = file.print
        try:
            picture = read_picture(p.path, data=file.data)
        except BrokenImage as e:
            return str(e)
        grey = 255 - picture.grey if p.light else picture.grey
        seen = OnCanvas(p.path, *place(grey, resolution(p, picture.ppi)[0], scorer.config.canvas_size))
        if not seen.mask.any():
            return f"{p.path} shows no ridges"
        digest = hashlib.sha256(file.data).hexdigest()
        png = as_png(seen.canvas, seen.mask)
        return Entry(p.path, digest, p.database, p.finger, png, p.subject), seen

    with ThreadPoolExecutor(min(8, cores())) as pool:
        found = list(pool.map(one, files))
    made = [x for x in found if not isinstance(x, str)]
    templates = np.zeros((len(made), 0), np.float32)
    if scorer.template_size:
        templates = scorer.templates(Canvases([seen for _, seen in made]), batch_size)[:, 0]
    return Made([entry for entry, _ in made], templates, [why for why in found if isinstance(why, str)])


def make_there(checkpoint: str, digest: str, batch_size: int, files: Sequence[File]) -> Made:
    """`make` in another process, which reads the checkpoint once. UserError where it is not the one with `digest`."""
    return make(_scorer(checkpoint, digest), batch_size, files)


@functools.cache
def _scorer(checkpoint: str, digest: str) -> Scorer:
    from ifvit import cli
    from ifvit.devices.sharding import use_cpu_cores
    from ifvit.paths import cache_dir

    use_cpu_cores()
    cli.use_compilation_cache(cache_dir() / "compiled")
    scorer = Scorer.from_checkpoint(checkpoint)
    if scorer.digest != digest:
        raise UserError(f"{checkpoint} is another checkpoint on another host; every host needs the same.")
    return scorer
