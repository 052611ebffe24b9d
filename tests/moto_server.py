"""A real S3 server (moto) on a free loopback port, which lists a bucket as it is at one moment."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from moto.s3.utils import _VersionedKeyStore
from moto.server import ThreadedMotoServer


@contextmanager
def moto_server() -> Iterator[str]:
    """Gives its URL."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_VersionedKeyStore, "items", _items)
        # Else a body may wait for its headers to be acknowledged, on a busy machine for 100 ms
        patch.setattr(BaseHTTPRequestHandler, "disable_nagle_algorithm", True)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


def _items(self: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    """Returns a bucket's keys, each with its newest version. moto's own way fails, with a 500,
    where another request deletes one meanwhile; S3 never does."""
    return [(key, versions[-1]) for key, versions in dict(self).items()]
