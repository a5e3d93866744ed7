"""Checks a run's folder before the run begins: a mistake shows in the first minute and not at the first save."""

import contextlib
import time
import uuid

import jax

from cluster.host import Host
from ifvit import checkpoint
from ifvit.config import Config
from ifvit.devices.processes import exchange, together
from ifvit.errors import UserError
from ifvit.training import run_folder

PATIENCE = 15.0  # seconds to wait until a shared file system shows one host's file to another


def check_hosts(config: Config, host: Host) -> None:
    """UserError unless all of several processes can write to the run's folder, and see the same folder."""
    if jax.process_count() > 1:
        check_folder(config, host)


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
