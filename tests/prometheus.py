"""A real Prometheus on loopback, as Debian ships it, and the queries of tests."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.local.local_cluster import free_port
from tests.time_limits import limit_s
from tests.waiting import wait_until

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no Prometheus here: apt-get install prometheus",
)


def promtool(folder: Path, *arguments: str) -> None:
    """Runs promtool in a folder, and fails where it does."""
    done = subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Prometheus:
    http: httpx.Client

    def get(self, path: str, **parameters: Any) -> Any:
        answer = self.http.get(f"/api/v1/{path}", params=parameters)
        assert answer.is_success, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def format(self, expr: str) -> str:
        """Fails if it is not PromQL."""
        return str(self.get("format_query", query=expr))

    def names(self) -> set[str]:
        """Returns the names of all series that it has scraped."""
        return set(self.get("label/__name__/values"))

    def history(self, expr: str, *, since_s: float) -> list[Any]:
        """Returns series with their values, a second apart."""
        return list(
            self.get("query_range", query=expr, start=since_s, end=time.time(), step=1)["result"]
        )


@contextmanager
def prometheus(folder: Path, *, scrape_targets: Path | None = None) -> Iterator[Prometheus]:
    """Scrapes the targets of a service discovery file each second."""
    scrape = {
        "job_name": "ray",
        "file_sd_configs": [{"files": [str(scrape_targets)], "refresh_interval": "1s"}],
    }
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [scrape] if scrape_targets else [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
    ]
    command += [f"--web.listen-address={address}", "--log.level=warn"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=limit_s(30)) as http:
            wait_until(lambda: _is_ready(http, process, folder / "log"), timeout_s=60)
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(limit_s(30))


def _is_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return http.get("/-/ready").is_success
    except httpx.TransportError:
        return False
