"""Paths in Google Cloud Storage, gs://BUCKET/…, read and written through TensorStore: no other package is needed.

Credentials are found where Google's tools have them: GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth
application-default login`, or the machine's own account. Without any, public buckets can be read.
"""

import errno
import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorstore as ts
from etils.epath.gpath import PosixGPath

from ifvit.errors import UserError
from ifvit.files import write_whole

# A store that does not answer is told of within half a minute: TensorStore would try for a quarter of an hour, and wait
# for ever on a connection that has gone quiet.
RETRIES = {"gcs_request_retries": {"max_retries": 3, "initial_delay": "0.5s", "max_delay": "4s"}}
for _flag, _value in {
    "CONNECT_TIMEOUT_SECONDS": "5",
    "LOW_SPEED_TIME_SECONDS": "7",
    "LOW_SPEED_LIMIT_BYTES": "1",
}.items():
    os.environ[f"TENSORSTORE_CURL_{_flag}"] = os.environ.get(f"TENSORSTORE_CURL_{_flag}") or _value

MARK = "metadata/metadata"  # a checkpoint is one when this object is there: it is written last and deleted first
AT_ONCE = 8  # files on their way: as many as are in memory

_CONTEXT = ts.Context(RETRIES)
_NOTHING = slice(0, 0)  # of an object's bytes: whether it is there
_REFUSALS = (
    "ABORTED",
    "DEADLINE_EXCEEDED",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)


class Refused(UserError, OSError):
    """The store does not answer, or does not let one in: nothing is known of what it holds. `strerror` tells why."""


class GcsPath(PosixGPath):
    """A path in a bucket, with the methods that this project uses. They raise Refused.

    A directory exists where something is below it. The store cannot rename a folder: `copy_tree`, `rename` and `rmtree`
    go from object to object. They write MARKs last and delete them first, so that a checkpoint with a MARK is whole.
    """

    def kvstore(self, key: str = "") -> dict:
        """TensorStore's key-value store of what is below this path, and there below `key`."""
        bucket, name = self._address()
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}/{key}".lstrip("/")}

    def exists(self) -> bool:
        return self.is_dir() or self._read(_NOTHING) is not None

    def is_dir(self) -> bool:
        return bool(self._keys())

    def is_file(self) -> bool:
        return self._read(_NOTHING) is not None

    def iterdir(self) -> Iterator["GcsPath"]:
        return (self / name for name in {key.split("/")[0] for key in self._keys()} - {""})

    def open(self, mode: str = "r", **_) -> io.IOBase:
        if mode not in ("r", "rb"):
            raise NotImplementedError("an object is written in one piece: write_bytes, write_text")
        content = self._read()
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return io.BytesIO(content) if mode == "rb" else io.StringIO(content.decode("utf-8"))

    def _address(self) -> tuple[str, str]:
        bucket, _, name = os.fspath(self).removeprefix("gs://").partition("/")
        return bucket, name

    def _read(self, part: slice | None = None) -> bytes | None:
        """The content, or a part of it, of the object of this name; None where there is none."""
        bucket, name = self._address()
        found = self._ask(
            {"driver": "gcs", "bucket": bucket}, lambda store: store.read(name or ".none", byte_range=part)
        )
        return found.value if found.state == "value" else None

    def write_bytes(self, data: bytes) -> None:
        bucket, name = self._address()
        self._ask({"driver": "gcs", "bucket": bucket}, lambda store: store.write(name, data), "written")

    def write_text(self, data: str, **_) -> None:
        self.write_bytes(data.encode())

    def mkdir(self, **_) -> None:
        pass

    def unlink(self, missing_ok: bool = False) -> None:
        bucket, name = self._address()
        self._ask({"driver": "gcs", "bucket": bucket}, lambda store: store.write(name, None), "deleted")

    def rmtree(self, missing_ok: bool = False) -> None:
        self._delete(self._keys())

    def rename(self, target: "GcsPath") -> "GcsPath":
        keys = self._keys()
        self._copy(keys, target)
        self._delete(keys)
        return target

    def copy_tree(self, target: "GcsPath") -> None:
        """Copies what is below this path, through this machine."""
        self._copy(self._keys(), target)

    def _copy(self, keys: list[str], target: "GcsPath") -> None:
        for part in _marks_last(keys):
            _each(lambda key: (target / key).write_bytes((self / key).read_bytes()), part)

    def _delete(self, keys: list[str]) -> None:
        for part in reversed(_marks_last(keys)):
            _each(lambda key: (self / key).unlink(), part)

    def upload(self, folder: Path, files: list[Path]) -> None:
        """Copies files of a local folder to below this path."""
        _each(lambda file: (self / file).write_bytes((folder / file).read_bytes()), files)

    def download(self, folder: Path) -> None:
        """Copies what is below this path into a local folder; files that are there already are left as they are."""

        def fetch(key: str) -> None:
            file = folder / key
            if not key.endswith("/") and not file.exists():  # consoles make a folder of an object with / at its end
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, (self / key).read_bytes())

        _each(fetch, self._keys())

    def _keys(self) -> list[str]:
        """The keys below this path.

        TensorStore ends a list without an error where the store refuses to go on. So this asks again until a list has
        all that the one before had.
        """
        keys: set[bytes] = set()
        for _ in range(5):
            before, keys = keys, set(self._ask(self.kvstore(), lambda store: store.list()))
            if before and before <= keys:
                return [key.decode() for key in sorted(keys)]
            if not keys:  # of an object that is refused it tells
                self._read(_NOTHING)
                if not before:
                    return []
        raise _refused(self, OSError("its listing is cut off"))

    def _ask(self, kvstore: dict, question, what: str = "read"):
        try:
            return question(ts.KvStore.open(kvstore, context=_CONTEXT).result()).result()
        except Exception as e:  # TensorStore has no class of its own for them
            raise _refused(self, e, what) from None


def _marks_last(keys: list[str]) -> tuple[list[str], list[str]]:
    marks = [key for key in keys if f"/{key}".endswith(f"/{MARK}")]
    return [key for key in keys if key not in marks], marks


def _each(call, items: list) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(call, items))


def is_refusal(e: Exception) -> bool:
    """Whether an error is the store's own, and tells nothing of what it holds."""
    return isinstance(e, Refused) or str(e).startswith(_REFUSALS)


def check_refusal(path, e: Exception) -> None:
    """Raises Refused for such an error where `path` is in a store."""
    if isinstance(path, GcsPath) and is_refusal(e):
        raise e if isinstance(e, Refused) else _refused(path, e)


def _refused(path: GcsPath, e: Exception, what: str = "read") -> Refused:
    why = " ".join(re.split(r" \[[\w ]+='", str(e))[0].split())  # [http_response_code='403'] …
    # The beginning of the message, which says what was read or written, is left out.
    why = re.sub(r"^(?:[A-Z_]+: )?(?:.*Error (?:reading|writing|deleting) .*?gs://\S+: )?", "", why)[:160]
    refused = Refused(f"{path} cannot be {what} ({why}); check the URL, the network and the credentials.")
    refused.strerror = why
    return refused
