"""A Google Cloud Storage of one's own on 127.0.0.1: of its JSON API what reading takes, objects in memory.

https://cloud.google.com/storage/docs/json_api/v1/objects: `list` with its pages, and `get` of an object's
metadata, its content, or a range of that.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3  # names in one answer to a listing; the real one sends 1000


class FakeGcs:
    """Serves `buckets[BUCKET][NAME]` at `url`, from `with` to its end.

    A place is `BUCKET/NAME`, for a listing `BUCKET/`, or a part of that.
    """

    def __init__(self):
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.faults: dict[str, tuple[int, str]] = {}  # place -> the status code and message that it answers with
        self.hiccups: set[str] = set()                # places that will answer 503 once
        self.asked: list[str] = []                    # places, in the order of the requests
        self.tokens: set[str | None] = set()          # whom the requests said they come from

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

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
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        bucket, name = map(unquote, re.fullmatch(r"/storage/v1/b/([^/]+)/o/?(.*)", url.path).groups())
        asked = f"{bucket}/{name}"
        self.store.asked.append(asked)
        self.store.tokens.add(self.headers.get("Authorization"))
        if here := {place for place in self.store.hiccups if place in asked}:
            self.store.hiccups -= here
            return self._fail(503, "Backend error")
        for place, answer in self.store.faults.items():
            if place in asked:
                return self._fail(*answer)
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

    def _list(self, objects: dict[str, bytes], query: dict) -> None:
        names = [n for n in sorted(objects) if query.get("startOffset", "") <= n and
                 ("endOffset" not in query or n < query["endOffset"])]
        at = int(query.get("pageToken", 0))
        more = {"nextPageToken": str(at + PAGE)} if names[at + PAGE :] else {}
        self._json(200, {"items": [_metadata(n, objects[n]) for n in names[at : at + PAGE]]} | more)

    def _content(self, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(200, content)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return self._fail(416, "The requested range cannot be satisfied.")
        self._send(206, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

    def _fail(self, code: int, message: str) -> None:
        self._json(code, {"error": {"code": code, "message": message}})

    def _json(self, code: int, value: dict) -> None:
        self._send(code, json.dumps(value).encode())

    def _send(self, code: int, body: bytes, headers: dict[str, str] = {}) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "x-goog-generation": "1", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def _metadata(name: str, content: bytes) -> dict:
    return {"kind": "storage#object", "name": name, "size": str(len(content)), "generation": "1"}
