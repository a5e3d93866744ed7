"""What a print's file name says in the known sets: the finger, the impression, the ppi.

The sets are those of `_PATTERNS`; names that tell hand and finger in words are read too.
Which database a print is of, its folders say (`ifvit.data.places`).
"""

import functools
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

FOLDERS = "a folder a finger"  # the layout of files whose names tell no finger


@dataclass(frozen=True)
class Name:
    """What a file's name says."""

    layout: str
    finger: str | None  # None: known, and of no single finger
    impression: str = ""
    ppi: float | None = None
    altered: bool = False
    ids: tuple[str, ...] = ()  # what a folder of this finger, of its person or its device, may be called
    subject: str | None = ""  # whose finger it is, where the set tells; None: the folder tells it
    why: str = ""  # where there is no finger


_CAPTURES = "roll|plain|slap-segmented|[a-z-]*slap[a-z-]*|[a-z-]*palm[a-z-]*"
# The first that fits counts. A pattern with a / is of the path's end, any other of the file's name; neither has the
# extension. A layout that `read_name` does not treat apart has the groups finger and impression. A session becomes part
# of the impression. Folders may be called as the finger, and as subject and position where the pattern has these.
_PATTERNS = {
    "FVC": r"(?!(?:19|20)\d{6}_\d{6}$)(?P<finger>\d+)_(?P<impression>\d+)",  # and no date and time
    # High-resolution prints, of pores, under DBI and DBII: one finger a number.
    "PolyU HRF": r"(?:[^/]*polyu[^/]*hrf[^/]*|hrf|dbii?(?:[-_ ][^/]*)?)/(?:.*/)?"
    r"(?P<finger>\d+)_(?P<session>\d+)_(?P<impression>\d+)",
    "CrossMatch": r"(?P<finger>(?P<subject>\d+)_(?P<position>\d+))_(?P<impression>\d+)",
    "CASIA": r"(?P<finger>(?P<subject>\d+)_[LR]\d)_(?P<impression>\d+)",
    "SOCOFing": r"(?P<finger>(?P<subject>\d+)__[MF]_(?:Left|Right)_[a-z]+)_finger(?:_(?P<change>CR|Obl|Zcut))?",
    "RidgeBase": r"(?P<session>\d)_(?P<subject>\d{4,})_(?P<hand>Left|Right)_"
    r"(?P<word>Thumb|Index|Middle|Ring|Little|Four_Fingers)",
    "RidgeBase contactless": r"(?P<session>\d)_(?P<device>[a-z0-9 ]+)_(?P<subject>\d{4,})_(?P<background>\d)_"
    r"(?P<hand>LEFT|RIGHT)_image_fingerprint(?P<shot>[a-z0-9]+)(?:_0?\.\d+|_0\.\d+e-?\d+)?(?:_(?P<word>\d))?",
    "SD4": r"(?P<impression>[fs])(?P<finger>\d{4})_\d{2}",
    "SD14": r"(?P<impression>[fs])(?P<finger>\d{7})",
    "SD27": r"(?P<finger>[GBU]\d{3})(?P<impression>[LT])\d{1,2}[UI]",
    "SD300": rf"(?P<subject>\d+)_(?P<capture>{_CAPTURES})_(?P<ppi>\d+)_(?P<frgp>\d\d)",
    "SD302": r"(?P<subject>\d+)_(?P<device>[^_]+)_(?:(?P<ppi>\d+)_)?"
    rf"(?P<capture>{_CAPTURES})_(?P<frgp>\d\d)",
    "SD301": r"(?P<subject>\d+)_(?P<encounter>[^_]+)_(?P<device>[^_]+)_(?P<ppi>\d+)_"
    rf"(?P<capture>{_CAPTURES})_(?P<frgp>\d\d)",
    "latent": r"\d+_\w+_\d+PPI_\d+BPC_\d+CH_\w+",  # of SD301 and SD302: of which finger, the name does not tell
}
_PATTERNS = {
    layout: re.compile(f".*/{p}" if "/" in p else p, re.IGNORECASE | re.DOTALL) for layout, p in _PATTERNS.items()
}
_PPI = {"PolyU HRF": 1200.0}  # of sets that were not taken at 500 ppi, where neither name nor folder tells it

SLAP, LATENT = "a slap or a palm", "a latent whose finger its name does not tell"


def nfc(text: str) -> str:
    """Names are compared in one normal form: file systems and archives write accents in either."""
    return unicodedata.normalize("NFC", text)


def read_name(path: Path) -> Name | None:
    """What the absolute path of a file says, None where no known set's name looks so."""
    stem, folder = nfc(path.stem), path.parent
    end = f"{nfc(folder.as_posix())}/{stem}"
    matches = ((layout, p.fullmatch(end if "/" in p.pattern else stem)) for layout, p in _PATTERNS.items())
    layout, m = next(((layout, m) for layout, m in matches if m), (None, None))
    if m is None:
        return None
    said = m.groupdict()
    if layout == "SOCOFing":
        finger = re.sub("__[mf]", "", m["finger"].lower())
        impression = f"{folder.name}_{m['change']}".lower() if m["change"] else "real"
        return Name(
            layout, finger, impression, _socofing_ppi(path), bool(m["change"]), (finger, m["subject"]), m["subject"]
        )
    if layout.startswith("RidgeBase"):
        return _ridgebase(layout, said)
    if layout == "latent":
        return Name(layout, None, why=LATENT)
    if "frgp" not in said:
        return Name(
            layout,
            m["finger"].upper(),
            "_".join(said[k] for k in ("session", "impression") if k in said).lower(),
            fvc_ppi(folder) if layout in ("FVC", "CrossMatch") else _PPI.get(layout),
            ids=tuple(said[k] for k in ("finger", "subject", "position") if k in said),
            subject=said.get("subject", ""),
        )
    frgp = {11: 1, 12: 6}.get(int(m["frgp"]), int(m["frgp"]))
    if not 1 <= frgp <= 10 or m["capture"].lower() not in ("roll", "plain", "slap-segmented"):
        return Name(layout, None, why=SLAP)
    parts = [said.get(k) for k in ("encounter", "device", "capture")]
    parts += ["thumb"] if int(m["frgp"]) != frgp else []
    ppi = m["ppi"] or next((p for p in folder.parts[::-1] if p in ("500", "1000", "2000")), 0)
    return Name(
        layout,
        f"{m['subject']}_{frgp:02d}",
        "_".join(p for p in parts if p),
        float(ppi) or None,
        ids=(said["device"],) if said.get("device") else (),
        subject=m["subject"],
    )


def _ridgebase(layout: str, said: dict) -> Name:
    """Of the contactless photographs the fingers are numbered, and by which number each goes is not told."""
    if not said["word"] or said["word"].lower() == "four_fingers":
        return Name(layout, None, why=SLAP)
    impression = "_".join(said[k] for k in ("session", "device", "background", "shot") if k in said)
    return Name(
        layout,
        f"{said['subject']}_{said['hand']}_{said['word']}".lower(),
        impression,
        ids=(said["subject"],),
        subject=said["subject"],
    )


# --- hand and finger in words

_HAND = {"left": "left", "right": "right", "l": "left", "r": "right", "lh": "left", "rh": "right"}
_FINGER = {
    "thumb": "thumb",
    "index": "index",
    "fore": "index",
    "forefinger": "index",
    "pointer": "index",
    "middle": "middle",
    "ring": "ring",
    "little": "little",
    "pinky": "little",
    "pinkie": "little",
}
_NOISE = {"finger", "fingers", "hand", "fingerprint", "print", "fp"}
_GLUED = re.compile(rf"(left|right|[lr])?({'|'.join(_FINGER)})(finger)?(\d*)", re.IGNORECASE)


def _words(text: str) -> list[str]:
    """Left_Index-2, leftIndex2 and left index 2 alike."""
    found = []
    for token in re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text)):
        m = _GLUED.fullmatch(token)
        found += m.groups() if m else [token]
    return [word for word in found if word and word.lower() not in _NOISE]


def hand_and_finger(text: str) -> tuple[str, list[str], list[str]]:
    """The finger that words name, such as `left_index`, and the words before and after; '' and all of them else."""
    words = _words(text)
    lower = [w.lower() for w in words]
    fingers = [k for k, w in enumerate(lower) if w in _FINGER]
    hands = [k for k, w in enumerate(lower) if w in _HAND and (len(w) > 2 or any(abs(k - f) == 1 for f in fingers))]
    told = sorted(fingers + hands)
    if len(fingers) > 1 or len(hands) > 1 or not told:
        return "", words, []
    name = "_".join([_HAND[lower[k]] for k in hands] + [_FINGER[lower[k]] for k in fingers])
    return name, words[: told[0]], [w for k, w in enumerate(words) if k > told[0] and k not in told]


def in_words(stem: str) -> Name | None:
    """A name that tells hand and finger in words: of whom, what stands before them says, or the folder."""
    finger, before, after = hand_and_finger(nfc(stem))
    if not finger:
        return None
    subject = None if not before else before[0] if len(before) == 1 else "?"
    return Name("hand and finger", finger, "_".join(after) or "1", ids=tuple(before + after), subject=subject)


# --- resolutions

# By the competitions' tables of sensors; the others were taken at 500 ppi.
_FVC_PPI = {("fvc2002", "db2"): 569.0, ("fvc2004", "db3"): 512.0, ("fvc2006", "db1"): 250.0, ("fvc2006", "db2"): 569.0}


@functools.lru_cache(maxsize=4096)
def fvc_ppi(folder: Path) -> float | None:
    """By year and number of the database, wherever a path tells: FVC2002/DB2_A, fvc-2002/DB2_A_png, FVC2002_DB2."""
    for path in (folder, folder.resolve()):
        parts = [part.lower() for part in path.parts[::-1]]  # the nearest tells
        year = next((m[1] for part in parts if (m := re.search(r"fvc[-_ ]?(200[0246])(?!\d)", part))), None)
        number = next((m for part in parts if (m := re.search(r"(?<![a-z])db[-_ ]?([1-4])(?!\d)", part))), None)
        # A folder such as DB2_A_500ppi holds prints that have been resampled.
        if year and number and not re.search(r"\d{3}", number.string[number.end() :]):
            return _FVC_PPI.get((f"fvc{year}", f"db{number[1]}"))
    return None


def known_ppi(path: str | os.PathLike) -> float | None:
    """The resolution in which a print of this name was taken, where it is of a known set."""
    name = read_name(Path(os.path.abspath(path)))
    return name and name.ppi


def _socofing_ppi(path: Path) -> float | None:
    """Most are shrunk to 96 x 103, ridges 3.2 px apart; a few are 241 wide, unshrunk."""
    with open(path, "rb") as file:
        head = file.read(22)
    if head[:2] == b"BM" and int.from_bytes(head[18:22], "little") > 200:
        return None
    return 175.0
