"""`raymill storage check` finds each thing that can be wrong with a storage, says it, and leaves
nothing behind."""

import errno
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.storage.uris import open_storage
from cluster.submission.storage_check import check_storage
from tests.cluster.fault_proxy import Cut, FaultProxy, Refused

STEPS = ["list", "write", "read", "create only once", "replace only a known version", "delete"]


def problem(uri: str) -> str:
    return check_storage(uri)[1]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_good_storage_passes_and_is_as_before(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = (
        str(tmp_path)
        if kind == "local"
        else f"s3://{request.getfixturevalue('s3_bucket')}/some/prefix"
    )
    open_storage(uri).write_bytes("kept", b"x")
    assert check_storage(uri) == (STEPS, "")
    assert [entry.key for entry in open_storage(uri).list()] == ["kept"]
    assert kind == "s3" or [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_folder_that_was_not_there_is_not_there_afterwards(tmp_path: Path) -> None:
    assert problem(str(tmp_path / "a/b")) == ""
    assert not (tmp_path / "a").exists()


def test_the_command_says_what_is_wrong(
    s3_server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["storage", "check", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["usable"], found["problem"], found["passed"]) == (True, "", STEPS)
    assert main(["storage", "check", "s3://no-such-bucket/x", "--json"]) == 1
    streams = capsys.readouterr()
    found = json.loads(streams.out)
    assert (found["usable"], found["passed"]) == (False, [])
    assert "there is no bucket 'no-such-bucket'" in found["problem"]
    assert main(["storage", "check", "ftp://x"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot open 'ftp://x'")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "InvalidAccessKeyId", "cannot list: s3://.* does not know this access key"),
        (403, "SignatureDoesNotMatch", "cannot list: s3://.* secret key does not fit"),
        (403, "RequestTimeTooSkewed", "clock is wrong"),
        (400, "ExpiredToken", "session token is expired"),
        (403, "AccessDenied", "cannot list: s3://.* access denied"),
        (301, "PermanentRedirect", "lies in another region"),
    ],
)
def test_a_refusal_is_told_in_words(
    proxy: FaultProxy, s3_bucket: str, status: int, code: str, words: str
) -> None:
    proxy.spoil = lambda method, path: None if method == "HEAD" else Refused(status, code)
    assert re.search(words, problem(f"s3://{s3_bucket}/x"))


def test_a_store_that_can_only_be_read(proxy: FaultProxy, s3_bucket: str) -> None:
    proxy.spoil = lambda method, path: (
        Refused(403, "AccessDenied") if method in ("PUT", "DELETE") else None
    )
    assert "can be listed but not written, at least by these credentials" in problem(
        f"s3://{s3_bucket}/x"
    )


def test_a_store_without_conditional_writes(proxy: FaultProxy, s3_bucket: str) -> None:
    proxy.dropped_headers = ("if-none-match",)
    assert "takes an object that exists already without looking at its condition" in problem(
        f"s3://{s3_bucket}/x"
    )
    proxy.dropped_headers = ("if-match",)
    assert "takes an object that replaces another version without" in problem(f"s3://{s3_bucket}/x")
    proxy.dropped_headers = ()
    proxy.spoil = lambda method, path: Refused(501, "NotImplemented") if method == "PUT" else None
    assert "lacks something that raymill needs (NotImplemented)" in problem(f"s3://{s3_bucket}/x")
    proxy.spoil = None
    assert open_storage(f"s3://{s3_bucket}").list() == []


def test_a_store_that_gives_back_other_bytes(proxy: FaultProxy, s3_bucket: str) -> None:
    proxy.spoil = lambda method, path: (
        Cut(100, "lied") if method == "GET" and "list-type" not in path else None
    )
    assert "does not match the object's checksum" in problem(f"s3://{s3_bucket}/x")


def test_nobody_or_somebody_else_answers(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "127.0.0.1:9 cannot be reached; check AWS_ENDPOINT_URL" in problem("s3://bucket/x")
    with page_server() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert "the server that answers does not speak S3" in problem("s3://bucket/x")


@contextmanager
def page_server() -> Iterator[str]:
    """Answers everything with a web page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<!doctype html><p>hello")

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: bytes) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", refuse)  # root may write into any folder
    assert "can be listed but not written" in problem(str(tmp_path))


def test_the_hub_can_only_be_read() -> None:
    assert "can only be read" in problem("hf://datasets/a/b")
