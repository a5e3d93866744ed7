"""Which fingers are held out, which files are dropped, and whether there are fingers enough."""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

from ifvit.data.sources import SYNTHETIC, Print
from ifvit.data.walk import file_digest
from ifvit.errors import UserError


def split_by_finger(prints: Sequence[Print], held_out: float, seed: int) -> tuple[list[Print], list[Print]]:
    """Training prints and held-out ones; no finger is in both.

    In every database the fingers are ranked by a digest of (seed, finger) and the
    first ceil(held_out * n) held out, at least two so that there are impostor pairs, and
    at least two left. Databases of fewer than four fingers are ranked together. So a larger
    database's split does not change when others are added, nor when its folder is renamed or moved.

    Raises: ValueError unless 0 <= held_out < 1.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}, a fraction in [0, 1) is needed")
    databases = defaultdict(list)
    for p in prints:
        databases[p.database].append((p.finger, p.impression))
    groups = defaultdict(list)  # of members (database, finger) and what they are ranked by
    # Small databases may have fingers of the same name. They take turns; their own names decide the order at last only.
    turns = defaultdict(itertools.count)
    for database in sorted(databases, key=lambda d: (sorted(databases[d]), d.rpartition("/")[2], d)):
        members = {finger for finger, _ in databases[database]}
        small = len(members) < 4
        for finger in members:
            words = [finger]
            if database == SYNTHETIC:
                words = [SYNTHETIC, finger]  # as ever: runs on generated prints are gone on with
            elif small:
                words = [str(next(turns[finger])), finger]
            digest = hashlib.sha256("\0".join((str(seed), *words)).encode(errors="surrogateescape")).digest()
            groups[None if small else database].append((digest, (database, finger)))

    out = set()
    for members in groups.values():
        if held_out and len(members) >= 4:
            count = min(max(2, math.ceil(held_out * len(members))), len(members) - 2)
            out.update(member for _, member in sorted(members)[:count])
    train = [p for p in prints if p.identity not in out]
    return train, [p for p in prints if p.identity in out]


def drop_duplicates(prints: Sequence[Print], across: bool = True) -> tuple[list[Print], list[Print]]:
    """Kept and dropped: of files equal to the byte under different fingers, the first stays.

    They would be a genuine pair that is labelled impostor. `across`: databases; else a copy in another one does not
    count.
    """
    owner: dict[tuple, tuple[str, str]] = {}
    kept, dropped = [], []
    for p in prints:
        digest = file_digest(p.path)
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
