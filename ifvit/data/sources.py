"""Which prints some folders hold: the file, the finger it is of, the ppi it is at.

Sets are known by their files' names (`ifvit.data.names`). Names that carry no finger are read as
`DATABASE/FINGER/IMPRESSION.ext`; `names` tells how others are to be read (`ifvit.data.pattern`).
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ifvit.data.doubts import doubts
from ifvit.data.names import FOLDERS, LATENT, SLAP, Name, hand_and_finger, in_words, nfc, read_name
from ifvit.data.parts import absolute, common_top, without_parts
from ifvit.data.pattern import Pattern
from ifvit.data.places import Found, settle
from ifvit.data.walk import EXTENSIONS, LeftOut, Walk, file_digest, natural, walk, warnings
from ifvit.errors import UserError

SYNTHETIC = "synthetic"  # database of the generated prints
MISFIT, COPY, UNFIT = "no known set's name", "further copy of an impression", "does not fit --names"

log = logging.getLogger("ifvit")


@dataclass(frozen=True)
class Print:
    """One impression of one finger, in a file."""

    path: str
    database: str
    finger: str  # never the person: ten fingers of a person are ten identities
    impression: str
    ppi: float | None  # None: the file's tag where it can be believed, else 500
    altered: bool = False  # SOCOFing's alterations: no second impression for evaluation
    light: bool = False  # its ridges, and its valleys dark
    subject: str = field(default="", compare=False)  # whose finger it is; '' where that is not told
    # What tells `ppi`: "--ppi" or "the set"; "the ridges": the set, and its ridges are to tell where that is wrong.
    ppi_from: str = field(default="the set", compare=False)

    @property
    def identity(self) -> tuple[str, str]:
        return self.database, self.finger


@dataclass(frozen=True)
class Reading:
    """What some folders are read as."""

    prints: list[Print]  # by database, finger and impression in natural order
    left_out: tuple[LeftOut, ...]
    layouts: dict[str, str]  # of each database: which names it was known by


def read_root(root: str | os.PathLike, ppi: float | Literal["auto"] | None = None) -> list[Print]:
    """The prints under one folder. See `read`."""
    return read_roots([root], ppi)


def read_roots(
    roots: Iterable[str | os.PathLike],
    ppi: float | Literal["auto"] | None = None,
    ridges: str = "dark",
    names: str = "",
) -> list[Print]:
    """The prints under some folders. See `read`."""
    return read(roots, ppi, ridges, names).prints


def read(
    roots: Iterable[str | os.PathLike],
    ppi: float | Literal["auto"] | None = None,
    ridges: str = "dark",
    names: str = "",
) -> Reading:
    """The prints under some folders, by database, finger and impression in natural order.

    A file that is reached twice counts once. A database is named by its folder; where
    two have one name, they and their neighbours get the parent folder's before it. Files
    that fit no known set, beside ones that do, are left out with a warning. `ppi`
    overrides what is known of a set, `auto` where the ridges tell another; `ridges`: dark
    or light, in the images; `names`: a pattern in place of all that is known.

    Raises: UserError for a root that is missing, a file, empty, or holds no print known;
    for a pattern that is none, fits nothing or makes one finger of all.
    """
    roots = [Path(root) for root in roots]
    pattern = Pattern(names) if names else None
    top = common_top(roots)
    found: list[Found] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    for root in roots:
        met = walk(root)
        kept, misfits = _by_pattern(root, met, pattern) if pattern else _by_name(root, met, top)
        for line in warnings(root, met.left_out):
            log.warning("%s", line)
        left_out += met.left_out + misfits
        for f in kept:
            if (real := os.path.realpath(f.path)) not in seen:
                seen.add(real)
                found.append(f)
    told = [] if pattern else settle(found, top)
    best, copies, apart = _best(found)
    if copies:
        # A card scanned at three ppi, or a print stored as tif and png, is one impression.
        log.warning(
            "%d files left out: further copies of an impression, at another ppi or in another format", len(copies)
        )
    left_out += [LeftOut(str(f.path), COPY) for f in copies]
    if apart:
        log.warning(
            "%d files are named as another impression of their finger and are not the same, such as %s and %s: they "
            "are taken for further impressions. Where they are of other fingers, say so with --names.",
            len(apart),
            *(f.path for f in apart[0]),
        )
    if not pattern:
        told += doubts(best)
    for line in told:
        log.warning("%s", line)
    databases = _database_names({f.anchor for f in best})
    number, ppi_from = (None, "the ridges") if ppi == "auto" else (ppi, "--ppi" if ppi else "the set")
    prints = [
        Print(
            str(f.path),
            databases[f.anchor],
            f.finger,
            f.impression,
            number or f.name.ppi,
            f.name.altered,
            ridges == "light",
            f.subject,
            ppi_from,
        )
        for f in best
    ]
    prints.sort(key=lambda p: [natural(v) for v in (p.database, p.finger, p.impression, p.path)])
    if pattern and len(prints) > 1 and len({p.identity for p in prints}) == 1:
        raise UserError(
            f"By --names '{names}' all {len(prints)} prints are of one finger, {prints[0].finger!r}, such as "
            f"{prints[0].path} and {prints[-1].path}. Put {{finger}} where they differ."
        )
    return Reading(prints, tuple(left_out), {databases[f.anchor]: f.name.layout for f in best})


def _by_pattern(root: Path, met: Walk, pattern: Pattern) -> tuple[list[Found], list[LeftOut]]:
    """Every image that fits, and the others."""
    found, misfits = [], []
    base, _ = without_parts(absolute(root), absolute(root))
    for folder, files in met.images.items():
        for file in files:
            path = folder / file
            if fit := pattern.fit(nfc(path.relative_to(root).with_suffix("").as_posix())):
                database, finger, impression, subject = fit
                known = read_name(Path(os.path.abspath(path)))
                name = Name("--names", finger, impression, known and known.ppi, bool(known and known.altered))
                anchor = Path(os.sep, database) if database else base
                found.append(Found(path, name, anchor, finger, impression, subject))
            else:
                misfits.append(LeftOut(str(path), UNFIT))
    if not found:
        if not misfits:
            raise UserError(_nothing_known(root, met, []))
        example = Path(misfits[0].path).relative_to(root).with_suffix("").as_posix()
        raise UserError(
            f"--names '{pattern.text}' fits none of the {len(misfits)} images under {root}; a path below it is "
            f"'{example}'. Give a pattern of such paths, without the extension; **/ stands for any folders."
        )
    if misfits:
        log.warning(
            "%s: %d files left out, they do not fit --names '%s', such as %s",
            root,
            len(misfits),
            pattern.text,
            misfits[0].path,
        )
    return found, misfits


def _by_name(root: Path, met: Walk, top: Path) -> tuple[list[Found], list[LeftOut]]:
    """Every print under `root` by the names of known sets, or by folders; and what is left out."""
    read, nameless, misfits, unfit = [], [], [], []
    for folder, files in met.images.items():
        layout, names = _names_in(folder, files)
        if layout == FOLDERS:
            nameless.append((folder, files))
            continue
        for file in files:
            if names[file] and names[file].layout == layout:
                read.append(Found(folder / file, names[file]))
            else:
                misfits.append(folder / file)
    short = {folder: without_parts(absolute(folder), top)[0] for folder in met.images}
    floor = without_parts(top, top)[0]
    named = {short[f.path.parent].parent for f in read}
    above = {parent for place in short.values() for parent in place.parents}
    by_folder = []
    for folder, files in nameless:
        place = short[folder]
        if place == floor or place in above or place.parent in named:  # no finger's folder
            misfits += [folder / file for file in files]
        else:
            by_folder += [Found(folder / file, Name(FOLDERS, None, nfc(Path(file).stem))) for file in files]
    if by_folder:
        fingers = {short[f.path.parent] for f in by_folder}
        log.info(
            "%s: the names of %d files tell no finger, so each of their %d folders is taken for one, such as %s",
            root,
            len(by_folder),
            len(fingers),
            by_folder[0].path.parent,
        )
    for f in read:
        if f.name.finger is None:
            unfit.append(LeftOut(str(f.path), f.name.why))
    kept = [f for f in read if f.name.finger is not None] + by_folder
    if not kept:
        raise UserError(_nothing_known(root, met, misfits + [f.path for f in read]))
    for why in (SLAP, LATENT):
        if paths := [x.path for x in unfit if x.reason == why]:
            log.info("%s: %d files left out, each %s, such as %s", root, len(paths), why, paths[0])
    if misfits:
        log.warning("%s: %d files left out, their names fit no known set, such as %s", root, len(misfits), misfits[0])
    return kept, unfit + [LeftOut(str(path), MISFIT) for path in misfits]


def _names_in(folder: Path, files: list[str]) -> tuple[str, dict[str, Name | None]]:
    """The layout that most of a folder's files have, and what each file's name says."""
    place = Path(os.path.abspath(folder))  # as it is: some names are understood with a look into the file
    names = {file: read_name(place / file) for file in files}
    layouts = Counter(name.layout for name in names.values() if name)
    if not layouts:
        words = {file: in_words(Path(file).stem) for file in files}
        fingers = {name.finger for name in words.values() if name}
        whole = any("_" in finger for finger in fingers)  # hand and finger
        if (whole or len(fingers) > 1) and fingers != {hand_and_finger(place.name)[0]}:
            names, layouts = words, Counter(name.layout for name in words.values() if name)
    return (layouts.most_common(1)[0][0] if layouts else FOLDERS), names


def _best(found: list[Found]) -> tuple[list[Found], list[Found], list[tuple[Found, Found]]]:
    """Of each impression the file that is nearest to 500 ppi; further copies; and what only seems one.

    A file that lies in two parts of a set, the same to the byte, is a copy. One that has an impression's name, kind and
    ppi and other bytes is a print of its own, and comes with the other one.
    """
    kept, copies, apart = [], [], []
    for some in _grouped(found, lambda f: (f.anchor, f.finger, f.impression)):
        first, *others = sorted(some, key=lambda f: abs((f.name.ppi or 500) - 500))
        ours = [first]
        for f in others:
            if (f.path.suffix.lower(), f.name.ppi) != (first.path.suffix.lower(), first.name.ppi) or _same_bytes(
                f, ours
            ):
                copies.append(f)
            else:
                ours.append(f)
                f.impression += f" ({len(ours)})"
                apart.append((first, f))
        kept += ours
    once = []
    for some in _grouped(kept, lambda f: (f.anchor, f.finger, nfc(f.path.name))):
        for k, f in enumerate(some):
            (copies if _same_bytes(f, some[:k]) else once).append(f)
    return once, copies, apart


def _grouped(found: list[Found], key) -> list[list[Found]]:
    groups = defaultdict(list)
    for f in found:
        groups[key(f)].append(f)
    return list(groups.values())


def _same_bytes(f: Found, others: list[Found]) -> bool:
    size = f.path.stat().st_size if others else 0
    return any(o.path.stat().st_size == size and file_digest(o.path) == file_digest(f.path) for o in others)


def _nothing_known(root: Path, met: Walk, images: list[Path]) -> str:
    counts = met.others + Counter(p.suffix.lower() for p in images)
    refused = "; ".join(warnings(root, met.left_out))
    if not counts:
        return (
            f"{root} is empty. Give --dataset_root a folder that holds prints."
            if not refused
            else f"{root} holds no print: {refused}"
        )
    kinds = ", ".join(f"{n} {e}" for e, n in counts.most_common())
    example = f", with names such as {images[0].name}" if images else ""
    unpack = " Unpack the archives." if any("archive" in x.reason for x in met.left_out) else ""
    return (
        f"{root} holds no print that is known, only {counts.total()} files: {kinds}"
        f"{example}.{unpack} Name prints FINGER_IMPRESSION.ext, put them in one folder a finger, or say how their "
        f"names are to be read, such as --names '{{finger}}-{{impression}}'; images end in "
        f"{' '.join(sorted(EXTENSIONS))}."
    )


def _database_names(anchors: set[Path]) -> dict[Path, str]:
    """The last parts of each folder's path, as many as tell it from the others."""
    depth = dict.fromkeys(anchors, 1)
    while True:
        names = {a: "/".join(a.parts[-depth[a] :]) for a in anchors}
        count = Counter(names.values())
        # Neighbours of one that needs its parent's name get it too: FVC2002/DB4_B. SYNTHETIC is the generated prints'
        # name.
        crowded = {a.parent for a in anchors if count[names[a]] > 1 or names[a] == SYNTHETIC}
        if not crowded:
            return names
        for anchor in anchors:
            depth[anchor] += anchor.parent in crowded
