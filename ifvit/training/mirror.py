"""Keeps a run's growing files in a local folder and copies them to a bucket, where a file is only written whole."""

import logging
import tempfile
import threading
from pathlib import Path

from etils import epath

from ifvit import gcs
from ifvit.checkpoint.places import is_local

log = logging.getLogger("ifvit")


class Mirror:
    """Copies the files of the local folder `here` to `there` in a thread, so that no step waits for the network.

    At first it copies those of the files `names` that are `there` to `here`. Where `there` is local, both are the same
    folder. When a bucket refuses a file, it says so once, and tries again later.
    """

    def __init__(self, there: epath.Path, names: tuple[str, ...]):
        self._there = there
        self.here = Path(there)
        self._thread: threading.Thread | None = None
        if is_local(there):
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="ifvit-")
        self.here = Path(self._scratch.name)
        self._copied: dict[Path, tuple] = {}  # name -> time and size of the file when it was copied
        self._changed, self._closing, self._refused = threading.Event(), False, False
        for name in names:
            if (there / name).is_file():
                (self.here / name).write_bytes((there / name).read_bytes())

    def push(self) -> None:
        """Says that files have changed. They are copied once the copying before is done."""
        if is_local(self._there):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._changed.set()

    def close(self) -> None:
        """Returns when all files are copied or refused, and removes `here`."""
        if self._thread:
            self._closing = True
            self._changed.set()
            self._thread.join()
            self._copy()
        if not is_local(self._there):
            self._scratch.cleanup()

    def _run(self) -> None:
        while not self._closing:
            self._changed.wait()
            self._changed.clear()
            self._copy()

    def _copy(self) -> None:
        for file in sorted(f for f in self.here.rglob("*") if not f.name.startswith(".part-") and f.is_file()):
            name, state = file.relative_to(self.here), file.stat()
            if self._copied.get(name) != (state.st_mtime_ns, state.st_size):
                try:
                    self._there.upload(self.here, [name])
                    self._copied[name] = state.st_mtime_ns, state.st_size
                except gcs.Refused as e:
                    if not self._refused:
                        log.warning(
                            "⚠ %s could not be written (%s); what is missing there is copied when it can.",
                            self._there / name,
                            e.strerror,
                        )
                    self._refused = True
                    return
        self._refused = False
