"""The benchmark of a GPU's endpoint runs here in its tiny form, raymill with vLLM's CPU build
beside that alone."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.benchmarks import http_load
from tests.benchmarks.bench_gpu_serve import TINY_STREAMS, figures, table
from tests.benchmarks.http_load import NEW_TOKENS, STREAMS_OF_A_CLIENT, Load, loaded
from tests.benchmarks.serve_contenders import VLLM_PYTHON
from tests.repository import REPOSITORY
from tests.time_limits import limit_s

COMMAND = [sys.executable, "-m", "tests.benchmarks.bench_gpu_serve", "--device", "cpu", "--tiny"]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(
    not VLLM_PYTHON.exists(), reason="no vLLM in .venv-vllm; `make bench-serve` installs it"
)
def test_it_measures_both_servers() -> None:
    command = [*COMMAND, "--rounds", "1", "--vllm-python", str(VLLM_PYTHON)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=limit_s(240), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["machine"]["vllm"].startswith("0.32") and result["machine"]["card"] == "none"
    assert [row["streams"] for row in result["rows"]] == list(TINY_STREAMS)
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(
            row["raymill_tokens_per_s"] / row["vllm_tokens_per_s"], rel=0.01
        )
        assert row["raymill_itl_p50_ms"] <= row["raymill_itl_p99_ms"] > 0
    assert "aim: at least 0.9" in done.stdout


@pytest.mark.more
def test_without_vllm_it_says_what_it_needs() -> None:
    done = subprocess.run(
        [*COMMAND, "--vllm-python", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "name the Python of an environment with vLLM" in done.stderr


class Server(BaseHTTPRequestHandler):
    """Answers each completion at once, with as many tokens as the benchmark asks for."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        usage = json.dumps({"usage": {"completion_tokens": NEW_TOKENS}}).encode()
        events = [b"{}"] * NEW_TOKENS + [usage, b"[DONE]"]
        content = b"".join(b"data: %b\n\n" % event for event in events)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


def test_many_streams_come_from_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    own_pid, in_this_process = os.getpid(), http_load.closed_loop

    def closed_loop(*arguments: Any, **settings: Any) -> Any:
        assert os.getpid() != own_pid
        return in_this_process(*arguments, **settings)

    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr(http_load, "closed_loop", closed_loop)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        load = loaded(
            f"http://127.0.0.1:{server.server_port}",
            [[1]] * 96,
            num_streams=2 * STREAMS_OF_A_CLIENT,
        )
        server.shutdown()
    assert load.num_tokens == 96 * NEW_TOKENS and len(load.ttft_s) == 96 and load.wall_s > 0


def test_an_aim_that_is_missed_is_seen() -> None:
    def load(wall_s: float, ttft_s: float) -> Load:
        return Load(num_tokens=100, wall_s=wall_s, ttft_s=[ttft_s] * 3, itl_s=[0.01] * 3)

    def row(wall_s: float, ttft_s: float) -> dict[str, object]:
        return figures({("raymill", 4): [load(wall_s, ttft_s)], ("vllm", 4): [load(1.0, 0.020)]}, 4)

    good, slow, late = row(1.1, 0.0245), row(1.2, 0.020), row(1.0, 0.026)
    assert (good["aims_met"], slow["aims_met"], late["aims_met"]) == (True, False, False)
    assert [line.split()[-1] for line in table([good, slow]).splitlines()[1:3]] == ["ok", "missed"]
