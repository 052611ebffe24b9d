"""A stub of the Hugging Face Hub on loopback: it answers the three routes that
cluster/storage/hub.py asks, no more.

`/api/datasets/ID/revision/REV` (the commit), `/api/datasets/ID/tree/REV/PATH` (files, two a page,
recursively) and `/datasets/ID/resolve/REV/PATH` (HEAD and GET with ranges; what lies in large-file
storage is redirected to `/cdn/`), with the headers and error codes that huggingface_hub reads; a
model's are `/api/models/ID/…` and `/ID/resolve/…`. It is not the Hub: what it leaves out is
unproven.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 2
LARGE = ".parquet", ".safetensors"
"""The endings of the files that lie in large-file storage."""


@dataclass
class HubStub:
    """One dataset, `owner/texts`, or one model of that name. `commit` adds a commit and moves a
    branch to it."""

    kind: str = "dataset"
    url: str = ""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    # method, path, range, token
    asked: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    # Of the next GETs of files: a status, or "short"
    faults: list[int | str] = field(default_factory=list)
    gated: bool = False

    def commit(self, files: dict[str, bytes], *, branch: str = "main") -> str:
        sha = hashlib.sha1(repr((len(self.commits), branch)).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@contextmanager
def running_hub(kind: str = "dataset") -> Iterator[HubStub]:
    with running(HubStub(kind), Handler) as hub:
        yield hub


HubT = TypeVar("HubT", bound=HubStub)


@contextmanager
def running(hub: HubT, handler: type[BaseHTTPRequestHandler]) -> Iterator[HubT]:
    """Serves a stub, whose `url` is then known, by requests' handlers with that `stub`."""
    bound = type("Bound", (handler,), {"stub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    stub: HubStub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for its headers to be acknowledged

    def do_GET(self) -> None:  # noqa: PLR0911 (one for each kind of answer)
        parts = urlsplit(self.path)
        self.stub.asked.append(
            (self.command, parts.path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if self.stub.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if found := re.fullmatch(r"/cdn/(\w+)/(.+)", parts.path):
            return self.send_file(self.stub.commits[found[1]][unquote(found[2])])
        routes = (
            r"/api/{0}s/([^/]+/[^/]+)/(revision|tree)/([^/]+)(?:/(.*))?",
            r"/{0}([^/]+/[^/]+)/(resolve)/([^/]+)/(.*)",
        )
        folders = self.stub.kind, "datasets/" if self.stub.kind == "dataset" else ""
        tried = [
            re.fullmatch(route.format(name), parts.path)
            for route, name in zip(routes, folders, strict=True)
        ]
        found = next((match for match in tried if match), None)
        if found is None or found[1] != "owner/texts":
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision, path = unquote(found[3]), unquote(found[4] or "")
        commit = revision if revision in self.stub.commits else self.stub.branches.get(revision)
        if commit is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if found[2] == "revision":
            return self.answer(200, json.dumps({"id": found[1], "sha": commit}).encode())
        if found[2] == "tree":
            return self.send_tree(commit, path, int(parse_qs(parts.query).get("cursor", ["0"])[0]))
        return self.send_resolved(commit, path)

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def send_tree(self, commit: str, folder: str, cursor: int) -> None:
        root = f"{folder}/" if folder else ""
        files = {
            path: data for path, data in self.stub.commits[commit].items() if path.startswith(root)
        }
        if not files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        folders = sorted(
            {path.rpartition("/")[0] for path in files if "/" in path.removeprefix(root)}
        )
        items = [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        for path, data in files.items():
            item = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
            if path.endswith(LARGE):
                item |= {
                    "lfs": {
                        "oid": hashlib.sha256(data).hexdigest(),
                        "size": len(data),
                        "pointerSize": 130,
                    }
                }
            items.append(item)
        more = cursor + PAGE < len(items)
        link = f'<{self.stub.url}{urlsplit(self.path).path}?recursive=true&cursor={cursor + PAGE}>; rel="next"'
        return self.answer(
            200, json.dumps(items[cursor : cursor + PAGE]).encode(), {"Link": link} if more else {}
        )

    def send_resolved(self, commit: str, path: str) -> None:
        data = self.stub.commits[commit].get(path)
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if path.endswith(LARGE):
            headers = {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{self.stub.url.replace('127.0.0.1', 'localhost')}/cdn/{commit}/{path}",
            }
            return self.answer(302, b"", headers)
        return self.send_file(data, {"X-Repo-Commit": commit, "ETag": f'"{_git_hash(data)}"'})

    def send_file(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        fault = self.stub.faults.pop(0) if self.command == "GET" and self.stub.faults else None
        if isinstance(fault, int):
            return self.answer(fault, b"")
        status, total, headers = 200, len(data), dict(headers or {})
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or total - 1), total - 1)
            status, data = 206, data[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
        return self.answer(status, data, headers, sent=len(data) // 2 if fault == "short" else None)

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        sent: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        self.close_connection = sent is not None

    def log_message(self, *arguments: object) -> None:
        pass


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
