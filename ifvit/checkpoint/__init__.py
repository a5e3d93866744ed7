"""Checkpoints: Orbax directories that exist whole or not at all, every leaf with a digest.

A checkpoint holds `state` (params, batch_stats, opt_state, step), all nested dictionaries with string keys, JSON
`metadata`, for a matcher `aligner` (Module 1's params and batch_stats), and from the end of Module 1's training on its
`template` (`models.template`). Orbax writes it while training goes on, and
every process writes its own shards (`writing`). TensorStore reads it on any mesh, and every process reads what its
devices need (`reading`). It lies in a directory or in a bucket, a gs:// URL (`places`). No array is used before its
digest has been compared.

    python -m ifvit.checkpoint verify DIR           every leaf against its digest; DIR may be a whole run
    python -m ifvit.checkpoint inspect DIR          tree, shapes, types, shardings, sizes, metadata, history
    python -m ifvit.checkpoint diff A B             exit 0 where every leaf of `state` is equal to the bit
    python -m ifvit.checkpoint import FILE.pkl DIR  the legacy format, read without running anything in it
    python -m ifvit.checkpoint export DIR FILE.pkl
"""

from ifvit.checkpoint.agreement import BARRIER_MS
from ifvit.checkpoint.loading import NETWORK, RETIRED, Checkpoint, from_legacy, load, or_packaged, restore
from ifvit.checkpoint.metadata import (
    Damaged,
    check_module,
    check_ours,
    complete,
    read_metadata,
    reason,
    sound,
    versions,
)
from ifvit.checkpoint.packed import PRETRAINED, is_packed, packaged
from ifvit.checkpoint.places import (
    OLD,
    UNFINISHED,
    as_path,
    as_writable_path,
    discard_unfinished,
    has_name,
    is_local,
    is_pickle,
    locate,
)
from ifvit.checkpoint.reading import read_leaves, shapes
from ifvit.checkpoint.tree import difference, kind, leaves, nested
from ifvit.checkpoint.writing import save, snapshot

__all__ = [
    "BARRIER_MS",
    "NETWORK",
    "OLD",
    "PRETRAINED",
    "RETIRED",
    "UNFINISHED",
    "Checkpoint",
    "Damaged",
    "as_path",
    "as_writable_path",
    "check_module",
    "check_ours",
    "complete",
    "difference",
    "discard_unfinished",
    "from_legacy",
    "has_name",
    "is_local",
    "is_packed",
    "is_pickle",
    "kind",
    "leaves",
    "load",
    "locate",
    "nested",
    "or_packaged",
    "packaged",
    "read_leaves",
    "read_metadata",
    "reason",
    "restore",
    "save",
    "shapes",
    "snapshot",
    "sound",
    "versions",
]
