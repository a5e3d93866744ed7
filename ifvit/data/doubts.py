"""Where folders and names could be read otherwise: what they were taken for, and how to say what is right."""

import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from ifvit.data.names import nfc
from ifvit.data.places import Found

_REMEDY = "where they are of other fingers, say so with --names, e.g. --names '{database}/{finger}_{impression}'."


def doubts(found: list[Found]) -> list[str]:
    """Where one database has been made of several folders, or of spellings that differ, and it could be otherwise."""
    told = []
    databases = defaultdict(list)
    for f in found:
        databases[f.anchor].append(f)
    for anchor, some in databases.items():
        told += _numbers(anchor, some) + _sensors(anchor, some) + _same_names(anchor, some) + _spellings(anchor, some)
    return told


def _numbers(anchor: Path, found: list[Found]) -> list[str]:
    """Numbers that may be of a person, a session or the other way round."""
    seconds = defaultdict(set)  # of each first number, or first two
    for f in found:
        if f.name.layout in ("FVC", "CrossMatch") and f.finger == f.name.finger:
            seconds[f.finger].add(f.name.impression)
    if not seconds:
        return []
    example = next(f.path.name for f in found if f.finger in seconds)
    sets = list(seconds.values())
    if found[0].name.layout == "CrossMatch":
        if {finger.rpartition("_")[2] for finger in seconds} <= {"0", "1", "2", "01", "02"}:
            return [
                f"{anchor}: names such as {example} are taken for PERSON_FINGER_IMPRESSION; where the number in the "
                "middle is a session, say so with --names '**/{finger}_*_{impression}'."
            ]
    elif len(sets) > 1 and all({int(n) for n in some} in (set(range(1, 11)), set(range(10))) for some in sets):
        return [
            f"{anchor}: names such as {example} are taken for FINGER_IMPRESSION, ten of each; where they are a "
            "person's ten fingers, say so with --names '**/{subject}_{finger}'."
        ]
    elif min(map(len, sets)) > max(20, 4 * len(sets)):
        return [
            f"{anchor}: names such as {example} are taken for FINGER_IMPRESSION, {len(sets)} fingers; where it is the "
            "other way round, say so with --names '**/{impression}_{finger}'."
        ]
    return []


def _sensors(anchor: Path, found: list[Found]) -> list[str]:
    fingers = defaultdict(set)
    for f in found:
        for kind, word in f.parts:
            if kind == "sensor":
                fingers[word].add(f.finger)
    shared = set.intersection(*fingers.values()) if len(fingers) > 1 else set()
    return [
        f"{anchor}: {' and '.join(sorted(fingers))} are taken for sensors that took the same fingers, such as "
        f"{finger}; {_REMEDY}"
        for finger in sorted(shared)[:1]
    ]


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
    return [
        f"{anchor}: {count} prints have the same name in two parts of it, such as {a.path} and {b.path}, and are taken "
        f"for the same fingers; {_REMEDY}"
    ]


def _spellings(anchor: Path, found: list[Found]) -> list[str]:
    """Fingers that differ in nothing but case, leading zeros or the width of letters."""
    spelled = defaultdict(set)
    for finger in {f.finger for f in found}:
        spelled[re.sub(r"\d+", lambda m: str(int(m[0])), unicodedata.normalize("NFKC", finger).casefold())].add(finger)
    twice = [sorted(s) for s in spelled.values() if len(s) > 1]
    return [
        f"{anchor}: {' and '.join(names)} are taken for different fingers ({len(twice)} such names differ in case or "
        "zeros alone); where they are one, rename the folders or files."
        for names in sorted(twice)[:1]
    ]
