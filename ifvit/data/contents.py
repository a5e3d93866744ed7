"""What prints are by their files' bytes, whatever folders they lie in and however those are called."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ifvit.data.sources import SYNTHETIC, Print
from ifvit.data.walk import file_digest

SAMPLE = 32  # prints of a database in a sample, at most
ALL_SAMPLES = 2048  # and of all databases


def data_digest(prints: Iterable[Print]) -> str:
    """Of which files are of one finger, and which fingers of one database, in whatever folders.

    Generated prints count by their names: another machine may draw a grey level otherwise.
    """
    prints = list(prints)
    made = sorted((p.database, p.finger, p.impression) for p in prints if p.database == SYNTHETIC)
    real = sorted(_contents([p for p in prints if p.database != SYNTHETIC]).values())
    parts = [made, real] if real else made  # what generated prints alone have always had
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def in_order_of_contents(prints: Sequence[Print]) -> list[Print]:
    """The databases in an order that does not depend on their names, the prints of each as they come."""
    contents = {
        database: sorted((p.finger, os.stat(p.path).st_size) for p in some)
        for database, some in _by_database(prints).items()
    }
    order = {database: k for k, database in enumerate(sorted(contents, key=lambda d: (contents[d], d)))}
    return sorted(prints, key=lambda p: order[p.database])


def sample(prints: Iterable[Print]) -> list[str]:
    """Digests of some files of each database, the lowest ones, by which it is known again. Of generated prints none."""
    databases = _by_database([p for p in prints if p.database != SYNTHETIC])
    size = max(1, min(SAMPLE, ALL_SAMPLES // max(1, len(databases))))
    return sorted(d for some in databases.values() for d in sorted({file_digest(p.path)[:16] for p in some})[:size])


def known(digests: Iterable[str], prints: Iterable[Print]) -> list[Print]:
    """The prints that are in a `sample`."""
    digests = set(digests)
    return [p for p in prints if digests and p.database != SYNTHETIC and file_digest(p.path)[:16] in digests]


def _by_database(prints: Iterable[Print]) -> dict[str, list[Print]]:
    databases = defaultdict(list)
    for p in prints:
        databases[p.database].append(p)
    return databases


def _contents(prints: Iterable[Print]) -> dict[str, list[tuple[str, str]]]:
    return {d: sorted((p.finger, file_digest(p.path)) for p in some) for d, some in _by_database(prints).items()}
