"""What is checked and settled before a run begins: a mistake shows in the first minute and not at the first save."""

import contextlib
import json
import time
import uuid

import jax

from cluster.host import Host
from ifvit import checkpoint
from ifvit.config import Config
from ifvit.devices.precision import fastest
from ifvit.devices.processes import exchange, together
from ifvit.errors import UserError
from ifvit.training import run_folder

PATIENCE = 15.0  # seconds to wait until a shared file system shows one host's file to another


def check_hosts(config: Config, host: Host) -> None:
    """UserError unless all of several processes can write to the run's folder, and see the same folder."""
    if jax.process_count() > 1:
        check_folder(config, host)


def settled(config: Config, resume: str) -> Config:
    """`config` with what `compute_dtype=auto` means in this run, on all its processes the same.

    It is what the run that goes on has computed in; of a new run bfloat16 where all processes are fast in it.
    """
    if config.compute_dtype != "auto":
        return config
    said = exchange("compute_dtype", _dtype_before(config, resume) or fastest())
    dtype = said[0] if len(set(said)) == 1 else "float32"
    print(f"compute_dtype=auto: {dtype}", flush=True)
    return config.replace(compute_dtype=dtype)


def _dtype_before(config: Config, resume: str) -> str:
    """Of the run that goes on; nothing where there is none, or none that can be read."""
    try:
        if resume == "never":
            return ""
        if resume != "auto":
            return checkpoint.read_metadata(checkpoint.locate(resume))["config"]["compute_dtype"]
        found = checkpoint.as_path(config.checkpoint_dir) / "config.json"
        return json.loads(found.read_text(encoding="utf-8"))["compute_dtype"]
    except (OSError, ValueError, KeyError, TypeError, UserError):  # the resume itself says what is wrong
        return ""


def check_folder(config: Config, host: Host) -> None:
    """Makes the same check for a single process too, which leaves no new folder behind."""
    folder = checkpoint.as_writable_path(config.checkpoint_dir)
    alone = jax.process_count() == 1 and checkpoint.is_local(folder)
    made = [p for p in (folder, *folder.parents) if not p.exists()] if alone else []
    mark = exchange("mark", uuid.uuid4().hex)[0]
    seen = folder / f".seen-by-all-{mark}"

    def write():
        if why := run_folder.writable(folder):
            raise UserError(
                f"Checkpoints cannot be written to {folder} ({why}); give a directory that "
                + ("all hosts share and may write to." if jax.process_count() > 1 else "may be written to.")
            )
        if jax.process_index() == 0:
            seen.write_bytes(b"")

    def look():
        until = time.monotonic() + PATIENCE
        while not seen.exists():
            if time.monotonic() > until:
                raise UserError(
                    f"{folder} does not show what another host has written there; checkpoints need a directory that "
                    "all hosts share."
                )
            time.sleep(0.2)

    try:
        together("write", write, host)
        together("look", look, host)
    finally:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                seen.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()
