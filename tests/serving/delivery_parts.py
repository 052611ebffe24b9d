"""An operator, and clients that never stop asking while checkpoints are promoted."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from model.generate import generate
from model.gpt import GPT
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.time_limits import limit_s
from tests.waiting import wait_until

MAX_TOKENS = 24


def greedy_texts(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[str]:
    params = SamplingParams(temperature=0.0)
    outputs = [generate(model, ids, max_tokens=MAX_TOKENS, params=params, eos_id=tokenizer.eot_id) for ids in prompts]
    return [tokenizer.decode(output) for output in outputs]


class Admin:
    """An operator."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=limit_s(60))

    def promote(self, checkpoint: Path | str, **terms: Any) -> httpx.Response:
        return self.http.post("/admin/promote", json={"checkpoint": str(checkpoint), **terms})

    def status(self) -> dict[str, Any]:
        answer = self.http.get("/admin/status")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    @property
    def delivery(self) -> dict[str, Any]:
        return dict(self.status()["delivery"])

    def wait_for(self, phase: str, *, timeout_s: float = 60) -> dict[str, Any]:
        """Until the endpoint is in the phase, and every replica serves accordingly."""

        def is_there() -> bool:
            state = self.status()
            epochs = {replica["epoch"] for replica in state["replicas"]}
            return state["delivery"]["phase"] == phase and epochs == {state["delivery"]["epoch"]}

        wait_until(is_there, timeout_s=timeout_s)
        return self.delivery

    def promoted(self, checkpoint: Path, **terms: Any) -> dict[str, Any]:
        """After the whole of a promotion."""
        assert (answer := self.promote(checkpoint, **terms)).status_code == 202, answer.text
        state = self.wait_for("steady")
        assert state["outcome"]["result"] == "promoted", state["outcome"]
        return state


@dataclass
class Answers:
    """What one connection got, in order."""

    versions: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Load:
    """`num_connections` clients, each asking again and again on its own connection, every second time as a stream.
    Each answer must be the greedy text of the one version that it names."""

    def __init__(
        self,
        url: str,
        prompts: list[list[int]],
        texts: Mapping[str, list[str]],
        *,
        num_connections: int = 16,
        key: str | None = None,
    ) -> None:
        self._url = url
        self._prompts = prompts
        self._texts = texts
        self._key = key
        self._ending = threading.Event()
        self.connections = [Answers() for _ in range(num_connections)]

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask, args=(i, a)) for i, a in enumerate(self.connections)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ending.set()
            for thread in threads:
                thread.join(limit_s(60))

    @property
    def num_answers(self) -> int:
        return sum(len(answers.versions) for answers in self.connections)

    @property
    def wrong(self) -> list[str]:
        return [text for answers in self.connections for text in answers.wrong]

    def wait_for_more(self, count: int, *, timeout_s: float = 120) -> None:
        goal = self.num_answers + count
        wait_until(lambda: self.num_answers >= goal or bool(self.wrong), timeout_s=timeout_s)

    def _ask(self, number: int, answers: Answers) -> None:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        limits = httpx.Limits(max_connections=1)
        with httpx.Client(base_url=self._url, timeout=limit_s(60), limits=limits, headers=headers) as http:
            count = number
            while not self._ending.is_set():
                count += 1
                prompt = count % len(self._prompts)
                asked = {"model": "tiny", "prompt": self._prompts[prompt], "max_tokens": MAX_TOKENS, "temperature": 0}
                asked["user"] = f"user-{number}"
                status, version, text = self._completion(http, asked | {"stream": count % 2 == 0})
                answers.versions.append(version)
                if status != 200 or text != self._texts.get(version, {prompt: None})[prompt]:
                    answers.wrong.append(f"{status} of {version}: {text[:300]!r}")

    def _completion(self, http: httpx.Client, asked: dict[str, Any]) -> tuple[int, str, str]:
        answer = http.post("/v1/completions", json=asked)
        version = answer.headers.get("x-model-version", "none")
        if answer.status_code != 200 or not asked["stream"]:
            body = answer.json()
            return answer.status_code, version, body["choices"][0]["text"] if "choices" in body else answer.text
        *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        if done != "[DONE]":
            return answer.status_code, version, f"no end: {done}"
        parts = [json.loads(event) for event in events]
        if {part["system_fingerprint"] for part in parts} != {version}:
            return answer.status_code, version, "mixed"
        return answer.status_code, version, "".join(part["choices"][0]["text"] for part in parts)
