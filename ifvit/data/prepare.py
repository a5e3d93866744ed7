"""Prints decoded once: every print of a run on its canvas, in one file that all readers map."""

import hashlib
import json
import logging
import os
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ifvit.data.images import CANVAS_PPI, BrokenImage, decode, print_ppi, seems_light, to_canvas
from ifvit.data.sources import SYNTHETIC, Print, drop_duplicates
from ifvit.errors import UserError

SAMPLE = 50  # prints of a database that are looked at for the colour of their ridges
VERSION = 1  # to be raised when a canvas changes
log = logging.getLogger("ifvit")


@runtime_checkable
class Prints(Protocol):
    """Prints whose canvases can be had: a PrintSet, or a few in memory."""

    prints: tuple[Print, ...]

    def canvas(self, i: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class PrintSet:
    """N prints and the files their canvases lie in; cheap to send to another process."""

    prints: tuple[Print, ...]
    rows: tuple[int, ...]  # of each print in the files
    canvas_file: str       # (rows, C, C) uint8, 500 ppi, ridges dark
    mask_file: str         # (rows, C/8, C/8) bool, foreground

    def __len__(self):
        return len(self.prints)

    @cached_property
    def _arrays(self):
        return np.load(self.canvas_file, mmap_mode="r"), np.load(self.mask_file, mmap_mode="r")

    def __getstate__(self):  # a mapped array would be sent whole
        return {k: v for k, v in self.__dict__.items() if k != "_arrays"}

    def canvas(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Canvas (C, C) uint8 and foreground (C/8, C/8) bool of print i."""
        canvases, masks = self._arrays
        return canvases[self.rows[i]], masks[self.rows[i]]

    def subset(self, prints: list[Print]) -> "PrintSet":
        """The given prints of this set, in the given order."""
        row = dict(zip(self.prints, self.rows))
        return PrintSet(tuple(prints), tuple(row[p] for p in prints), self.canvas_file, self.mask_file)

    def digest(self) -> str:
        """Of names and identities, not of places: the same data on another host, or moved, is the same."""
        names = sorted((p.database, p.finger, p.impression) for p in self.prints)
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def prepare(prints: list[Print], canvas_size: int, max_broken: float, cache_dir: str | Path, apart: bool = False) -> PrintSet:
    """Decodes all prints, or finds them decoded in `cache_dir`.

    Unreadable images and byte-identical files of other identities are left out and named in the
    log; `apart`: of other identities of the same database, whose results then do not depend on its
    neighbours. UserError when more than `max_broken` of the images are unreadable, none is readable or
    shows ridges, or one has more than 20 megapixels.
    """
    stats = [(p, os.stat(p.path)) for p in prints]
    key = hashlib.sha256(json.dumps(
        [VERSION, canvas_size, [[asdict(p), s.st_size, s.st_mtime_ns] for p, s in stats]]).encode()).hexdigest()[:20]
    folder = Path(cache_dir) / "canvases"
    done = folder / f"{key}.json"
    if not done.is_file():
        _decode_all(prints, canvas_size, folder, key)
    report = json.loads(done.read_text())
    _report_broken(report["broken"], len(prints), max_broken)
    broken = {name for name, _ in report["broken"]}
    readable = [p for p in prints if p.path not in broken]
    rows = {p.path: i for i, p in enumerate(readable)}
    if assumed := report.get("assumed"):
        log.info("%d prints tell no resolution and are read at %d ppi, such as %s; --ppi says otherwise",
                 len(assumed), CANVAS_PPI, assumed[0])
    for name, example in report.get("seem_light", {}).items():
        seem = "dark" if prints[0].light else "light"
        log.warning("⚠ The ridges of %s seem to be %s, e.g. of %s; --ridges %s reads all prints so.", name, seem, example, seem)
    kept, dropped = drop_duplicates(readable, across=not apart)
    if dropped:
        log.warning("%d prints are byte-identical to prints of other fingers and are left out, e.g. %s",
                    len(dropped), dropped[0].path)
    masks = np.load(folder / f"{key}.mask.npy", mmap_mode="r")
    if blank := [p.path for p in kept if not masks[rows[p.path]].any()]:
        if len(blank) == len(kept):
            raise UserError(f"None of {len(kept)} prints shows ridges, e.g. {blank[0]}. Give their resolution with --ppi, or other prints.")
        log.warning("%d prints show no ridges: they are blank, too faint or too small, e.g. %s", len(blank), blank[0])
    return PrintSet(tuple(kept), tuple(rows[p.path] for p in kept), str(folder / f"{key}.canvas.npy"),
                    str(folder / f"{key}.mask.npy"))


def _decode_all(prints, canvas_size, folder, key):
    log.info("Preparing %d prints", len(prints))
    folder.mkdir(parents=True, exist_ok=True)

    def one(p: Print):
        try:
            grey, tag = decode(p.path)
            if not (p.ppi or tag):
                assumed.append(p.path)
            if p.light:
                grey = 255 - grey
            if p in sample and seems_light(grey, print_ppi(p.ppi, tag)):
                light[p.database].append(p.path)
            return to_canvas(grey, print_ppi(p.ppi, tag), canvas_size)
        except BrokenImage as e:
            return str(e)

    broken, assumed, light, count = [], [], defaultdict(list), 0
    databases = defaultdict(list)
    for p in prints:
        databases[p.database].append(p)
    sample = {p for name, some in databases.items() if name != SYNTHETIC for p in some[:: -(-len(some) // SAMPLE)]}
    mine = uuid.uuid4().hex  # another process, of another host that shares the cache, may be at it too
    parts = [folder / f"{key}.{kind}.npy.{mine}" for kind in ("canvas", "mask")]
    try:
        canvases = np.lib.format.open_memmap(parts[0], "w+", np.uint8, (len(prints), canvas_size, canvas_size))
        masks = np.lib.format.open_memmap(parts[1], "w+", bool, (len(prints), canvas_size // 8, canvas_size // 8))
        with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
            for p, result in zip(prints, pool.map(one, prints)):
                if isinstance(result, str):
                    broken.append((p.path, result))
                else:
                    canvases[count], masks[count] = result
                    count += 1
        canvases.flush(), masks.flush()
        os.replace(parts[0], folder / f"{key}.canvas.npy")
        os.replace(parts[1], folder / f"{key}.mask.npy")
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    record = folder / f"{key}.json.{mine}"  # last: its presence says that the rest is whole
    record.write_text(json.dumps({"broken": broken, "assumed": sorted(assumed), "seem_light": {
        name: min(some) for name, some in light.items() if len(some) > sum(p.database == name for p in sample) / 4}}))
    os.replace(record, folder / f"{key}.json")


def _report_broken(broken, total, max_broken):
    if not broken:
        return
    names = "; ".join(f"{name} ({why})" for name, why in broken[:5]) + ("; …" if len(broken) > 5 else "")
    what = f"{len(broken)} of {total} images cannot be read: {names}"
    if len(broken) == total or len(broken) > max_broken * total:
        raise UserError(f"{what}. Replace or remove them, or allow more with --set max_broken=1.")
    log.warning("Skipped: %s", what)
