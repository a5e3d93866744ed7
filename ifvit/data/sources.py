"""Which prints a folder holds: the file, the finger it is of, the ppi it is at.

Sets are known by their files' names: FVC, CrossMatch, PolyU HRF, CASIA, SOCOFing, NIST SD4,
SD300, SD301 and SD302. Names that carry no finger are read as `DATABASE/FINGER/IMPRESSION.ext`.
"""

import hashlib
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ifvit.errors import UserError

SYNTHETIC = "synthetic"  # database of the generated prints
EXTENSIONS = {".tif", ".tiff", ".png", ".bmp", ".jpg", ".jpeg", ".wsq"}

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
    ppi_from: str = field(default="the set", compare=False)  # what tells `ppi`: "--ppi" or "the set"; "the ridges": the
    #                                                          set, and its ridges are to tell where that is wrong

    @property
    def identity(self) -> tuple[str, str]:
        return self.database, self.finger


def read_root(root: str | Path, ppi: float | Literal["auto"] | None = None) -> list[Print]:
    """The prints under one folder. See `read_roots`."""
    return read_roots([root], ppi)


def read_roots(roots: Iterable[str | Path], ppi: float | Literal["auto"] | None = None,
               ridges: str = "dark") -> list[Print]:
    """The prints under some folders, by database, finger and impression in natural order.

    A file that is reached twice counts once. A database is named by its folder; where
    two have one name, they and their neighbours get the parent folder's before it. Files
    that fit no known set, beside ones that do, are left out with a warning. `ppi`
    overrides what is known of a set, `auto` where the ridges tell another; `ridges`: dark or light, in the images.

    Raises: UserError for a root that is missing, a file, empty, or holds no print known.
    """
    found: list[tuple[_Name, str]] = []
    seen: set[str] = set()
    for root in roots:
        found += _read_folders(Path(root), seen)
    names = _database_names({name.anchor for name, _ in found})
    best = {}
    for name, path in found:
        key = (name.anchor, name.finger, name.impression)
        if key not in best or name.off_500 < best[key][0].off_500:
            best[key] = name, path
    if len(best) < len(found):
        # A card scanned at three ppi, or a print stored as tif and png, is one impression.
        log.warning("%d files left out: further copies of an impression, at another ppi "
                    "or in another format", len(found) - len(best))
    number, ppi_from = (None, "the ridges") if ppi == "auto" else (ppi, "--ppi" if ppi else "the set")
    prints = [
        Print(path, names[n.anchor], n.finger, n.impression, number or n.ppi, n.altered, ridges == "light", ppi_from)
        for n, path in best.values()
    ]
    return sorted(prints, key=lambda p: [
        _natural(v) for v in (p.database, p.finger, p.impression, p.path)])


def split_by_finger(
    prints: Sequence[Print], held_out: float, seed: int
) -> tuple[list[Print], list[Print]]:
    """Training prints and held-out ones; no finger is in both.

    In every database the fingers are ranked by a digest of (seed, identity) and the
    first ceil(held_out * n) held out, at least two so that there are impostor pairs, and
    at least two left. Databases of fewer than four fingers are ranked together. So a larger
    database's split does not change when others are added.

    Raises: ValueError unless 0 <= held_out < 1.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}, a fraction in [0, 1) is needed")
    fingers = defaultdict(set)
    for p in prints:
        fingers[p.database].add(p.finger)
    groups = defaultdict(list)
    for database, members in fingers.items():
        groups[database if len(members) >= 4 else None] += [(database, f) for f in members]

    def rank(member: tuple[str, str]) -> tuple:
        # The folder's own name only: the prefix comes and goes with the other roots.
        key = f"{seed}\0{member[0].rpartition('/')[2]}\0{member[1]}"
        return hashlib.sha256(key.encode(errors="surrogateescape")).digest(), member

    out = set()
    for members in groups.values():
        if held_out and len(members) >= 4:
            count = min(max(2, math.ceil(held_out * len(members))), len(members) - 2)
            out.update(sorted(members, key=rank)[:count])
    train = [p for p in prints if p.identity not in out]
    return train, [p for p in prints if p.identity in out]


def drop_duplicates(prints: Sequence[Print], across: bool = True) -> tuple[list[Print], list[Print]]:
    """Kept and dropped: of files equal to the byte under different fingers, the first stays.

    They would be a genuine pair that is labelled impostor. `across`: databases; else a copy in another one does not count.
    """
    owner: dict[tuple, tuple[str, str]] = {}
    kept, dropped = [], []
    for p in prints:
        digest = hashlib.sha256(Path(p.path).read_bytes()).digest()
        same_finger = owner.setdefault((digest, None if across else p.database), p.identity) == p.identity
        (kept if same_finger else dropped).append(p)
    return kept, dropped


def require_fingers(prints: Sequence[Print]) -> None:
    """Raises UserError unless there are two fingers: one has no impostor."""
    fingers = {p.identity for p in prints}
    if len(fingers) < 2:
        which = f"one finger, {'/'.join(fingers.pop())}" if fingers else "no finger"
        raise UserError(
            f"The prints are of {which}, and training and evaluation need two or more. "
            "Give --dataset_root a folder with prints of several fingers."
        )


class _Name(NamedTuple):
    """What a file's place and name say."""

    layout: str
    anchor: Path  # the database's folder
    finger: str | None  # None: a slap or a palm, known and left out
    impression: str = ""
    ppi: float | None = None
    altered: bool = False

    @property
    def off_500(self) -> float:
        return abs((self.ppi or 500) - 500)


_CAPTURES = "roll|plain|slap-segmented|[a-z-]*slap[a-z-]*|[a-z-]*palm[a-z-]*"
_PATTERNS = {
    "FVC": r"(?!(?:19|20)\d{6}_\d{6}$)(?P<finger>\d+)_(?P<impression>\d+)",  # and no date and time
    "CrossMatch": r"(?P<finger>\d+_\d+)_(?P<impression>\d+)",
    "CASIA": r"(?P<finger>\d+_[LR]\d)_(?P<impression>\d+)",
    "SOCOFing": r"(?P<finger>\d+__[MF]_(?:Left|Right)_[a-z]+)_finger(?:_(?P<change>CR|Obl|Zcut))?",
    "SD4": r"(?P<impression>[fs])(?P<finger>\d{4})_\d{2}",
    "SD300": rf"(?P<subject>\d+)_(?P<capture>{_CAPTURES})_(?P<ppi>\d+)_(?P<frgp>\d\d)",
    "SD302": r"(?P<subject>\d+)_(?P<device>[^_]+)_(?:(?P<ppi>\d+)_)?"
             rf"(?P<capture>{_CAPTURES})_(?P<frgp>\d\d)",
    "SD301": r"(?P<subject>\d+)_(?P<encounter>[^_]+)_(?P<device>[^_]+)_(?P<ppi>\d+)_"
             rf"(?P<capture>{_CAPTURES})_(?P<frgp>\d\d)",
    "latent": r"\d+_\w+_\d+PPI_\d+BPC_\d+CH_\w+",  # of SD301 and SD302: of which finger, the name does not tell
}
_PATTERNS = {layout: re.compile(p, re.IGNORECASE) for layout, p in _PATTERNS.items()}

# Folders between a NIST set's own and its files; the set's folder is the database, so
# that a finger's rolled and plain prints share an identity.
_NIST_FOLDER = re.compile(rf"figs_\d+|images|png\w*|\d+|{_CAPTURES}", re.IGNORECASE)
_NIST_TOP = {"friction-ridge", "challengers", "baseline"}


def _read_name(path: Path) -> _Name | None:
    """What the absolute path says, None where no known set's name looks so."""
    matches = ((layout, p.fullmatch(path.stem)) for layout, p in _PATTERNS.items())
    layout, m = next(((layout, m) for layout, m in matches if m), (None, None))
    folder = path.parent
    if m is None:
        return None
    if layout == "CrossMatch" and any(_POLYU_HRF.fullmatch(part) for part in folder.parts):
        finger, session, impression = path.stem.split("_")
        return _Name("PolyU HRF", folder, finger, f"{session}_{impression}", 1200.0)
    if layout in ("FVC", "CrossMatch"):
        anchor, session = _without_session(folder)
        return _Name(layout, anchor, m["finger"], session + m["impression"], _fvc_ppi(folder))
    if layout == "CASIA":
        anchor = _above(folder, re.compile(r"[LR]|\d+", re.IGNORECASE))
        return _Name(layout, anchor, m["finger"].upper(), m["impression"])
    if layout == "SOCOFing":
        finger = re.sub("__[mf]", "", m["finger"].lower())
        anchor = _above(folder, re.compile(r"real|altered(-\w+)?", re.IGNORECASE))
        impression = f"{folder.name}_{m['change']}".lower() if m["change"] else "real"
        return _Name(layout, anchor, finger, impression, _socofing_ppi(path), bool(m["change"]))
    anchor = _nist_anchor(folder, m.groupdict().get("device"))
    if layout == "latent":
        return _Name(layout, anchor, None)
    if layout == "SD4":
        return _Name(layout, anchor, m["finger"], m["impression"].lower())
    frgp = {11: 1, 12: 6}.get(int(m["frgp"]), int(m["frgp"]))
    if not 1 <= frgp <= 10 or m["capture"].lower() not in ("roll", "plain", "slap-segmented"):
        return _Name(layout, anchor, None)
    parts = [m.groupdict().get(k) for k in ("encounter", "device", "capture")]
    parts += ["thumb"] if int(m["frgp"]) != frgp else []
    ppi = m["ppi"] or next((p for p in folder.parts[::-1] if p in ("500", "1000", "2000")), 0)
    return _Name(layout, anchor, f"{m['subject']}_{frgp:02d}",
                 "_".join(p for p in parts if p), float(ppi) or None)


# By the competitions' tables of sensors; the others were taken at 500 ppi.
_FVC_PPI = {("fvc2002", "db2"): 569.0, ("fvc2004", "db3"): 512.0, ("fvc2006", "db1"): 250.0, ("fvc2006", "db2"): 569.0}


def _fvc_ppi(folder: Path) -> float | None:
    """By year and number of the database, wherever the path tells them: FVC2002/DB2_A, fvc-2002/DB2_A_png, FVC2002_DB2_A."""
    for path in (folder, folder.resolve()):
        parts = [part.lower() for part in path.parts[::-1]]  # the nearest tells
        year = next((m[1] for part in parts if (m := re.search(r"fvc[-_ ]?(200[0246])(?!\d)", part))), None)
        number = next((m for part in parts if (m := re.search(r"(?<![a-z])db[-_ ]?([1-4])(?!\d)", part))), None)
        if year and number and not re.search(r"\d{3}", number.string[number.end():]):  # DB2_A_500ppi has been resampled
            return _FVC_PPI.get((f"fvc{year}", f"db{number[1]}"))
    return None


# PolyU's high-resolution prints, of pores: SUBJECT_SESSION_IMPRESSION under DBI and DBII, one finger a number.
_POLYU_HRF = re.compile(r".*polyu.*hrf.*|hrf|dbii?([-_ ].*)?", re.IGNORECASE)
_SESSION = re.compile(r"(first|second|third)[-_ ]?session|session[-_ ]?\d+", re.IGNORECASE)
_PART = re.compile(rf"train(ing)?|val(id|idation)?|test(ing)?|{_SESSION.pattern}", re.IGNORECASE)


def _without_session(folder: Path, pattern: re.Pattern = _SESSION, root: Path | None = None) -> tuple[Path, str]:
    """The folder above those of sessions, not above `root`, and what the impressions' names begin with: the fingers are the same."""
    anchor = _above(folder, pattern, root)
    return anchor, "".join(f"{part}_" for part in folder.parts[len(anchor.parts):])


def known_ppi(path: str | Path) -> float | None:
    """The resolution in which a print of this name was taken, where it is of a known set."""
    name = _read_name(Path(os.path.abspath(path)))
    return name and name.ppi


def _socofing_ppi(path: Path) -> float | None:
    """Most are shrunk to 96 x 103, ridges 3.2 px apart; a few are 241 wide, unshrunk."""
    with open(path, "rb") as file:
        head = file.read(22)
    if head[:2] == b"BM" and int.from_bytes(head[18:22], "little") > 200:
        return None
    return 175.0


def _above(folder: Path, pattern: re.Pattern, root: Path | None = None) -> Path:
    while folder != root and pattern.fullmatch(folder.name) and folder.parent.name:
        folder = folder.parent
    return folder


def _nist_anchor(folder: Path, device: str | None) -> Path:
    """The set's folder. The parts of SD300, 301 and 302 (sd302a, sd302b …) are of the same subjects: they are one."""
    folder = _nist_folder(folder, device)
    return folder.with_name(re.sub(r"(sd-?30[012])[a-z]$", r"\1", folder.name, flags=re.IGNORECASE)) if folder.name else folder


def _nist_folder(folder: Path, device: str | None) -> Path:
    tops = [i for i, part in enumerate(folder.parts) if part.lower() in _NIST_TOP]
    if tops and tops[-1] > 1:
        folder = Path(*folder.parts[: tops[-1]])
    elif device:
        words = re.compile(rf"{re.escape(device)}|{_NIST_FOLDER.pattern}", re.IGNORECASE)
        return _above(folder, words)
    return _above(folder, _NIST_FOLDER)


def _read_folders(root: Path, seen: set[str]) -> list[tuple[_Name, str]]:
    """Every print under `root` that is not in `seen` (real paths), which it adds to."""
    folders, others = _walk(root)
    read, nameless, by_folder, misfits = [], [], [], []
    for folder, files in folders.items():
        place = Path(os.path.abspath(folder))
        names = {file: _read_name(place / file) for file in files}
        layouts = Counter(name.layout for name in names.values() if name)
        if not layouts:
            nameless.append((folder, files))
            continue
        layout = layouts.most_common(1)[0][0]
        fits = {file for file, name in names.items() if name and name.layout == layout}
        read += [(names[file], folder / file) for file in files if file in fits]
        misfits += [folder / file for file in files if file not in fits]
    named = {path.parent.parent for _, path in read}
    above = {parent for folder in folders for parent in folder.parents}
    for folder, files in nameless:
        inner = folder in above
        if folder == root or inner or folder.parent in named:
            misfits += [folder / file for file in files]
            continue
        place = Path(os.path.abspath(folder))
        finger, session = _without_session(place)
        anchor, part = _without_session(finger.parent, _PART, Path(os.path.abspath(root)))  # train/7 and val/7 are of one finger
        by_folder += [(_Name("folders", anchor, finger.name, part + session + Path(file).stem),
                       folder / file) for file in files]
    if by_folder:
        fingers = dict.fromkeys((name.anchor, name.finger) for name, _ in by_folder)
        log.info("%s: the names of %d files tell no finger, so each of their %d folders is taken for one, such as %s",
                 root, len(by_folder), len(fingers), by_folder[0][1].parent)
    read += by_folder
    kept = [(name, path) for name, path in read if name.finger is not None]
    if not kept:
        raise UserError(_nothing_known(root, others, misfits + [p for _, p in read]))
    if misfits:
        log.warning("%s: %d files left out, their names fit no known set, such as %s",
                    root, len(misfits), misfits[0])
    fresh = []
    for name, path in kept:
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            fresh.append((name, str(path)))
    return fresh


def _walk(root: Path) -> tuple[dict[Path, list[str]], Counter]:
    """Each folder's image files, sorted, and a count of the other files' extensions."""
    if not root.exists():
        raise UserError(f"There is no folder {root}. Check the path of --dataset_root.")
    if not root.is_dir():
        raise UserError(f"{root} is a file. Give --dataset_root the folder that holds it.")
    folders, others, visited, gone = {}, Counter(), set(), []
    for place, inner, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(place)) in visited:
            inner.clear()  # a link back to where we were
            continue
        visited.add(real)
        inner[:] = sorted((d for d in inner if d[0] != "." and d not in ("__MACOSX", "@eaDir")), key=_natural)
        files = sorted((f for f in files if f[0] != "." and f != "Thumbs.db"), key=_natural)
        there = [f for f in files if os.path.exists(os.path.join(place, f))]
        gone += [os.path.join(place, f) for f in files if f not in there] if len(there) < len(files) else []
        files = there
        images = [f for f in files if Path(f).suffix.lower() in EXTENSIONS]
        others.update(Path(f).suffix.lower() or "without extension"
                      for f in set(files) - set(images))
        if images:
            folders[Path(place)] = images
    if gone:
        log.warning("%s: %d links lead nowhere and are left out, such as %s", root, len(gone), gone[0])
    return folders, others


def _nothing_known(root: Path, others: Counter, images: list[Path]) -> str:
    counts = others + Counter(p.suffix.lower() for p in images)
    if not counts:
        return f"{root} is empty. Give --dataset_root a folder that holds prints."
    kinds = ", ".join(f"{n} {e}" for e, n in counts.most_common())
    example = f", with names such as {images[0].name}" if images else ""
    return (
        f"{root} holds no print that is known, only {counts.total()} files: {kinds}"
        f"{example}. Name prints FINGER_IMPRESSION.ext, or put them in one folder a finger; "
        f"images end in {' '.join(sorted(EXTENSIONS))}."
    )


def _database_names(anchors: set[Path]) -> dict[Path, str]:
    """The last parts of each folder's path, as many as tell it from the others."""
    depth = dict.fromkeys(anchors, 1)
    while True:
        names = {a: "/".join(a.parts[-depth[a]:]) for a in anchors}
        count = Counter(names.values())
        # Neighbours of one that needs its parent's name get it too: FVC2002/DB4_B.
        crowded = {a.parent for a in anchors if count[names[a]] > 1 or names[a] == SYNTHETIC}  # that is the generated prints'
        if not crowded:
            return names
        for anchor in anchors:
            depth[anchor] += anchor.parent in crowded


def _natural(text: str) -> list[tuple[int, int | str, str]]:
    """A sort key by which 2 comes before 10."""
    return [(0, int(part), part) if part.isdecimal() else (1, part, "")
            for part in re.split(r"(\d+)", text) if part]
