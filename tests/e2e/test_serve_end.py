"""The end of `raymill serve`: its first signal lets answers finish, a second one ends them with an
error event."""

import json
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from cluster.local.local_cluster import free_port
from model.config import GPTConfig
from model.gpt import GPT
from model.text.tokenizer import train_bpe
from tests.command_line import RAYMILL, environment
from tests.serving.tiny_models import write_model
from tests.time_limits import limit_s
from tests.waiting import wait_until

NUM_STREAMS = 3


class Stream(threading.Thread):
    """A client that reads one long answer to its end."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__()
        self._url, self._max_tokens = url, max_tokens
        self.text = ""
        self.problem: Exception | None = None
        self.start()

    def run(self) -> None:
        asked = {
            "model": "m",
            "prompt": "a",
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            with httpx.stream(
                "POST", f"{self._url}/v1/completions", json=asked, timeout=limit_s(120)
            ) as answer:
                for text in answer.iter_text():
                    self.text += text
        except httpx.HTTPError as error:
            self.problem = error


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("number", "num_signals", "exit_code"),
    [(signal.SIGHUP, 1, 0), (signal.SIGTERM, 2, 128 + signal.SIGTERM)],
    ids=["closed terminal", "two signals"],
)
def test_answers_finish_after_one_signal_and_say_so_when_cut_by_two(
    number: signal.Signals, num_signals: int, exit_code: int, tmp_path: Path
) -> None:
    tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog\n" * 9], vocab_size=280)
    shape = {"n_positions": 1024, "n_layer": 6, "n_head": 8, "n_embd": 256}
    gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    gpt.init_weights(1)
    folder = write_model(tmp_path / "model", gpt.eval(), tokenizer)
    log = tmp_path / "requests.jsonl"
    command = [
        *("env", "--default-signal=HUP"),  # which this process may ignore, as under nohup
        *RAYMILL,
        "serve",
        str(folder),
        "--port",
        str(free_port()),
        "--model-name",
        "m",
        "--json",
    ]
    command += ["--cluster.num-nodes", "1", "--http.request-log", str(log)]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        streams = [Stream(url, 200 if num_signals == 1 else 1000) for _ in range(NUM_STREAMS)]
        wait_until(lambda: all(stream.text or stream.problem for stream in streams))
        server.send_signal(number)
        if num_signals == 2:
            wait_until(lambda: httpx.get(f"{url}/ready", timeout=limit_s(30)).status_code == 503)
            server.send_signal(number)
        assert server.wait(limit_s(120)) == exit_code
        for stream in streams:
            stream.join(limit_s(30))
            assert stream.problem is None
            assert ("[DONE]" if num_signals == 1 else '"error"') in stream.text
    finally:
        server.kill()
        server.wait()
    reasons = [json.loads(line)["reason"] for line in log.read_text().splitlines()]
    assert reasons[-NUM_STREAMS:] == ["length" if num_signals == 1 else "interrupted"] * NUM_STREAMS
