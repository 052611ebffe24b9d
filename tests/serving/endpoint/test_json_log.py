"""Where the settings say so, every line that an endpoint's processes log is a JSON object, without
text and without keys."""

import itertools
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.settings.code_folders import code_version
from cluster.settings.serve import EngineConfig, HttpConfig, ServeConfig
from serving.protocol.json_log import VERSION_CHARS, Process
from tests.serving.endpoint_parts import Endpoints
from tests.time_limits import limit_s
from tests.waiting import wait_until

pytestmark = pytest.mark.cluster

KEY, OTHER_KEY, TEXT = "sk-keepthissecret", "sk-nobodyhasthisone", "Xanthippe's private letter"
# Ray's own, in the files that its workers' output goes to
MARKERS = (":actor_name:", ":task_name:", ":job_id:")
# Others in such files have none of our code
OUR_ACTORS = (":actor_name:ServeReplica", ":actor_name:ProxyActor")


class Logs:
    """What Ray's log files have got since the start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        names = ("serve/replica_*.log", "serve/proxy_*.log", "worker-*.err", "worker-*.out")
        return [path for name in names for path in self._folder.glob(name)]

    def lines(self) -> dict[str, list[str]]:
        """Returns the lines of our processes by file."""
        found = {}
        for path in self._files():
            lines = path.read_bytes()[self._sizes.get(path, 0) :].decode().splitlines()
            if path.parent.name == "serve" or any(line.startswith(OUR_ACTORS) for line in lines):
                found[path.name] = [line for line in lines if not line.startswith(MARKERS)]
        return found

    def entries(self) -> list[dict[str, Any]]:
        lines = [line for of_file in self.lines().values() for line in of_file]
        return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def logs(endpoints: Endpoints) -> Logs:
    return Logs(endpoints.ray_logs)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY}\n")
    return path


@pytest.fixture(scope="module")
def http(
    endpoints: Endpoints,
    logs: Logs,
    run_checkpoint: Path,
    key_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    requests = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    config = ServeConfig(
        checkpoint=str(run_checkpoint),
        model_name="tiny",
        api_key_file=str(key_file),
        log_format="json",
        http=HttpConfig(request_log=str(requests)),  # of its own, so that the proxy is new
        engine=EngineConfig(max_num_seqs=2),
    )
    url = endpoints.deployed(config)["url"]
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=limit_s(60)
    ) as http:
        yield http


def test_every_line_is_an_object_with_the_same_fields(
    http: httpx.Client, logs: Logs, key_file: Path
) -> None:
    asked = {"model": "tiny", "prompt": TEXT, "max_tokens": 2}
    answers = [
        http.post("/v1/completions", json=asked, headers={"x-request-id": "the-first-one"}),
        http.post("/v1/completions", json=asked | {"stream": True}),
        http.post("/v1/completions", json=asked | {TEXT: TEXT}),
        http.post(
            "/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": TEXT, "content": TEXT}]},
        ),
        http.post("/v1/completions", json=asked, headers={"Authorization": f"Bearer {OTHER_KEY}"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 400, 401]
    key_file.write_text(f"{KEY}\nsk-another\n")
    wait_until(
        lambda: any("API keys have changed" in entry["message"] for entry in logs.entries()),
        timeout_s=20,
    )
    wait_until(
        lambda: any(entry.get("request_id") == "the-first-one" for entry in logs.entries()),
        timeout_s=20,
    )

    files = logs.lines()
    everything = "\n".join(line for lines in files.values() for line in lines)
    assert not [secret for secret in (KEY, OTHER_KEY, TEXT, "Xanthippe") if secret in everything]
    entries = logs.entries()
    assert {entry["process"] for entry in entries} >= {
        Process.REPLICA,
        Process.COORDINATOR,
        Process.PROXY,
    }
    for entry in entries:
        assert set(entry) - {"request_id", "exception"} == {
            "time",
            "level",
            "logger",
            "message",
            "process",
            "replica",
            "version",
        }
        assert datetime.fromisoformat(entry["time"]).utcoffset() is not None and entry[
            "time"
        ].endswith("Z")
        assert entry["version"] == code_version()[:VERSION_CHARS]
        assert (entry["replica"] is not None) == (
            entry["process"] in (Process.REPLICA, Process.ENGINE)
        )
    for name, lines in files.items():
        by_ray = list(itertools.takewhile(lambda line: not line.startswith("{"), lines))
        if by_ray == lines:
            continue  # a process that Ray Serve ended while it started, as on a busy machine
        assert len(by_ray) <= 1, (
            "Ray Serve says that it starts the process, before any code of ours runs"
        )
        assert all(line.startswith("{") for line in lines[len(by_ray) :]), (name, lines)
