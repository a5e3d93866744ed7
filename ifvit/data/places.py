"""What folders say: the database of a print, and the finger where its file's name tells none.

Parts of a set (train, gallery), sessions, conditions (wet, dry) and sensors hold the same fingers again: they are no databases
of their own, wherever in the path they stand, and become part of the impression's name. Nor are a finger's and a person's folders.
"""

import os
import re
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ifvit.data.names import FOLDERS, Name, hand_and_finger, nfc
from ifvit.errors import UserError

_SETS = r"[-_ ]?(?:sets?|data|images?|imgs?|prints?|fingerprints?|split|part)?[-_ ]?\d*"
_KINDS = {
    "part": rf"(?:images?|imgs?|prints?|fingerprints?|data)?[-_ ]?(?:train(?:ing)?|val(?:id|idation)?|dev|test(?:ing)?|eval(?:uation)?|gallery|"
            rf"galleries|probes?|query|queries|enrol(?:l|led|ment|lment|ments|lments)?|verif(?:y|ication)|references?|templates?){_SETS}"
            r"|(?:fold|split)[-_ ]?\d+",
    "session": r"(?:first|second|third|fourth|fifth|\d(?:st|nd|rd|th))[-_ ]?(?:session|visit|day|round)"
               r"|(?:session|sess|visit|day|round|week|month)[-_ ]?(?:\d+|[a-d])",
    "condition": r"(?:very[-_ ]?)?(?:wet|dry|normal|moist|oily|greasy|dirty|dusty|clean|latents?|humid|cold|warm|sweaty|natural|distorted|"
                 r"indoors?|outdoors?|(?:low|light|medium|normal|high|heavy|strong)[-_ ]?pressure|(?:low|medium|high|good|bad|poor)[-_ ]?quality)"
                 r"(?:[-_ ]?(?:fingers?|skin|condition|prints?|fingerprints?|images?))?",
    "sensor": r"(?:device|sensor|scanner|reader|camera|phone)[-_ ]?(?:\d+|[a-z])|optical|capacitive|thermal|ultrasonic|ultrasound|swipe|"
              r"(?:touch|contact)(?:less|[-_ ]?based)?|smart[-_ ]?phone|mobile|webcam",
}
_KINDS = {kind: re.compile(p, re.IGNORECASE) for kind, p in _KINDS.items()}
# Folders of a set's own that stand between its name and the files.
_OWN = {
    "SOCOFing": re.compile(r"real|altered(-\w+)?", re.IGNORECASE),
    "CASIA": re.compile(r"[LR]|\d+", re.IGNORECASE),
    "RidgeBase": re.compile(r"task[-_ ]?\d", re.IGNORECASE),
    "RidgeBase contactless": re.compile(r"task[-_ ]?\d", re.IGNORECASE),
    "SD4": re.compile(r"figs_\d+|images|png\w*", re.IGNORECASE),
    "SD14": re.compile(r"images|png\w*|wsq", re.IGNORECASE),
}
_NIST = re.compile(r"figs_\d+|images|png\w*|\d+|roll|plain|slap-segmented|[a-z-]*slap[a-z-]*|[a-z-]*palm[a-z-]*", re.IGNORECASE)
_NIST_TOP = {"friction-ridge", "challengers", "baseline"}
_COMPETITION = re.compile(r"(?:fvc[-_ ]?\d{4}.*?)?db[-_ ]?\d[-_ ]?[ab]?(?:[-_ ].*)?|fvc[-_ ]?\d{4}.*", re.IGNORECASE)  # never a finger's folder
_PERSON = re.compile(r"(?:subjects?|persons?|people|user|usr|subj|individual|volunteer|id|identity|class|client|p|s|u|n)?[-_ ]?\d+", re.IGNORECASE)


@dataclass
class Found:
    """A file whose name says something, and what its folders add."""

    path: Path
    name: Name
    anchor: Path = Path()  # the database's folder, without the parts of it
    finger: str = ""
    impression: str = ""
    parts: tuple[tuple[str, str], ...] = ()  # the folders that hold the same fingers again: (kind, name)


def kind_of(folder: str) -> str:
    """part, session, condition or sensor, and '' for all other folders."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(folder)), "")


def absolute(folder: Path) -> Path:
    """Its path from the top, in the form in which names are compared."""
    return Path(nfc(os.path.abspath(folder)))


def common_top(roots: list[Path]) -> Path:
    """The folder that holds all roots: what lies below it tells a print's place, whichever roots are given."""
    places = [absolute(root) for root in roots]
    top = places[0]
    while not all(top == p or top in p.parents for p in places):
        top = top.parent
    return top


def without_parts(folder: Path, top: Path) -> tuple[Path, tuple[tuple[str, str], ...]]:
    """`folder`, which is `top` or lies in it, without the folders that hold the same fingers again, and those, from above.

    Above `top` only those that follow one another count: a set is not of the folder `test` in which somebody keeps everything.
    """
    keep, parts = list(top.parts), []
    while len(keep) > 2 and (kind := kind_of(keep[-1])):
        parts.insert(0, (kind, keep.pop()))
    for word in folder.parts[len(top.parts):]:
        if kind := kind_of(word):
            parts.append((kind, word))
        else:
            keep.append(word)
    return Path(*keep), tuple(parts)


def settle(found: list[Found], top: Path) -> list[str]:
    """Gives every print its database's folder, its finger and its impression. Returns what it took for what, where that is in doubt.

    Raises: UserError where names tell a hand and a finger, and not of whom.
    """
    told: list[str] = []
    short = {folder: without_parts(absolute(folder), top) for folder in {f.path.parent for f in found}}
    floor = without_parts(top, top)[0]
    for f in found:
        f.anchor, f.parts = short[f.path.parent]
        f.finger, f.impression = f.name.finger or "", f.name.impression
    layouts = defaultdict(list)
    for f in found:
        layouts[f.name.layout].append(f)
    for layout, some in layouts.items():
        if layout == FOLDERS:
            _folders_of_fingers(some, floor, told)
        elif layout == "hand and finger":
            _hands(some, floor, told)
        elif layout in ("SD300", "SD301", "SD302", "latent"):
            for f in some:
                f.anchor = _nist_set(f.anchor, f.name.ids[-1] if f.name.ids else None)
        else:
            _climb(some, floor, _OWN.get(layout))
            if layout == "FVC":
                _folders_of_numbers(some, floor, told)
            if layout == "RidgeBase contactless":  # which photograph is of which of the contact prints is not told
                for f in some:
                    f.anchor /= "Contactless"
    for f in found:
        f.impression = "_".join([*(word for _, word in f.parts), f.impression])
    return told


def _climb(found: list[Found], floor: Path, own: re.Pattern | None) -> None:
    """Up from folders that are called as what they hold: a finger, or a person. And from a set's own."""
    places = defaultdict(list)
    for f in found:
        f.anchor = _above(f.anchor, own)
        places[f.anchor].append(f)
    todo = sorted(places, key=lambda p: -len(p.parts))
    while todo:
        place = todo.pop(0)
        if floor not in place.parents or _COMPETITION.fullmatch(place.name):
            continue
        if any(all(_is_of(place.name, f.name.ids, k) for f in places[place]) for k in range(len(places[place][0].name.ids))):
            for f in places[place]:
                f.anchor = place.parent
            if place.parent not in places:
                todo.append(place.parent)
                todo.sort(key=lambda p: -len(p.parts))
            places[place.parent] += places.pop(place)
    for f in found:
        f.anchor = _above(f.anchor, own)


def _above(folder: Path, words: re.Pattern | None) -> Path:
    while words and words.fullmatch(folder.name) and folder.parent.name:
        folder = folder.parent
    return folder


def _is_of(folder: str, ids: tuple[str, ...], k: int) -> bool:
    """Whether a folder is called as the k-th of the ids is, zeros and a word before it apart: 7, 007, finger_7."""
    if folder.casefold() == ids[k].casefold():
        return True
    number = re.fullmatch(r"[a-z_\- ]*?0*(\d+)", folder, re.IGNORECASE)
    return bool(number) and ids[k].isdecimal() and int(number[1]) == int(ids[k])


def _folders_of_numbers(found: list[Found], floor: Path, told: list[str]) -> None:
    """FVC's names in folders that are fingers, or persons, though not called as the files are."""
    for parent, places in _siblings(found, floor).items():
        numbers = {place: {f.finger for f in some} for place, some in places.items()}
        example = next(iter(places.values()))[0].path
        single = all(len(n) == 1 for n in numbers.values())
        alike = all(_PERSON.fullmatch(place.name) for place in places)
        if len(places) < 2 or any(_COMPETITION.fullmatch(place.name) for place in places):
            continue
        if single and len(set.union(*numbers.values())) == len(places):
            pass  # a number a folder, and no number twice
        elif single and (alike or len(places) > 2):
            told.append(f"{parent}: names such as {'/'.join(example.parts[-2:])} are taken for a folder a finger, the number before the _ for none, since "
                        "every folder has one alone; where folders are persons or databases, say so with --names, e.g. "
                        "--names '{database}/{finger}_{impression}'.")
            for place, some in places.items():
                for f in some:
                    f.finger, f.impression = place.name, nfc(f.path.stem)
        elif alike and all(n.isdecimal() and int(n) <= 10 for n in set.union(*numbers.values())):
            told.append(f"{parent}: names such as {'/'.join(example.parts[-2:])} are taken for PERSON/FINGER_IMPRESSION; where a folder is one finger, "
                        "say so with --names '{finger}/{impression}', where it is a database with --names '{database}/{finger}_{impression}'.")
            for place, some in places.items():
                for f in some:
                    f.finger = f"{place.name}_{f.finger}"
        else:
            continue
        for f in (f for some in places.values() for f in some):
            f.anchor = parent


def _siblings(found: list[Found], floor: Path) -> dict[Path, dict[Path, list[Found]]]:
    """The prints of each place below `floor`, by the folder above it."""
    above = defaultdict(lambda: defaultdict(list))
    for f in found:
        if floor in f.anchor.parents:
            above[f.anchor.parent][f.anchor].append(f)
    return above


def _folders_of_fingers(found: list[Found], floor: Path, told: list[str]) -> None:
    """A folder a finger, in a person's or in a database's."""
    for f in found:
        f.finger, f.anchor = f.anchor.name, f.anchor.parent
        if hand_and_finger(f.finger)[0] and hand_and_finger(f.anchor.name) in (("left", [], []), ("right", [], [])) and floor in f.anchor.parents:
            f.finger, f.anchor = f"{f.anchor.name}_{f.finger}", f.anchor.parent  # left/index
    for parent, places in _siblings(found, floor).items():
        fingers = {f.finger for some in places.values() for f in some}
        words = all(hand_and_finger(finger)[0] and not any(hand_and_finger(finger)[1:]) for finger in fingers)
        numbers = all(_PERSON.fullmatch(place.name) for place in places) and all(n.isdecimal() and int(n) <= 10 for n in fingers)
        if len(places) < 2 or not (words or numbers):
            continue
        example = next(iter(places.values()))[0].path
        told.append(f"{parent}: places such as {'/'.join(example.parts[-3:])} are taken for PERSON/FINGER/IMPRESSION; where the first folder is a database, "
                    "say so with --names '{database}/{finger}/{impression}'.")
        for place, some in places.items():
            for f in some:
                f.finger, f.anchor = f"{place.name}_{f.finger}", parent


def _hands(found: list[Found], floor: Path, told: list[str]) -> None:
    """Names that tell hand and finger in words: whose, the folder that is called as a word of them says, else the words before, else the folder."""
    persons = set()
    for f in found:
        chain = [p for p in (f.anchor, *f.anchor.parents) if floor in p.parents]
        place = next((p for p in chain if any(_is_of(p.name, f.name.ids, k) for k in range(len(f.name.ids)))), None)
        if place:
            subject, f.anchor = place.name, place.parent
        elif f.name.subject == "?":
            raise UserError(f"{f.path} tells a hand and a finger, and which of the words before them is the person is not known. Say so with "
                            "--names, e.g. --names '{subject}_{impression}_{finger}'.")
        elif f.name.subject:
            subject = f.name.subject
        elif chain:
            subject, f.anchor = f.anchor.name, f.anchor.parent
        else:
            subject = ""
        persons.add(subject)
        f.finger = f"{subject}_{f.name.finger}".strip("_")
        if place:
            f.impression = "_".join(word for word in f.name.ids if not _is_of(place.name, (word,), 0)) or "1"
    example = found[0]
    told.append(f"{example.path.parent}: names tell hand and finger, such as {example.path.name}, which is taken for finger {example.finger}, "
                f"impression {example.impression}; {len(persons)} persons in all. Where that is wrong, say what is what with --names, e.g. "
                "--names '{subject}/{finger}_{impression}'.")


def _nist_set(folder: Path, device: str | None) -> Path:
    """The set's folder. The parts of SD300, 301 and 302 (sd302a, sd302b …) are of the same subjects: they are one."""
    tops = [i for i, part in enumerate(folder.parts) if part.lower() in _NIST_TOP]
    words = re.compile(rf"{re.escape(device)}|{_NIST.pattern}" if device else _NIST.pattern, re.IGNORECASE)
    if tops and tops[-1] > 1:
        folder = Path(*folder.parts[: tops[-1]])
        words = _NIST
    folder = _above(folder, words)
    return folder.with_name(re.sub(r"(sd-?30[012])[a-z]$", r"\1", folder.name, flags=re.IGNORECASE)) if folder.name else folder


def doubts(found: list[Found]) -> list[str]:
    """Where one database has been made of several folders, or of spellings that differ, and it could be otherwise."""
    told = []
    databases = defaultdict(list)
    for f in found:
        databases[f.anchor].append(f)
    for anchor, some in databases.items():
        told += _sensors(anchor, some) + _same_names(anchor, some) + _spellings(anchor, some)
    return told


_REMEDY = "where they are of other fingers, say so with --names, e.g. --names '{database}/{finger}_{impression}'."


def _sensors(anchor: Path, found: list[Found]) -> list[str]:
    fingers = defaultdict(set)
    for f in found:
        for kind, word in f.parts:
            if kind == "sensor":
                fingers[word].add(f.finger)
    shared = len(fingers) > 1 and set.intersection(*fingers.values())
    return [f"{anchor}: {' and '.join(sorted(fingers))} are taken for sensors that took the same fingers, such as {min(shared)}; {_REMEDY}"] if shared else []


def _same_names(anchor: Path, found: list[Found]) -> list[str]:
    """Parts in which a finger has an impression of the same name: further ones, or other fingers'."""
    seen: dict[tuple, Found] = {}
    count, example = 0, None
    for f in found:
        rest = tuple(part for part in f.parts if part[0] != "part")
        key = f.finger, f.name.layout, nfc(f.path.stem), rest
        other = seen.setdefault(key, f)
        if other.parts != f.parts:
            count, example = count + 1, example or (other, f)
    if not count:
        return []
    a, b = example
    return [f"{anchor}: {count} prints have the same name in two parts of it, such as {a.path} and {b.path}, and are taken for the same fingers; {_REMEDY}"]


def _spellings(anchor: Path, found: list[Found]) -> list[str]:
    """Fingers that differ in nothing but case, leading zeros or the width of letters."""
    spelled = defaultdict(set)
    for finger in {f.finger for f in found}:
        spelled[re.sub(r"\d+", lambda m: str(int(m[0])), unicodedata.normalize("NFKC", finger).casefold())].add(finger)
    twice = [sorted(s) for s in spelled.values() if len(s) > 1]
    return [f"{anchor}: {' and '.join(min(twice))} are taken for different fingers ({len(twice)} such names differ in case or zeros alone); where they are "
            "one, rename the folders or files."] if twice else []
