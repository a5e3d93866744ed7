"""What `python -m ifvit.gallery` offers."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ifvit import cli
from ifvit.gallery.store import Gallery
from ifvit.paths import resolve


def opened(folder: str) -> Gallery:
    return Gallery.open(Path(resolve(folder)))


@dataclass(frozen=True)
class List:
    """Names the prints that are enrolled."""

    gallery: Annotated[str, tyro.conf.Positional]
    json: bool = False
    """print them as JSON"""

    def run(self) -> int:
        gallery = opened(self.gallery)
        rows = [
            {"print": e.name, "finger": f"{e.database}/{e.finger}", "subject": e.subject, "digest": e.digest}
            for e in gallery.entries()
        ]
        if self.json:
            print(json.dumps(rows, indent=1))
        else:
            print("\n".join([f"{row['finger']}  {row['print']}" for row in rows]))
            print(f"{len(gallery)} prints of {gallery.fingers} fingers")
        return 0


@dataclass(frozen=True)
class Remove:
    """Takes prints out, all or none, by the names that `list` tells."""

    gallery: Annotated[str, tyro.conf.Positional]
    prints: Annotated[tuple[str, ...], tyro.conf.Positional]

    def run(self) -> int:
        gallery = opened(self.gallery)
        gallery.remove(self.prints)
        print(f"{len(self.prints)} prints removed; {self.gallery} has {len(gallery)} of {gallery.fingers} fingers")
        return 0


@dataclass(frozen=True)
class Compact:
    """Gives back the room of prints that were removed or replaced."""

    gallery: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        gallery = opened(self.gallery)
        print(f"{gallery.compact()} templates were of no print any more; {self.gallery} has {len(gallery)}")
        return 0


COMMANDS = {"list": List, "remove": Remove, "compact": Compact}


if __name__ == "__main__":
    sys.exit(cli.main_with_commands(COMMANDS, "ifvit.gallery"))
