"""A Google Cloud Storage of one's own on 127.0.0.1: of its JSON API what TensorStore takes, objects in memory.

https://cloud.google.com/storage/docs/json_api/v1/objects: `list` with its pages, `get` of an object's metadata, its
content, or a range of that, `insert` in one piece, and `delete`.
"""

import json
import re
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class FakeGcs:
    """Serves `buckets[BUCKET][NAME]` at `url`, from `with` to its end.

    A place is `BUCKET/NAME`, for a listing `BUCKET/`, or a part of that.
    """

    def __init__(self):
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.faults: dict[str, tuple[int, str]] = {}  # place -> the status code and message that it answers with
        self.read_only: dict[str, tuple[int, str]] = {}  # the same for what is written and deleted
        self.hiccups: set[str] = set()  # places that will answer 503 once
        self.asked: list[str] = []  # places, in the order of the requests
        self.changed: list[str] = []  # `+PLACE` that was written, `-PLACE` that was deleted, in order
        self.page = 3  # names in one answer to a listing; the real one sends 1000
        self.cut_lists = 0  # listings that will end in an error after their first page
        self._spare, self._then = 0, None
        self.tokens: set[str | None] = set()  # whom the requests said they come from

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def after(self, count: int, answer: tuple[int, str]) -> None:
        """That many more changes are made, then none."""
        self._spare, self._then = count, answer

    def mend(self) -> None:
        """From now on changes are made again."""
        self.read_only, self._then = {}, None

    def spend(self) -> None:
        """One change is made."""
        if self._then and self._spare == 0:
            self.read_only, self._then = {"": self._then}, None
        self._spare -= 1

    def upload(self, source: Path, bucket: str, name: str) -> None:
        """What `gcloud storage cp -r` does with a folder or a file."""
        objects = self.buckets.setdefault(bucket, {})
        if source.is_file():
            objects[name] = source.read_bytes()
        for file in source.rglob("*"):
            if file.is_file():
                objects[f"{name}/{file.relative_to(source)}"] = file.read_bytes()


class _Handler(BaseHTTPRequestHandler):
    store: FakeGcs
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet

    def do_GET(self):
        bucket, name, query = self._asked()
        if self._faulty(bucket, name):
            return
        objects = self.store.buckets.get(bucket)
        if objects is None:
            return self._fail(404, "The specified bucket does not exist.")
        if not name:
            return self._list(objects, query)
        if name not in objects:
            return self._fail(404, f"No such object: {bucket}/{name}")
        if query.get("alt") == "media":
            return self._content(objects[name])
        self._json(200, _metadata(name, objects[name]))

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        bucket, _, query = self._asked()
        name = query["name"]
        self.store.spend()
        if self._faulty(bucket, name, self.store.read_only):
            return
        if bucket not in self.store.buckets:
            return self._fail(404, "The specified bucket does not exist.")
        self.store.buckets[bucket][name] = content
        self.store.changed.append(f"+{bucket}/{name}")
        self._json(200, _metadata(name, content))

    def do_DELETE(self):
        bucket, name, _ = self._asked()
        self.store.spend()
        if self._faulty(bucket, name, self.store.read_only):
            return
        if self.store.buckets.get(bucket, {}).pop(name, None) is None:
            return self._fail(404, f"No such object: {bucket}/{name}")
        self.store.changed.append(f"-{bucket}/{name}")
        self._send(204, b"")

    def _asked(self) -> tuple[str, str, dict]:
        """Bucket, object and query."""
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        return *map(unquote, re.fullmatch(r"(?:/upload)?/storage/v1/b/([^/]+)/o/?(.*)", url.path).groups()), query

    def _faulty(self, bucket: str, name: str, more: dict | None = None) -> bool:
        """Whether this place is out of order, and has said so."""
        asked = f"{bucket}/{name}"
        self.store.asked.append(asked)
        self.store.tokens.add(self.headers.get("Authorization"))
        if here := {place for place in self.store.hiccups if place in asked}:
            self.store.hiccups -= here
            self._fail(503, "Backend error")
            return True
        answer = next((answer for place, answer in (self.store.faults | (more or {})).items() if place in asked), None)
        if answer:
            self._fail(*answer)
        return answer is not None

    def _list(self, objects: dict[str, bytes], query: dict) -> None:
        names = [
            n
            for n in sorted(objects)
            if query.get("startOffset", "") <= n and ("endOffset" not in query or n < query["endOffset"])
        ]
        at = int(query.get("pageToken", 0))
        if at and self.store.cut_lists:
            self.store.cut_lists -= 1
            return self._fail(403, "Enough.")
        end = at + self.store.page
        more = {"nextPageToken": str(end)} if names[end:] else {}
        self._json(200, {"items": [_metadata(n, objects[n]) for n in names[at:end]]} | more)

    def _content(self, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(200, content, {"x-goog-generation": _generation(content)})
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return self._fail(416, "The requested range cannot be satisfied.")
        self._send(
            206,
            content[start:end],
            {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}", "x-goog-generation": _generation(content)},
        )

    def _fail(self, code: int, message: str) -> None:
        self._json(code, {"error": {"code": code, "message": message}})

    def _json(self, code: int, value: dict) -> None:
        self._send(code, json.dumps(value).encode())

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def _metadata(name: str, content: bytes) -> dict:
    return {"kind": "storage#object", "name": name, "size": str(len(content)), "generation": _generation(content)}


def _generation(content: bytes) -> str:
    """Another one for another content."""
    return str(zlib.crc32(content) + 1)
