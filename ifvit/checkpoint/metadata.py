"""A checkpoint's metadata: JSON with a digest of every leaf, and with a digest of the JSON itself."""

import contextlib
import errno
import hashlib
import json
import os
from importlib import metadata as packages

from etils import epath

from ifvit import gcs
from ifvit.checkpoint import packed
from ifvit.errors import UserError

FORBIDDEN = "may not be read"


class Damaged(UserError):
    """A checkpoint's content is not what was written."""


def read_metadata(folder: epath.Path) -> dict:
    """The JSON metadata; UserError where there is none, as in a half-written checkpoint."""
    is_packed = packed.is_packed(folder)
    try:
        metadata = (
            packed.read_header(folder)
            if is_packed
            else json.loads((folder / "metadata" / "metadata").read_text(encoding="utf-8"))
        )
        if not (is_packed or (folder / "state").is_dir()) or not {"config"} <= set(metadata):
            raise KeyError("state or config")
        if "digest" not in metadata and "digests" not in metadata:
            metadata = _of_other_software(folder, metadata)
        elif metadata["digest"] != digest_of(metadata):
            raise ValueError("its metadata do not have their digest")
    except Exception as e:
        check_access(folder, e)
        where = "its header" if is_packed else "metadata/metadata"
        raise Damaged(
            f"{folder} is not a whole checkpoint ({where}: {first_line(e)}); it is half-written or something "
            "else: use another one."
        ) from e
    return metadata


def complete(folder: epath.Path) -> bool:
    """Whether a directory holds a whole checkpoint, as far as its metadata tell."""
    try:
        read_metadata(folder)
    except UserError:
        return False
    return True


def check_module(folder, metadata: dict, module: str | None) -> None:
    if module and metadata["module"] != module:
        kinds = {"dense_reg": "Module 1 (dense registration)", "matcher": "Module 2 (matcher)"}
        raise UserError(
            f"{folder} is a checkpoint of {kinds.get(metadata['module'], metadata['module'])}, not of "
            f"{kinds[module]}; give the path of one of those."
        )


def check_ours(folder, metadata: dict) -> None:
    """UserError for a checkpoint of other code, which can only seed Module 2."""
    if metadata.get("foreign"):
        raise UserError(
            f"{folder} was made by other code: its transformer can seed Module 2 (--pretrained_ckpt), the rest "
            "is not of this project's networks. Give a checkpoint that was trained here."
        )


def check_access(folder: epath.Path, e: Exception) -> None:
    """UserError where `e` says that a checkpoint may not be read, or not now: then it is not damaged."""
    gcs.check_refusal(folder, e)
    if is_forbidden(e):
        raise UserError(f"Checkpoint {folder} {FORBIDDEN}; get the permission for it.") from None


def is_forbidden(e: Exception) -> bool:
    return isinstance(e, PermissionError) or "PERMISSION_DENIED" in str(e) or gcs.is_refusal(e)


def _of_other_software(folder: epath.Path, metadata: dict) -> dict:
    """The metadata of a checkpoint that other software wrote with Orbax.

    It has no digests, so nothing can be checked; Orbax tells the names of the leaves.
    """
    import jax
    import orbax.checkpoint as ocp

    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        tree = handler.metadata(folder / "state").tree
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path({"state": tree})[0]]
    names = ["/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path in paths]  # optax has tuples
    metadata = sound(metadata)
    foreign = {} if "resnet_widths" in metadata["config"] else {"foreign": True}
    module = "matcher" if any("_transformer_global/" in n for n in names) else "dense_reg"
    print(f"⚠ {folder} has no digests (other software wrote it): its content cannot be checked.", flush=True)
    return {"module": module} | metadata | foreign | {"digests": dict.fromkeys(names)}


def sound(metadata: dict) -> dict:
    """Metadata of other software; a key that is missing or of another type gets this project's default."""
    ours = {
        "epoch": 0,
        "step": 0,
        "finished": False,
        "best": None,
        "value": None,
        "history": [],
        "config": {},
        "data": "",
    }
    kinds = {
        "module": str,
        "epoch": (int, float),
        "step": int,
        "finished": bool,
        "best": (dict, type(None)),
        "value": (int, float, type(None)),
        "history": list,
        "config": dict,
        "data": str,
        "timestamp": str,
    }
    kept = {
        k: v
        for k, v in metadata.items()
        if isinstance(v, kinds.get(k, object)) and k not in ("digest", "digests", "shardings")
    }
    if kept.get("module") not in ("dense_reg", "matcher"):
        kept.pop("module", None)
    if not all(isinstance(attempt, dict) for attempt in kept.get("history", [])):
        del kept["history"]
    return ours | kept


def versions() -> dict[str, str]:
    return {p: packages.version(p) for p in ("ifvit", "jax", "flax", "optax", "orbax-checkpoint")}


def digest_of(metadata: dict) -> str:
    rest = {k: v for k, v in metadata.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:32]


def reason(e: BaseException) -> str:
    """Why a write failed, in a few words."""
    if isinstance(e, gcs.Refused):
        return e.strerror
    text = f"{e} {e.__cause__ or ''}"
    if "RESOURCE_EXHAUSTED" in text:
        return os.strerror(errno.ENOSPC)
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO):
        if os.strerror(number) in text or getattr(e, "errno", None) == number:
            return os.strerror(number)
    return first_line(e)


def first_line(e: Exception) -> str:
    text = str(e).strip().splitlines()
    return (text[0] if text else type(e).__name__)[:160]
