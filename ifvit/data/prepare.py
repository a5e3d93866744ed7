"""Prints decoded once: every print on its canvas, in files of its database that all readers map."""

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8
from tqdm import tqdm

from ifvit.data import canvases, scale
from ifvit.data.contents import data_digest, sample
from ifvit.data.images import CANVAS_PPI, BrokenImage, read_picture, seems_light, to_canvas
from ifvit.data.sources import SYNTHETIC, Print
from ifvit.data.split import drop_duplicates
from ifvit.devices.cores import cores
from ifvit.errors import UserError

SAMPLE = 50  # prints of a database that are looked at for the colour of their ridges
AHEAD = 256  # prints that are decoded before the first of them is written, at most: canvases in memory
VERSION = 5  # to be raised when a canvas, or a record, changes
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
    rows: tuple[tuple[int, int], ...]  # of each print: which of the files, and which row in them
    files: tuple[canvases.Files, ...]

    def __len__(self):
        return len(self.prints)

    @cached_property
    def _arrays(self):
        return [canvases.load(place) for place in self.files]

    def __getstate__(self):  # a mapped array would be sent whole
        return {k: v for k, v in self.__dict__.items() if k != "_arrays"}

    def canvas(self, i: int) -> tuple[UInt8[np.ndarray, "C C"], Bool[np.ndarray, "C/8 C/8"]]:
        """Canvas (500 ppi, ridges dark) and foreground of print i."""
        file, row = self.rows[i]
        return tuple(array[row] for array in self._arrays[file])

    def subset(self, prints: list[Print]) -> "PrintSet":
        """The given prints of this set, in the given order."""
        row = dict(zip(self.prints, self.rows))
        return PrintSet(tuple(prints), tuple(row[p] for p in prints), self.files)

    def digest(self) -> str:
        """Of files and fingers, not of places: the same data on another host, moved or renamed, is the same."""
        return data_digest(self.prints)

    def sample(self) -> list[str]:
        """Digests of some files, by which a checkpoint tells later that it was trained on them."""
        return sample(self.prints)


@dataclass(frozen=True)
class Decoded:
    """All prints that were found, those that cannot be read too, and what is known of each."""

    everything: PrintSet
    records: tuple[dict, ...]  # of each print, as `_decode_all` has it

    @property
    def broken(self) -> list[tuple[Print, str]]:
        """Prints that cannot be read, and why."""
        return [(p, r["broken"]) for p, r in zip(self.everything.prints, self.records) if "broken" in r]

    @property
    def readable(self) -> list[tuple[Print, dict]]:
        return [(p, r) for p, r in zip(self.everything.prints, self.records) if "broken" not in r]

    def without_copies(self, across: bool) -> tuple[list[Print], list[Print]]:
        """Readable prints, and those left out as copies of prints of other fingers. See `drop_duplicates`."""
        return drop_duplicates([p for p, _ in self.readable], across)


def prepare(
    prints: list[Print], canvas_size: int, max_broken: float, cache_dir: str | os.PathLike, apart: bool = False
) -> PrintSet:
    """Decodes all prints, or finds them decoded in `cache_dir`.

    Unreadable images and byte-identical files of other identities are left out and named in the
    log; `apart`: of other identities of the same database, whose results then do not depend on its
    neighbours. UserError when more than `max_broken` of the images are unreadable, none is readable or
    shows ridges, one has more than 20 megapixels, or the cache cannot be written.
    """
    found = decoded(prints, canvas_size, cache_dir)
    _report_broken([(p.path, why) for p, why in found.broken], len(prints), max_broken)
    if assumed := sorted(p.path for p, r in found.readable if r["ppi_from"] == "assumed"):
        log.info(
            "%d prints tell no resolution and are read at %d ppi, such as %s; --ppi says otherwise",
            len(assumed),
            CANVAS_PPI,
            assumed[0],
        )
    if fitted := sorted(p.path for p, r in found.readable if r["ppi_from"] == scale.ASKED):
        log.info("%d prints are read at the resolution that their ridges tell, such as %s", len(fitted), fitted[0])
    kept, dropped = found.without_copies(across=not apart)
    if dropped:
        log.warning(
            "%d prints are byte-identical to prints of other fingers and are left out, e.g. %s",
            len(dropped),
            dropped[0].path,
        )
    for remark in remarks(found, kept):
        log.warning("%s", remark)
    blank = blank_ones(found, kept)
    if len(blank) == len(kept):
        none = f"None of {len(kept)} prints shows ridges, e.g. {blank[0]}"
        raise UserError(f"{none}. Give their resolution with --ppi, or other prints.")
    return found.everything.subset(kept)


def remarks(found: Decoded, kept: list[Print]) -> list[str]:
    """What looks wrong with prints that can be read, each with a remedy."""
    said = []
    for name, example in seem_light(found).items():
        seem = "dark" if found.everything.prints[0].light else "light"
        what = f"⚠ The ridges of {name} seem to be {seem}, e.g. of {example}"
        said.append(f"{what}; --ridges {seem} reads all prints so.")
    said += scale.remarks((p.database, r) for p, r in found.readable if p.database != SYNTHETIC)
    if blank := blank_ones(found, kept):
        said.append(f"{len(blank)} prints show no ridges: they are blank, too faint or too small, e.g. {blank[0]}")
    return said


def blank_ones(found: Decoded, kept: list[Print]) -> list[str]:
    """The paths of those prints that show no ridges."""
    blank = {p for p, r in found.readable if r["blank"]}
    return [p.path for p in kept if p in blank]


def seem_light(found: Decoded) -> dict[str, str]:
    """Databases of whose prints, those looked at, more than a quarter seem to have the other polarity; an example."""
    looked_at, seem = Counter(), defaultdict(list)
    for p, record in found.readable:
        if record["light"] is not None:
            looked_at[p.database] += 1
            if record["light"]:
                seem[p.database].append(p.path)
    return {name: min(paths) for name, paths in seem.items() if len(paths) > looked_at[name] / 4}


def decoded(prints: list[Print], canvas_size: int, cache_dir: str | os.PathLike) -> Decoded:
    """Every print on its canvas, in the cache: each database has files of its own there, whatever it is read with.

    What is not there, or damaged, is made (again). UserError where the cache cannot be written.
    """
    databases = defaultdict(list)
    for p in prints:
        databases[p.database].append(p)
    folder = Path(cache_dir) / "canvases"
    stems = {name: folder / _key(some, canvas_size) for name, some in databases.items()}
    known = {name: canvases.records(stem, len(databases[name]), canvas_size) for name, stem in stems.items()}
    missing = [name for name, found in known.items() if found is None]
    if missing:
        count = sum(len(databases[name]) for name in missing)
        log.info("Preparing %d prints", count)
        with (
            canvases.writing_to(folder, count * canvas_size**2),
            tqdm(
                total=count,
                desc="prints",
                unit="print",
                file=sys.stderr,
                leave=False,
                dynamic_ncols=True,
                delay=5,
                mininterval=1 if sys.stderr.isatty() else 30,
            ) as bar,
            ThreadPoolExecutor(min(8, cores())) as pool,
        ):
            canvases.remove_abandoned(folder)
            for name in missing:
                # Closed, it ends the pool's work where a write fails.
                with contextlib.closing(_decode_all(databases[name], canvas_size, pool, bar)) as rows:
                    known[name] = canvases.write(stems[name], len(databases[name]), canvas_size, rows)
    places = {name: {p: row for row, p in enumerate(some)} for name, some in databases.items()}
    number = {name: n for n, name in enumerate(databases)}
    rows = [(number[p.database], places[p.database][p]) for p in prints]
    everything = PrintSet(tuple(prints), tuple(rows), tuple(canvases.files(stem) for stem in stems.values()))
    return Decoded(everything, tuple(known[p.database][row] for p, (_, row) in zip(prints, rows)))


def _key(prints: list[Print], canvas_size: int) -> str:
    """Of what the canvases and records of a database depend on: files, and how they are read."""
    try:
        files = [(os.path.abspath(p.path), s.st_size, s.st_mtime_ns) for p in prints for s in [os.stat(p.path)]]
    except OSError as e:
        raise UserError(f"{e.filename} cannot be read: {e.strerror}. Check the path and its rights.") from e
    how = [(p.ppi, p.ppi_from, p.light, p.database == SYNTHETIC) for p in prints]
    return hashlib.sha256(json.dumps([VERSION, canvas_size, files, how]).encode()).hexdigest()[:20]


def _decode_all(
    prints: list[Print], canvas_size: int, pool: ThreadPoolExecutor, bar: tqdm
) -> Iterator[tuple[np.ndarray, np.ndarray, dict]]:
    """Canvas, mask and record of each print of a database, in order; of one that cannot be read an empty canvas.

    The record of a print: path; width and height in px; the ppi it is read at, and ppi_from, what tells that
    ("--ppi", "the set", "file's tag", "assumed", "the ridges"); period, px from ridge to ridge in the file (None: no
    ridges seen), and detail, how fine it is where those are wide (`scale.py`); light, whether its ridges seem light as
    it is read (None: not looked at); note, what else its file holds; blank, whether its mask is empty. Of one that
    cannot be read: path; broken, the reason.
    """
    generated = prints[0].database == SYNTHETIC
    looked_at = set() if generated else set(prints[:: -(-len(prints) // SAMPLE)])
    empty = [np.zeros(shape[1:], kind) for shape, kind in zip(canvases.shapes(1, canvas_size), (np.uint8, bool))]
    fitted: dict[str, float] = {}

    def look(p: Print) -> tuple[dict, np.ndarray | None]:
        try:
            picture = read_picture(p.path)
        except BrokenImage as e:
            return {"path": p.path, "broken": str(e)}, None
        grey = 255 - picture.grey if p.light else picture.grey
        ppi, ppi_from = (fitted[p.path], scale.ASKED) if p.path in fitted else resolution(p, picture.ppi)
        return scale.measured(p.path, grey, ppi, ppi_from) | {
            "light": seems_light(grey, ppi) if p in looked_at else None,
            "note": picture.note,
        }, grey

    def one(p: Print) -> tuple[np.ndarray, np.ndarray, dict]:
        record, grey = look(p)
        if grey is None:
            return *empty, record
        canvas, mask = to_canvas(grey, record["ppi"], canvas_size)
        return canvas, mask, record | {"blank": bool(not mask.any())}

    asked = [p for p in prints if p.ppi_from == scale.ASKED and not generated]
    seen = [record for record, _ in pool.map(look, asked)]
    fitted = scale.fitted((p.database, r) for p, r in zip(asked, seen) if "broken" not in r)
    for at in range(0, len(prints), AHEAD):
        for row in pool.map(one, prints[at : at + AHEAD]):
            bar.update()
            yield row


def resolution(p: Print, tag: float | None) -> tuple[float, str]:
    """The ppi to read a print at, and what tells it."""
    if p.ppi:
        return p.ppi, "the set" if p.ppi_from == scale.ASKED else p.ppi_from
    return (tag, "file's tag") if tag else (CANVAS_PPI, "assumed")


def _report_broken(broken, total, max_broken):
    if not broken:
        return
    names = "; ".join(f"{name} ({why})" for name, why in broken[:5]) + ("; …" if len(broken) > 5 else "")
    what = f"{len(broken)} of {total} images cannot be read: {names}"
    if len(broken) == total or len(broken) > max_broken * total:
        raise UserError(f"{what}. Replace or remove them, or allow more with --set max_broken=1.")
    log.warning("Skipped: %s", what)
