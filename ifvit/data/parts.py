"""Parts of a set, sessions, conditions and sensors: folders that hold the same fingers again.

They are no databases of their own, wherever in the path they stand, and become part of the impression's name.
"""

import os
import re
from pathlib import Path

from ifvit.data.names import nfc

_SETS = r"[-_ ]?(?:sets?|data|images?|imgs?|prints?|fingerprints?|split|part)?[-_ ]?\d*"
_KINDS = {
    "part": r"(?:images?|imgs?|prints?|fingerprints?|data)?[-_ ]?"
    r"(?:train(?:ing)?|val(?:id|idation)?|dev|test(?:ing)?|eval(?:uation)?|gallery|galleries|probes?|query|"
    r"queries|enrol(?:l|led|ment|lment|ments|lments)?|verif(?:y|ication)|references?|templates?)"
    rf"{_SETS}|(?:fold|split)[-_ ]?\d+",
    "session": r"(?:first|second|third|fourth|fifth|\d(?:st|nd|rd|th))[-_ ]?(?:session|visit|day|round)"
    r"|(?:session|sess|visit|day|round|week|month)[-_ ]?(?:\d+|[a-d])",
    "condition": r"(?:very[-_ ]?)?(?:wet|dry|normal|moist|oily|greasy|dirty|dusty|clean|latents?|humid|cold|warm|"
    r"sweaty|natural|distorted|indoors?|outdoors?|(?:low|light|medium|normal|high|heavy|strong)[-_ ]?pressure|"
    r"(?:low|medium|high|good|bad|poor)[-_ ]?quality)"
    r"(?:[-_ ]?(?:fingers?|skin|condition|prints?|fingerprints?|images?))?",
    "sensor": r"(?:device|sensor|scanner|reader|camera|phone)[-_ ]?(?:\d+|[a-z])|optical|capacitive|thermal|"
    r"ultrasonic|ultrasound|swipe|(?:touch|contact)(?:less|[-_ ]?based)?|smart[-_ ]?phone|mobile|webcam",
}
_KINDS = {kind: re.compile(p, re.IGNORECASE) for kind, p in _KINDS.items()}


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
    """`folder`, which is `top` or lies in it, without the folders that hold the same fingers again; and those.

    Of `top` itself the last ones count, those that follow one another: nobody's set belongs to the folder `test` in
    which they keep everything.
    """
    keep, parts = list(top.parts), []
    while len(keep) > 2 and (kind := kind_of(keep[-1])):
        parts.insert(0, (kind, keep.pop()))
    for word in folder.parts[len(top.parts) :]:
        if kind := kind_of(word):
            parts.append((kind, word))
        else:
            keep.append(word)
    return Path(*keep), tuple(parts)
