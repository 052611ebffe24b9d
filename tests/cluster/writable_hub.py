"""The stub of the Hub with the routes by which huggingface_hub commits: what is written is read back
by the routes of `hub_stub`.

`/api/repos/create`, `/api/validate-yaml`, `/api/models/ID/preupload/REV` (which files lie in
large-file storage), `/ID.git/info/lfs/objects/batch` with its uploads and verification, and
`/api/models/ID/commit/REV` (lines of JSON). As at the Hub, a commit with a large file that was not
uploaded is refused, and so is a token that may only read.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.hub_stub import LARGE, Handler, HubStub, running

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: one that may write, and one that may not."""


@dataclass
class WritableHub(HubStub):
    """The model `owner/texts`, which may not exist yet."""

    kind: str = "model"
    exists: bool = True
    is_private: bool | None = None  # as it was created
    blobs: dict[str, bytes] = field(default_factory=dict)  # of large-file storage, by SHA-256
    verified: set[str] = field(default_factory=set)
    loses_uploads: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


@contextmanager
def running_writable_hub() -> Iterator[WritableHub]:
    with running(WritableHub(), WritingHandler) as hub:
        yield hub


class WritingHandler(Handler):
    stub: WritableHub

    def do_PUT(self) -> None:  # noqa: N802 (http.server's name)
        content = self._body()
        if not self.stub.loses_uploads:
            self.stub.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, b"")

    def do_POST(self) -> None:  # noqa: N802, PLR0911 (http.server's name; one for each route)
        body = self._body()
        self.stub.asked.append((self.command, self.path, None, self.headers.get("Authorization")))
        if self.path == "/api/validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        refusal = self._refusal()
        if refusal is not None:
            status, code = refusal
            return self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        match self.path.split("?")[0].split("/")[1:]:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                assert (asked["organization"], asked["name"]) == ("owner", "texts")
                self.stub.exists, self.stub.is_private = True, asked["visibility"] == "private"
                return self._say(200, {"url": f"{self.stub.url}/owner/texts"})
            case ["api", "models", "owner", "texts", "preupload", "main"]:
                return self._say(200, {"files": [*map(_mode, json.loads(body)["files"])]})
            case ["owner", "texts.git", "info", "lfs", "objects", "batch"]:
                objects = [*map(self._object, json.loads(body)["objects"])]
                return self._say(200, {"transfer": "basic", "objects": objects})
            case ["lfs", "verify"]:
                return self._verify(json.loads(body))
            case ["api", "models", "owner", "texts", "commit", "main"]:
                return self._commit([json.loads(line) for line in body.splitlines()])
        return self.answer(404, b"{}")

    def _refusal(self) -> tuple[int, str] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            return 401, ""
        if not (self.stub.exists or self.path == "/api/repos/create"):
            return 404, "RepoNotFound"
        return None if token == WRITER else (403, "")

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.stub.blobs:
            return asked
        actions = {
            "upload": {"href": f"{self.stub.url}/lfs/{asked['oid']}"},
            "verify": {"href": f"{self.stub.url}/lfs/verify"},
        }
        return asked | {"actions": actions}

    def _verify(self, asked: dict[str, Any]) -> None:
        content = self.stub.blobs.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            return self._say(404, {"error": "no such object"})
        self.stub.verified.add(asked["oid"])
        return self._say(200, {})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        header, *changes = lines
        assert header["key"] == "header" and header["value"]["summary"]
        before = self.stub.branches.get("main")
        files = dict(self.stub.commits[before]) if before else {}
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                continue
            assert change["key"] == "lfsFile"
            if value["oid"] not in self.stub.blobs:
                return self._say(400, {"error": f"{value['path']} was not uploaded"})
            files[value["path"]] = self.stub.blobs[value["oid"]]
        commit = self.stub.commit(files)
        url = f"{self.stub.url}/owner/texts/commit/{commit}"
        return self._say(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def _say(self, status: int, values: dict[str, Any]) -> None:
        self.answer(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces: list[bytes] = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    assert re.fullmatch(r"[\w.-]+", file["path"])
    mode = "lfs" if file["path"].endswith(LARGE) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
