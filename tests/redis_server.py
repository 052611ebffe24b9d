"""A real Redis on loopback, as Debian ships it, with a password of its own and its log on disk."""

import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.local.local_cluster import free_port
from tests.bound_process import start_bound
from tests.waiting import wait_until

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="no Redis here: apt-get install redis-server"
)


@dataclass(frozen=True)
class Redis:
    address: str
    password: str


@contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    folder.mkdir(parents=True)
    port, password = free_port(), secrets.token_hex(16)
    settings = folder / "redis.conf"
    settings.touch(mode=0o600)
    settings.write_text(
        f"bind 127.0.0.1\nport {port}\nrequirepass {password}\ndir {folder}\nappendonly yes\nsave ''\n"
    )
    process = start_bound(["redis-server", str(settings)], log=folder / "log")
    try:
        wait_until(
            lambda: process.poll() is not None or _answers(port),
            timeout_s=20,
            why=lambda: "Redis does not answer",
        )
        assert process.poll() is None, (folder / "log").read_text()
        yield Redis(f"127.0.0.1:{port}", password)
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
