"""What folders of prints are read as: what a user should see before anything is trained on them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ifvit.config import DENSE_CONFIG
from ifvit.data import scale
from ifvit.data.images import RIDGE_PERIOD
from ifvit.data.prepare import Decoded, PrintSet, seem_light
from ifvit.data.sources import Print, Reading
from ifvit.data.walk import LeftOut, file_digest, natural
from ifvit.window import share_seen

UNREADABLE = "an image that cannot be read"
SHOWN = 8  # databases that a log line names


@dataclass(frozen=True)
class Database:
    """What the prints of a database, those that are used, have in common."""

    name: str
    layout: str  # which names it was known by
    fingers: int
    impressions: tuple[int, int]  # of a finger: fewest, most
    prints: int
    sizes: tuple[tuple[str, int], ...]  # "WIDTH × HEIGHT" in px and how many prints, the commonest first
    ppi: tuple[tuple[float, str, int], ...]  # resolution, what told it, how many prints; the commonest first
    period: float | None  # px of the file from ridge to ridge, median
    suggested_ppi: int | None  # at which that period is an adult's, about: fingers and sensors differ by a third
    fitting_ppi: float | None  # the resolution that the ridges tell, where it is far from that of many
    ridges: str  # dark or light: as read
    seem: str  # dark or light: what most prints look like
    blank: int  # prints that show no ridges
    seen: float  # share of a print's foreground that the networks' window holds, mean
    held_out: tuple[str, ...]  # fingers

    def counts(self) -> str:
        """`FINGERS × IMPRESSIONS`."""
        low, high = self.impressions
        return f"{self.fingers} × {low}" if low == high else f"{self.fingers} × {low} to {high}"

    def size(self) -> str:
        others = len(self.sizes) - 1
        return self.sizes[0][0] + (f" and {others} other size{'s' * (others > 1)}" if others else "")

    def resolution(self) -> str:
        ppi, told, _ = self.ppi[0]
        others = ", ".join(f"{n} at {other:g}" for other, _, n in self.ppi[1:4])
        rest = f", {others}{' …' * (len(self.ppi) > 4)}" if others else ""
        return f"{ppi:g} ({told}{rest})"

    def distance(self) -> str:
        """From ridge to ridge, px."""
        return f"{self.period:.1f}" if self.period else "?"

    def suggestion(self) -> str:
        """The resolution that the ridges suggest; loud where another is read."""
        about = f"about {self.suggested_ppi}" if self.suggested_ppi else "?"
        return f"⚠ {self.fitting_ppi:g}" if self.fitting_ppi else about

    def colour(self) -> str:
        return self.ridges if self.seem == self.ridges else f"⚠ {self.ridges}, seem {self.seem}"


@dataclass(frozen=True)
class Summary:
    databases: tuple[Database, ...]
    left_out: tuple[tuple[str, int, str], ...]  # reason, how many files or folders, one of them; the commonest first
    copies: tuple[tuple[str, str], ...]  # of files that are left out: path, and the equal file of another finger
    training: tuple[int, int] | None  # prints and fingers to train on; None where nothing is split
    held_out: tuple[int, int] | None

    @property
    def prints(self) -> int:
        return sum(d.prints for d in self.databases)

    @property
    def fingers(self) -> int:
        return sum(d.fingers for d in self.databases)

    def lines(self) -> list[str]:
        """Three lines for a run's log: what there is, at which scale, what is missing."""
        several = f" in {len(self.databases)} databases" if len(self.databases) > 1 else ""
        scale = [
            f"{d.name} {d.size()} px, ppi {d.resolution()}, ridges {d.distance()} px apart"
            + (f" ({d.suggestion()} ppi would fit)" if d.fitting_ppi else "")
            for d in self.databases
        ]
        return [
            f"Prints: {self.prints} of {self.fingers} fingers{several}: "
            + _some([f"{d.name} {d.counts()}" for d in self.databases], ", "),
            f"Scale: {_some(scale, '; ')}",
            f"Left out: {'; '.join(self.missing()) or 'nothing'}" + (f". {self.split()}" if self.training else ""),
        ]

    def table(self) -> list[str]:
        """A line a database, then what is left out, and the split."""
        columns = {
            "database": lambda d: d.name,
            "fingers × impressions": Database.counts,
            "prints": lambda d: str(d.prints),
            "size, px": Database.size,
            "ppi": Database.resolution,
            "ridge period, px": Database.distance,
            "suggests, ppi": Database.suggestion,
            "ridges": Database.colour,
            "seen": lambda d: f"{d.seen:.0%}",
            "names": lambda d: d.layout,
            "held out": lambda d: str(len(d.held_out)),
        }
        rows = [tuple(columns), *(tuple(show(d) for show in columns.values()) for d in self.databases)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
        total = f"{self.prints} prints of {self.fingers} fingers"
        return [*lines, "", total, *(f"left out: {what}" for what in self.missing()), self.split()]

    def split(self) -> str:
        sides = "{} prints of {} fingers to train on, {} prints of {} fingers held out"
        return sides.format(*self.training, *self.held_out)

    def missing(self) -> list[str]:
        """What is left out, counted by reason, each with an example."""
        parts = [f"{reason}: {count}, such as {example}" for reason, count, example in self.left_out]
        if self.copies:
            path, other = self.copies[0]
            what = f"equal to the byte to a print of another finger: {len(self.copies)}"
            parts.append(f"{what}, such as {path} (as {other})")
        return parts

    def to_json(self) -> dict:
        """The same as plain values."""
        databases = [
            asdict(d)
            | {
                "sizes": [{"size": size, "prints": n} for size, n in d.sizes],
                "ppi": [{"ppi": ppi, "from": told, "prints": n} for ppi, told, n in d.ppi],
            }
            for d in self.databases
        ]
        side = lambda counts: dict(zip(("prints", "fingers"), counts)) if counts else None
        return {
            "prints": self.prints,
            "fingers": self.fingers,
            "databases": databases,
            "left_out": [dict(zip(("reason", "count", "example"), row)) for row in self.left_out],
            "copies": [{"path": path, "equal_to": other} for path, other in self.copies],
            "training": side(self.training),
            "held_out": side(self.held_out),
        }


def summarise(
    reading: Reading,
    found: Decoded,
    used: Sequence[Print],
    split: tuple[Sequence[Print], Sequence[Print]] | None = None,
) -> Summary:
    """`reading`: what the folders hold; `found`: all of it decoded, generated prints too; `used`: what is left of that.

    `split`: of the used prints those to train on and those held out.
    """
    record = dict(zip(found.everything.prints, found.records))
    databases = defaultdict(list)
    for p in used:
        databases[p.database].append(p)
    other = seem_light(found)
    held_out = defaultdict(dict)
    for p in split[1] if split else ():
        held_out[p.database][p.finger] = None
    owners, copies = {}, []
    kept = set(used)
    for p in used:
        owners.setdefault(file_digest(p.path), p)
    for p, _ in found.readable:
        if p not in kept:
            copies.append((p.path, owners[file_digest(p.path)].path))
    gone = [*reading.left_out, *(LeftOut(why, UNREADABLE) for _, why in found.broken)]
    reasons = Counter(out.reason for out in gone)
    example = {out.reason: out.path for out in reversed(gone)}
    count = lambda part: (len(part), len({p.identity for p in part}))
    layout = lambda name: reading.layouts.get(name, "generated")
    return Summary(
        tuple(
            _database(
                name,
                layout(name),
                some,
                [record[p] for p in some],
                name in other,
                tuple(held_out[name]),
                _seen(found.everything.subset(some)),
            )
            for name, some in sorted(databases.items(), key=lambda item: natural(item[0]))
        ),
        tuple((reason, n, example[reason]) for reason, n in reasons.most_common()),
        tuple(copies),
        *(map(count, split) if split else (None, None)),
    )


def _database(
    name: str,
    layout: str,
    prints: list[Print],
    records: list[dict],
    otherwise: bool,
    held_out: tuple[str, ...],
    seen: float,
) -> Database:
    impressions = Counter(p.finger for p in prints)
    periods = [r["period"] for r in records if r["period"]]
    sizes = Counter(f"{r['width']} × {r['height']}" for r in records).most_common()
    resolutions = Counter((round(r["ppi"], 1), r["ppi_from"]) for r in records).most_common()
    groups = scale.groups((name, r) for r in records)
    fitting = next((scale.fitting_ppi(g, groups) for g in sorted(groups, key=lambda g: -len(g.records)) if g.off), None)
    light = prints[0].light
    colours = ("light", "dark") if light else ("dark", "light")
    period = float(np.median(periods)) if periods else None
    return Database(
        name=name,
        layout=layout,
        fingers=len(impressions),
        impressions=(min(impressions.values()), max(impressions.values())),
        prints=len(prints),
        sizes=tuple(sizes),
        ppi=tuple((ppi, told, n) for (ppi, told), n in resolutions),
        period=period,
        suggested_ppi=round(period / RIDGE_PERIOD) if period else None,
        fitting_ppi=fitting,
        ridges=colours[0],
        seem=colours[otherwise],
        blank=sum(r["blank"] for r in records),
        held_out=held_out,
        seen=seen,
    )


def _seen(prints: PrintSet) -> float:
    """Of the foreground in the window of the presets paper and cpu, 320 px at 500 ppi; mean over the prints."""
    return float(np.mean([share_seen(prints.canvas(i)[1], DENSE_CONFIG) for i in range(len(prints))]))


def _some(parts: list[str], between: str) -> str:
    more = f"{between}and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return between.join(parts[:SHOWN]) + more
