"""From `--dataset_root` to prepared prints, split by finger."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cluster.host import Host
from ifvit import gcs
from ifvit.config import Config
from ifvit.data import synthetic
from ifvit.data.contents import in_order_of_contents
from ifvit.data.prepare import Decoded, PrintSet, decoded, prepare
from ifvit.data.sources import SYNTHETIC, Print, Reading, read, read_root
from ifvit.data.split import require_fingers, split_by_finger
from ifvit.data.summary import summarise
from ifvit.devices.cores import cores
from ifvit.devices.processes import require_same, together
from ifvit.errors import UserError
from ifvit.paths import cache_dir, resolve_data

log = logging.getLogger("ifvit")


def gather(config: Config, host: Host) -> tuple[PrintSet, PrintSet, PrintSet]:
    """All prints of a configuration, those to train on, and those of the held-out fingers.

    Of several processes of a host only the first one decodes; the others use its result. UserError when there are fewer
    than two fingers, or the split leaves a side with fewer. UserError also, before anything is decoded, when hosts have
    different prints.
    """
    reading = together("files", lambda: read_prints(config), host)
    require_same(
        "The list of prints",
        listing(reading.prints),
        host.name,
        "give a --dataset_root that is the same on every host.",
    )
    everything, found = together("prints", lambda: _prepared(config, reading.prints), host)
    require_same(
        "The list of readable prints",
        listing(everything.prints),
        host.name,
        "one of the hosts cannot read what others can.",
    )
    train, held_out = split(everything.prints, config.held_out, config.data_seed)
    count = lambda part: len({p.identity for p in part})
    if min(count(train), count(held_out)) < 2:
        raise UserError(
            f"Of {count(everything.prints)} fingers {count(held_out)} are held out (held_out={config.held_out:g}), and "
            f"{count(train)} are left to train on; each needs two or more. Give prints of more fingers."
        )
    for line in summarise(reading, found, everything.prints, (train, held_out)).lines():
        log.info("%s", line)
    return everything, everything.subset(train), everything.subset(held_out)


def split(prints: Sequence[Print], held_out: float, seed: int) -> tuple[list[Print], list[Print]]:
    """The prints to train on, and those of the held-out fingers.

    Generated prints are held out only where there are no real ones.
    """
    train, kept_back = split_by_finger(prints, held_out, seed)
    return train, [p for p in kept_back if p.database != SYNTHETIC] or kept_back


def _prepared(config: Config, real: list[Print]) -> tuple[PrintSet, Decoded]:
    """The decoded prints: real ones, generated ones, or both (`synthetic_share`).

    Generated ones are made once and kept in the cache.
    """
    if real and SYNTHETIC in config.dataset_root and not config.synthetic_share:
        raise UserError(
            "--dataset_root names `synthetic` beside other prints, and no pair would be drawn from it: synthetic_share "
            "is 0. Give it a share (--set synthetic_share=0.25; in train_all of dense. and match.), or leave "
            "`synthetic` out."
        )
    prints = real + (generated(config) if SYNTHETIC in config.dataset_root or config.synthetic_share > 0 else [])
    require_fingers(prints)
    everything = prepare(prints, config.canvas_size, config.max_broken, cache_dir())
    require_fingers(everything.prints)
    return everything, decoded(prints, config.canvas_size, cache_dir())


def read_prints(config: Config) -> Reading:
    """The real prints of every root."""
    roots = [r for r in config.dataset_root if r != SYNTHETIC]
    if config.names and not roots:
        raise UserError(
            f"--names '{config.names}' tells how names are to be read, and all prints are generated; give a "
            "--dataset_root, or leave it out."
        )
    return read_folders(roots, config.ppi or None, config.ridges, config.names) if roots else Reading([], (), {})


def read_folders(roots: Sequence[str], ppi: float | Literal["auto"] | None, ridges: str, names: str) -> Reading:
    """What some folders, or buckets, are read as, in an order that their names do not change."""
    reading = read([local_root(r) for r in roots], ppi, ridges, names)
    return replace(reading, prints=in_order_of_contents(reading.prints))


def overlap(roots, others) -> bool:
    """Whether prints of some roots are also of others: the same folder, whatever its path, or one within the other."""
    places = [
        [Path(r) if r == SYNTHETIC or "://" in r else Path(os.path.realpath(resolve_data(r))) for r in which]
        for which in (roots, others)
    ]
    return any(a == b or a in b.parents or b in a.parents for a in places[0] for b in places[1])


def listing(prints: Sequence[Print]) -> str:
    """A hash of the prints, in their order, and their files' sizes: what hosts that see the same data have in common.

    Where one host has it under another name is its own affair: databases count by their place in the order.
    """
    order = {database: k for k, database in enumerate(dict.fromkeys(p.database for p in prints))}
    names = [(order[p.database], p.finger, p.impression, os.stat(p.path).st_size) for p in prints]
    return f"{len(names)} prints, {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]}"


def local_root(root: str) -> str:
    """A root as a folder on this host. Prints in a bucket that are not in the cache yet are copied there."""
    if not root.startswith("gs://"):
        return resolve_data(root)
    there, folder = gcs.GcsPath(root), cache_dir() / "prints" / root.removeprefix("gs://").strip("/")
    if not there.is_dir():
        raise UserError(f"There is nothing at {root}. Check the URL of --dataset_root.")
    there.download(folder)
    return str(folder)


def generated(config: Config) -> list[Print]:
    files = synthetic.prints(
        config.data_seed, config.synthetic_fingers, config.synthetic_impressions, cache_dir(), workers=cores()
    )
    wanted = {str(f) for f in files}
    return [replace(p, database=SYNTHETIC) for p in read_root(files[0].parent, synthetic.PPI) if p.path in wanted]
