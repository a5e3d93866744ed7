"""Paths in Google Cloud Storage, gs://BUCKET/…, that are read through TensorStore: no other package is needed.

Credentials are found where Google's tools have them: GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth
application-default login`, or the machine's own account. Without any, public buckets can be read.
"""

import errno
import io
import os
import re
from collections.abc import Iterator

import tensorstore as ts
from etils.epath.gpath import PosixGPath

from ifvit.errors import UserError

# A store that does not answer is told of within half a minute: TensorStore would try for a quarter of an hour, and wait
# for ever on a connection that has gone quiet.
RETRIES = {"gcs_request_retries": {"max_retries": 3, "initial_delay": "0.5s", "max_delay": "4s"}}
for _flag, _value in {"CONNECT_TIMEOUT_SECONDS": "5", "LOW_SPEED_TIME_SECONDS": "7", "LOW_SPEED_LIMIT_BYTES": "1"}.items():
    os.environ.setdefault(f"TENSORSTORE_CURL_{_flag}", _value)

_CONTEXT = ts.Context(RETRIES)
_NOTHING = slice(0, 0)  # of an object's bytes: whether it is there
_REFUSALS = ("ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNAVAILABLE")


class Refused(UserError):
    """The store does not answer, or does not let one in: nothing is known of what it holds."""


class GcsPath(PosixGPath):
    """Of a path's methods those that read; they raise Refused. A directory is there where something is below it."""

    def kvstore(self, key: str = "") -> dict:
        """TensorStore's key-value store of what is below this path, and there below `key`."""
        bucket, name = self._address()
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}/{key}".lstrip("/")}

    def exists(self) -> bool:
        return self.is_dir() or self._read(_NOTHING) is not None

    def is_dir(self) -> bool:
        return bool(self._below())

    def iterdir(self) -> Iterator["GcsPath"]:
        return (self / name for name in self._below())

    def open(self, mode: str = "r", **_) -> io.IOBase:
        if mode not in ("r", "rb"):
            raise UserError(f"{self} cannot be written: gs:// is only read; give a local path.")
        content = self._read()
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return io.BytesIO(content) if mode == "rb" else io.StringIO(content.decode())

    def _address(self) -> tuple[str, str]:
        bucket, _, name = os.fspath(self).removeprefix("gs://").partition("/")
        return bucket, name

    def _read(self, part: slice | None = None) -> bytes | None:
        """The content, or a part of it, of the object of this name; None where there is none."""
        bucket, name = self._address()
        found = self._ask({"driver": "gcs", "bucket": bucket}, lambda store: store.read(name or ".none", byte_range=part))
        return found.value if found.state == "value" else None

    def _below(self) -> set[str]:
        """Names of what is directly below."""
        keys = self._ask(self.kvstore(), lambda store: store.list())
        if not keys:  # TensorStore makes an empty list of one that is refused; of an object that is refused it tells
            self._read(_NOTHING)
        return {key.decode().split("/")[0] for key in keys} - {""}

    def _ask(self, kvstore: dict, question):
        try:
            return question(ts.KvStore.open(kvstore, context=_CONTEXT).result()).result()
        except Exception as e:  # TensorStore has no class of its own for them
            raise _refused(self, e) from None


def is_refusal(e: Exception) -> bool:
    """Whether an error is the store's own, and tells nothing of what it holds."""
    return isinstance(e, Refused) or str(e).startswith(_REFUSALS)


def check_refusal(path, e: Exception) -> None:
    """Raises Refused for such an error where `path` is in a store."""
    if isinstance(path, GcsPath) and is_refusal(e):
        raise e if isinstance(e, Refused) else _refused(path, e)


def _refused(path: GcsPath, e: Exception) -> Refused:
    why = " ".join(re.split(r" \[[\w ]+='", str(e))[0].split())                         # [http_response_code='403'] …
    why = re.sub(r"^(?:[A-Z_]+: )?(?:.*Error reading .*?gs://\S+: )?", "", why)[:160]  # on the way to what
    return Refused(f"{path} cannot be read ({why}); check the URL, the network and the credentials.")
