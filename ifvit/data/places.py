"""What folders say: the database of a print, and the finger where its file's name tells none.

Parts of a set, sessions and the like (`ifvit.data.parts`) are no databases of their own, and neither are the folders
of a finger and of a person.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ifvit.data.names import FOLDERS, Name, hand_and_finger, nfc
from ifvit.data.parts import absolute, without_parts
from ifvit.errors import UserError

# Folders of a set's own that stand between its name and the files.
_OWN = {
    "SOCOFing": re.compile(r"real|altered(-\w+)?", re.IGNORECASE),
    "CASIA": re.compile(r"[LR]|\d+", re.IGNORECASE),
    "RidgeBase": re.compile(r"task[-_ ]?\d", re.IGNORECASE),
    "RidgeBase contactless": re.compile(r"task[-_ ]?\d", re.IGNORECASE),
    "SD4": re.compile(r"figs_\d+|images|png\w*", re.IGNORECASE),
    "SD14": re.compile(r"images|png\w*|wsq", re.IGNORECASE),
}
_NIST = re.compile(
    r"figs_\d+|images|png\w*|\d+|roll|plain|slap-segmented|[a-z-]*slap[a-z-]*|[a-z-]*palm[a-z-]*", re.IGNORECASE
)
_NIST_TOP = {"friction-ridge", "challengers", "baseline"}
# Never a finger's folder.
_COMPETITION = re.compile(r"(?:fvc[-_ ]?\d{4}.*?)?db[-_ ]?\d[-_ ]?[ab]?(?:[-_ ].*)?|fvc[-_ ]?\d{4}.*", re.IGNORECASE)
_PERSON = re.compile(
    r"(?:subjects?|persons?|people|user|usr|subj|individual|volunteer|id|identity|class|client|p|s|u|n)?[-_ ]?\d+",
    re.IGNORECASE,
)


@dataclass
class Found:
    """A file whose name says something, and what its folders add."""

    path: Path
    name: Name
    anchor: Path = Path()  # the database's folder, without the parts of it
    finger: str = ""
    impression: str = ""
    subject: str = ""  # whose finger it is; '' where that is not told
    parts: tuple[tuple[str, str], ...] = ()  # the folders that hold the same fingers again: (kind, name)


def settle(found: list[Found], top: Path) -> list[str]:
    """Gives every print its database's folder, its finger and its impression.

    Returns: what it took for what, where that is in doubt.
    Raises: UserError where names tell a hand and a finger, and not of whom.
    """
    told: list[str] = []
    short = {folder: without_parts(absolute(folder), top) for folder in {f.path.parent for f in found}}
    floor = without_parts(top, top)[0]
    for f in found:
        f.anchor, f.parts = short[f.path.parent]
        f.finger, f.impression, f.subject = f.name.finger or "", f.name.impression, f.name.subject or ""
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
        here = places[place]
        if any(all(_is_called(place.name, f.name.ids[k]) for f in here) for k in range(len(here[0].name.ids))):
            for f in here:
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


def _is_called(folder: str, word: str) -> bool:
    """Whether a folder is called so, zeros and a word before a number apart: 7, 007, finger_7."""
    number = re.fullmatch(r"[a-z_\- ]*?0*(\d+)", folder, re.IGNORECASE)
    return folder.casefold() == word.casefold() or (bool(number) and word.isdecimal() and int(number[1]) == int(word))


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
            told.append(
                f"{parent}: names such as {'/'.join(example.parts[-2:])} are taken for a folder a finger, the "
                "number before the _ for none, since every folder has one alone; where folders are persons or "
                "databases, say so with --names, e.g. --names '{database}/{finger}_{impression}'."
            )
            for place, some in places.items():
                for f in some:
                    f.finger, f.impression = place.name, nfc(f.path.stem)
        elif alike and all(n.isdecimal() and int(n) <= 10 for n in set.union(*numbers.values())):
            told.append(
                f"{parent}: names such as {'/'.join(example.parts[-2:])} are taken for PERSON/FINGER_IMPRESSION; "
                "where a folder is one finger, say so with --names '{finger}/{impression}', where it is a database "
                "with --names '{database}/{finger}_{impression}'."
            )
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
        hand = hand_and_finger(f.anchor.name) in (("left", [], []), ("right", [], []))
        if hand and hand_and_finger(f.finger)[0] and floor in f.anchor.parents:  # left/index
            f.finger, f.anchor = f"{f.anchor.name}_{f.finger}", f.anchor.parent
    for parent, places in _siblings(found, floor).items():
        fingers = {f.finger for some in places.values() for f in some}
        words = all(hand_and_finger(finger)[0] and not any(hand_and_finger(finger)[1:]) for finger in fingers)
        numbers = all(_PERSON.fullmatch(place.name) for place in places) and all(
            n.isdecimal() and int(n) <= 10 for n in fingers
        )
        if len(places) < 2 or not (words or numbers):
            continue
        example = next(iter(places.values()))[0].path
        told.append(
            f"{parent}: places such as {'/'.join(example.parts[-3:])} are taken for PERSON/FINGER/IMPRESSION; where "
            "the first folder is a database, say so with --names '{database}/{finger}/{impression}'."
        )
        for place, some in places.items():
            for f in some:
                f.finger, f.anchor = f"{place.name}_{f.finger}", parent


def _hands(found: list[Found], floor: Path, told: list[str]) -> None:
    """Names that tell hand and finger in words.

    Whose, says the folder that is called as one of the other words is; else the words before; else the folder.
    """
    persons = set()
    for f in found:
        chain = [p for p in (f.anchor, *f.anchor.parents) if floor in p.parents]
        place = next((p for p in chain if any(_is_called(p.name, word) for word in f.name.ids)), None)
        if place:
            subject, f.anchor = place.name, place.parent
        elif f.name.subject == "?":
            raise UserError(
                f"{f.path} tells a hand and a finger, and which of the words before them is the person is not known. "
                "Say so with --names, e.g. --names '{subject}_{impression}_{finger}'."
            )
        elif f.name.subject:
            subject = f.name.subject
        elif chain:
            subject, f.anchor = f.anchor.name, f.anchor.parent
        else:
            subject = ""
        persons.add(subject)
        f.finger, f.subject = f"{subject}_{f.name.finger}".strip("_"), subject
        if place:
            f.impression = "_".join(word for word in f.name.ids if not _is_called(place.name, word)) or "1"
    example = found[0]
    told.append(
        f"{example.path.parent}: names tell hand and finger, such as {example.path.name}, which is taken for finger "
        f"{example.finger}, impression {example.impression}; {len(persons)} persons in all. Where that is wrong, say "
        "what is what with --names, e.g. --names '{subject}/{finger}_{impression}'."
    )


def _nist_set(folder: Path, device: str | None) -> Path:
    """The set's folder. The parts of SD300, 301 and 302 (sd302a, sd302b …) are of the same subjects: they are one."""
    tops = [i for i, part in enumerate(folder.parts) if part.lower() in _NIST_TOP]
    words = re.compile(rf"{re.escape(device)}|{_NIST.pattern}" if device else _NIST.pattern, re.IGNORECASE)
    if tops and tops[-1] > 1:
        folder = Path(*folder.parts[: tops[-1]])
        words = _NIST
    folder = _above(folder, words)
    whole = re.sub(r"(sd-?30[012])[a-z]$", r"\1", folder.name, flags=re.IGNORECASE)
    return folder.with_name(whole) if whole else folder
