"""A stub of the parts of Grafana's HTTP API that raymill uses: it records each request, keeps what
it is given, and fails as it is told. No Grafana: what a real one makes of the requests it does not
show."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class GrafanaStub:
    token = "glsa_of_the_stub"

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.failures: list[tuple[int, str]] = []  # status and body of the next answers
        self.lost_answers = 0  # of the next POSTs, which are carried out
        self.kept: dict[str, dict[str, Any]] = {}  # by path
        self.annotations: list[dict[str, Any]] = []
        self.url = ""

    def answer(  # noqa: PLR0911
        self, method: str, path: str, query: dict[str, list[str]], body: Any
    ) -> tuple[int, Any]:
        match method, path.strip("/").split("/"):
            case "GET", ["annotations"]:
                return 200, [
                    note
                    for note in self.annotations
                    if set(query["tags"]) <= set(note["tags"])
                    and int(query["from"][0]) <= note["time"] <= int(query["to"][0])
                ]
            case "POST", ["annotations"]:
                self.annotations.append(body)
                return 200, {"message": "Annotation added", "id": len(self.annotations)}
            case "POST", ["dashboards", "db"]:
                assert body["overwrite"] and f"/folders/{body['folderUid']}" in self.kept
                uid = body["dashboard"]["uid"]
                version = self.kept.get(f"/dashboards/uid/{uid}", {"dashboard": {"version": 0}})[
                    "dashboard"
                ]["version"]
                stored = body["dashboard"] | {"id": 7, "version": version + 1}
                self.kept[f"/dashboards/uid/{uid}"] = {
                    "dashboard": stored,
                    "meta": {"folderUid": "raymill"},
                }
                return 200, {"uid": uid, "status": "success", "version": version + 1}
            case "POST", ["folders"]:
                self.kept[f"/folders/{body['uid']}"] = body | {"id": 3}
                return 200, body
            case "POST", ["datasources"]:
                self.kept[f"/datasources/uid/{body['uid']}"] = body | {"id": 1, "readOnly": False}
                return 200, {"message": "Datasource added"}
            case "PUT", ["datasources", "uid", _]:
                self.kept[path] = body | {"id": 1, "readOnly": False}
                return 200, {"message": "Datasource updated"}
            case "GET", _ if path in self.kept:
                return 200, self.kept[path]
            case _:
                return 404, {"message": "not found"}


@contextmanager
def grafana_stub(prefix: str = "/grafana") -> Iterator[GrafanaStub]:
    stub = GrafanaStub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = parts.path.removeprefix(f"{prefix}/api")
            stub.requests.append((self.command, path))
            if self.headers["Authorization"] != f"Bearer {stub.token}":
                self.say(401, json.dumps({"message": "Invalid API key"}))
            elif stub.failures:
                self.say(*stub.failures.pop(0))
            else:
                status, answer = stub.answer(
                    self.command, path, parse_qs(parts.query), json.loads(body or b"null")
                )
                if self.command == "POST" and stub.lost_answers:
                    stub.lost_answers -= 1
                    self.close_connection = True
                    return
                self.say(status, json.dumps(answer))

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def say(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}{prefix}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
