"""Whether the resolution that prints are read at fits their ridges, which in adults are about 9 px apart at 500 ppi.

Prints of one database that are read at one resolution are judged together, by the median of their ridge periods:
single fingers differ by a third.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from ifvit.data.images import CANVAS_PPI, RIDGE_PERIOD
from ifvit.data.ridges import fine_detail, ridge_period

# px at 500 ppi: the medians of databases of adults' prints at hand run from 6.6 to 9.6, and to 11.9 of one sensor.
FINEST, COARSEST, DOUBTFUL = 6.25, 10.5, 13.6
SENSORS = (500.0, 512.0, 569.0, 1000.0)  # what sensors have; 300 is what an editor or a flat-bed scanner writes
ENLARGED = 10**-1.75  # less than this is in the finest detail of a picture that was enlarged by 1.6 or more
FEW = 5  # prints: fewer may be odd fingers
# So near to the resolution that the ridges tell, another resolution of the database (SIBLING), or a usual one (USUAL),
# is meant.
SIBLING, USUAL = 0.2, 0.09

ASKED = "the ridges"  # `Print.ppi_from` of prints that are to be read as their ridges tell: --ppi auto


@dataclass(frozen=True)
class Group:
    """Prints of a database that are read at one resolution: records of those that show ridges, a count of others."""

    database: str
    ppi: float
    records: tuple[dict, ...]
    unseen: int

    @property
    def unclear(self) -> bool:
        """Whether too few show ridges, or they tell too different periods, to judge the resolution by."""
        if len(self.records) <= 2 * self.unseen:
            return True
        fine, coarse = np.percentile([r["period"] for r in self.records], [25, 75])
        return bool(coarse > 1.7 * fine)

    @property
    def period(self) -> float:
        """px from ridge to ridge in the files, the median."""
        return float(np.median([r["period"] for r in self.records]))

    @property
    def at_500(self) -> float:
        """The same at 500 ppi, were the resolution right."""
        return self.period * CANVAS_PPI / self.ppi

    @property
    def off(self) -> bool:
        detail = [r["detail"] for r in self.records if r["detail"] is not None]
        return not self.unclear and self._is_off(
            self.at_500, float(np.median(detail)) if detail else 1.0, 1.0 if len(self.records) >= FEW else 1.2
        )

    @property
    def off_alone(self) -> int:
        """How many of the prints would be found to be off by themselves."""
        return sum(self._is_off(r["period"] * CANVAS_PPI / self.ppi, r["detail"] or 0.0, 1.0) for r in self.records)

    def _is_off(self, at_500: float, detail: float, margin: float) -> bool:
        if FINEST / margin <= at_500 <= COARSEST * margin:
            return False
        if not COARSEST * margin < at_500 <= DOUBTFUL:
            return True
        # Some sensors show ridges so wide. So are narrow ones of a picture that was enlarged, or has an editor's tag.
        told = Counter(r["ppi_from"] for r in self.records).most_common(1)[0][0]
        of_a_sensor = any(abs(self.ppi / sensor - 1) < 0.02 for sensor in SENSORS)
        return detail < ENLARGED or (told in ("--ppi", "file's tag") and not of_a_sensor)


def measured(path: str | os.PathLike, grey: UInt8[np.ndarray, "H W"], ppi: float, ppi_from: str) -> dict:
    """What is known of a print's scale, for its record.

    The file, its size in px, the resolution that it is read at and what tells that, px from ridge to ridge (None: no
    ridges seen), and how fine its detail is, where those are wide (else None).
    """
    period = ridge_period(grey)
    wide = period is not None and period * CANVAS_PPI / ppi > COARSEST
    return {
        "path": path,
        "width": grey.shape[1],
        "height": grey.shape[0],
        "ppi": ppi,
        "ppi_from": ppi_from,
        "period": period,
        "detail": fine_detail(grey) if wide else None,
    }


def groups(records: Iterable[tuple[str, dict]]) -> list[Group]:
    """Of (database, record) pairs."""
    found = defaultdict(list)
    for database, record in records:
        found[database, record["ppi"]].append(record)
    return [
        Group(database, ppi, tuple(r for r in some if r["period"]), sum(not r["period"] for r in some))
        for (database, ppi), some in found.items()
    ]


def fitting_ppi(group: Group, others: Iterable[Group]) -> float:
    """The resolution that the ridges tell: one of the database's others, or a usual one, if near, else to 5 ppi."""
    told = group.period / RIDGE_PERIOD
    right = [g.ppi for g in others if g.database == group.database and not g.unclear and not g.off]
    meant = [(ppi, SIBLING) for ppi in right] + [(500.0, USUAL), (1000.0, USUAL)]
    return next((ppi for ppi, near in meant if abs(told / ppi - 1) < near), 5.0 * max(1, round(told / 5)))


def fitted(records: Iterable[tuple[str, dict]]) -> dict[str, float]:
    """Paths of the prints whose resolution does not fit their ridges, and the one that does."""
    records = list(records)
    known = groups(records)
    ppi = {(g.database, g.ppi): fitting_ppi(g, known) for g in known if g.off}
    return {r["path"]: ppi[database, r["ppi"]] for database, r in records if (database, r["ppi"]) in ppi}


def remarks(records: Iterable[tuple[str, dict]]) -> list[str]:
    """What looks wrong with the resolutions of prints, each with a remedy; of (database, record) pairs."""
    records = list(records)
    known = groups(records)
    unclear = [
        f"⚠ The distance of ridges cannot be measured on {g.database}, {len(g.records) + g.unseen} prints read at "
        f"{g.ppi:.4g} ppi: they are too coarse or too small, or no prints; look at some with "
        "python -m ifvit.prints DIR --sheet FILE.png."
        for g in known
        if g.unclear and len(g.records) + g.unseen >= FEW
    ]
    return [_off(g, fitting_ppi(g, known)) for g in known if g.off] + unclear + _mixed(records, known) + _notes(records)


def _off(group: Group, fit: float) -> str:
    told = " and ".join(sorted({r["ppi_from"] for r in group.records}))
    return (
        f"⚠ The ridges of {group.database} are {group.at_500:.1f} px apart at 500 ppi if its prints have the "
        f"{group.ppi:.4g} ppi that they are read at ({told}), and adults' are about 9: {fit:g} ppi would fit, which "
        f"--ppi auto takes ({group.off_alone} of {len(group.records)} prints tell so by themselves, "
        f"e.g. {group.records[0]['path']})."
    )


def _mixed(records: list[tuple[str, dict]], known: list[Group]) -> list[str]:
    """Prints of one database and one size in pixels at several resolutions, unless their ridges confirm these."""
    sizes = defaultdict(lambda: defaultdict(list))
    for database, r in records:
        sizes[database, r["width"], r["height"]][r["ppi"]].append(r)
    at_500 = {(g.database, g.ppi): g.at_500 for g in known if g.records}
    said = {}
    for (database, width, height), by_ppi in sizes.items():
        periods = [at_500.get((database, ppi)) for ppi in by_ppi]
        confirmed = all(periods) and max(periods) <= 1.25 * min(periods)
        if max(by_ppi) > 1.02 * min(by_ppi) and not confirmed and database not in said:
            some = "; ".join(
                f"{len(rs)} at {ppi:.4g} ppi ({rs[0]['ppi_from']}), such as {rs[0]['path']}"
                for ppi, rs in sorted(by_ppi.items(), key=lambda item: -len(item[1]))
            )
            said[database] = (
                f"⚠ Prints of {database} have one size, {width} × {height} pixels, and are read at several "
                f"resolutions: {some}. --ppi NUMBER reads all at one, --ppi auto as their ridges tell."
            )
    return list(said.values())


def _notes(records: list[tuple[str, dict]]) -> list[str]:
    """Files that hold more than one print at one resolution, by how they were read."""
    files = defaultdict(list)
    for _, r in records:
        if r["note"]:
            files[r["note"]].append(r["path"])
    return [f"⚠ {len(paths)} files {note}, such as {min(paths)}" for note, paths in files.items()]
