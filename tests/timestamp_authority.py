"""A time stamp authority on loopback: OpenSSL's own (`openssl ts`), behind HTTP, with a certificate
that its root has made for time stamps."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.signing_keys import made_certificates

SETTINGS = """
[tsa]
default_tsa = stamps
[stamps]
serial = {folder}/serial
signer_cert = {folder}/certificate.pem
signer_key = {folder}/certified.pem
signer_digest = sha256
default_policy = 1.2.3.4.1
ess_cert_id_alg = sha256
"""
# Moves the clock of the process that loads it
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
int gettimeofday(struct timeval *now, void *zone) {
  int (*ask)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
  int failed = ask(now, zone);
  now->tv_sec += atol(getenv("CLOCK_OFFSET_S"));
  return failed;
}
"""


@dataclass
class Authority:
    """`offset_s` moves its clock, and `change` its answers: None in place of one is an error of
    HTTP."""

    folder: Path
    url: str = ""
    offset_s: int = 0
    num_asked: int = 0
    settings: str = "digests = sha256, sha512\n"
    sends_chain: bool = False  # the root behind its own certificate, which is not DER's order
    change: Callable[[int, bytes], bytes | None] = lambda _number, answer: answer
    answers: list[bytes] = field(default_factory=list)

    @property
    def root(self) -> Path:
        """The file with the certificate of whom to trust."""
        return self.folder / "authority.pem"

    def answer(self, query: bytes) -> bytes | None:
        self.num_asked += 1
        (self.folder / "query.tsq").write_bytes(query)
        environment = {"PATH": "/usr/bin:/bin"}
        if self.offset_s:
            environment |= {"LD_PRELOAD": str(self._clock()), "CLOCK_OFFSET_S": str(self.offset_s)}
        settings = SETTINGS.format(folder=self.folder)
        chain = f"certs = {self.root}\n" if self.sends_chain else ""
        (self.folder / "ts.cnf").write_text(settings + self.settings + chain)
        asked = ["ts", "-reply", "-config", "ts.cnf", "-queryfile", "query.tsq"]
        subprocess.run(
            ["openssl", *asked, "-out", "answer.tsr"],
            cwd=self.folder,
            env=environment,
            check=True,
            capture_output=True,
        )
        self.answers.append((self.folder / "answer.tsr").read_bytes())
        return self.change(self.num_asked, self.answers[-1])

    def _clock(self) -> Path:
        if shutil.which("cc") is None:
            pytest.skip("no compiler makes a wrong clock here")
        library = self.folder / "clock.so"
        if not library.exists():
            (self.folder / "clock.c").write_text(CLOCK)
            compiling = ["cc", "-shared", "-fPIC", "-o", str(library), "clock.c", "-ldl"]
            subprocess.run(compiling, cwd=self.folder, check=True, capture_output=True)
        return library


def made_authority(folder: Path) -> Authority:
    """Makes an authority's keys and certificates."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl stamps the time here")
    folder.mkdir()
    made_certificates(folder, first_day=-100, uses=[ExtendedKeyUsageOID.TIME_STAMPING])
    (folder / "serial").write_text("01\n")
    return Authority(folder)


@contextmanager
def running(authority: Authority) -> Iterator[Authority]:
    """Serves an authority, whose `url` is then known."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/timestamp-query"
            query = self.rfile.read(int(self.headers["Content-Length"]))
            answer = authority.answer(query)
            self.send_response(503 if answer is None else 200)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(answer or b"")))
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    authority.url = f"http://127.0.0.1:{server.server_port}/tsr"
    try:
        yield authority
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
