"""An operator, and clients that never stop asking while checkpoints are promoted."""

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from model.config import GPTConfig
from model.files.checkpoint_folder import read_metadata
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from model.text.tokenizer import Tokenizer, train_bpe
from serving.delivery.promotion import MODEL, Version, version_of
from serving.protocol.served_model import read_served_model
from tests.serving.tiny_models import as_transformers_folder, write_model
from tests.time_limits import limit_s
from tests.waiting import wait_until

MAX_TOKENS = 24


def served(folder: Path, serial: int) -> Version:
    """Returns the version of a checkpoint folder, with this serial."""
    found = version_of(read_served_model(folder, name=None), checkpoint=str(folder))
    return found.model_copy(update={"serial": serial})


def version(checkpoint: Path) -> str:
    return str(read_metadata(checkpoint).parameter_hash)[:16]


def bad_checkpoint(kind: str, folder: Path, other: Path, tokenizer: Tokenizer) -> Path:
    place = folder / f"bad-{kind}"
    if kind == "missing":
        return place
    if kind == "flipped":
        shutil.copytree(other, place)
        data = bytearray((place / "model.safetensors").read_bytes())
        data[len(data) // 2] ^= 1
        (place / "model.safetensors").write_bytes(data)
    elif kind == "nan":
        as_transformers_folder(other, place)
        tensors = load_file(place / "model.safetensors")
        tensors[next(name for name in tensors if "ln_f" in name)][0] = torch.nan
        save_file(tensors, place / "model.safetensors")
    elif kind == "shape":
        as_transformers_folder(other, place)
        (place / "config.json").write_text('{"model_type": "gpt2", "vocab_size": "many"}')
    else:
        size = 290 if kind == "vocabulary" else tokenizer.vocab_size
        theirs = train_bpe(
            [f"{kind}: another text, with other words in it; " * 9], vocab_size=size, normalize=[]
        )
        shape = GPTConfig(vocab_size=size, n_positions=128, n_layer=1, n_head=2, n_embd=32)
        gpt = GPT(shape)
        gpt.init_weights(3)
        write_model(place, gpt, theirs)
    return place


def greedy_texts(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]) -> list[str]:
    params = SamplingParams(temperature=0.0)
    outputs = [
        generate(model, ids, max_tokens=MAX_TOKENS, params=params, eos_id=tokenizer.eot_id)
        for ids in prompts
    ]
    return [tokenizer.decode(output) for output in outputs]


class Admin:
    """An operator, of the model or of one adapter beside it."""

    def __init__(self, url: str, key: str, *, adapter: str = MODEL) -> None:
        self._adapter = adapter
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=limit_s(60)
        )

    def promote(self, checkpoint: Path | str, **terms: Any) -> httpx.Response:
        return self.order("promote", checkpoint=str(checkpoint), **terms)

    def order(self, name: str, **fields: Any) -> httpx.Response:
        subject = {"adapter": self._adapter} if self._adapter else {}
        return self.http.post(f"/admin/{name}", json=subject | fields)

    def status(self) -> dict[str, Any]:
        answer = self.http.get("/admin/status")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    @property
    def delivery(self) -> dict[str, Any]:
        return self._part_of(self.status()["delivery"])

    def _part_of(self, whole: dict[str, Any]) -> dict[str, Any]:
        return dict(whole["adapters"][self._adapter] if self._adapter else whole)

    def wait_for(self, phase: str, *, timeout_s: float = 60) -> dict[str, Any]:
        """Until the endpoint is in the phase, and every replica serves accordingly."""

        def is_there() -> bool:
            status = self.status()
            state = self._part_of(status["delivery"])
            epochs = {self._part_of(replica)["epoch"] for replica in status["replicas"]}
            return state["phase"] == phase and epochs == {state["epoch"]}

        wait_until(is_there, timeout_s=timeout_s)
        return self.delivery

    def promoted(self, checkpoint: Path | str, **terms: Any) -> dict[str, Any]:
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
    longest_s: float = 0.0  # from a request to its whole answer


class Load:
    """`num_connections` clients, each asking again and again on its own connection, every second
    time as a stream. Each answer must be the greedy text of the one version that it names."""

    def __init__(
        self,
        url: str,
        prompts: list[list[int]],
        texts: Mapping[str, list[str]],
        *,
        num_connections: int = 16,
        key: str | None = None,
        model: str = "tiny",
    ) -> None:
        self._url = url
        self._model = model
        self._prompts = prompts
        self._texts = texts
        self._key = key
        self._ending = threading.Event()
        self.connections = [Answers() for _ in range(num_connections)]

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [
            threading.Thread(target=self._ask, args=(i, a)) for i, a in enumerate(self.connections)
        ]
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

    @property
    def versions(self) -> set[str]:
        return {version for answers in self.connections for version in answers.versions}

    @property
    def longest_s(self) -> float:
        return max(answers.longest_s for answers in self.connections)

    def wait_for_more(self, count: int, *, timeout_s: float = 120) -> None:
        goal = self.num_answers + count
        wait_until(lambda: self.num_answers >= goal or bool(self.wrong), timeout_s=timeout_s)

    def _ask(self, number: int, answers: Answers) -> None:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        limits = httpx.Limits(max_connections=1)
        with httpx.Client(
            base_url=self._url, timeout=limit_s(60), limits=limits, headers=headers
        ) as http:
            count = number
            while not self._ending.is_set():
                count += 1
                prompt = count % len(self._prompts)
                asked = {
                    "model": self._model,
                    "prompt": self._prompts[prompt],
                    "max_tokens": MAX_TOKENS,
                    "temperature": 0,
                }
                asked["user"] = f"user-{number}"
                began_s = time.monotonic()
                status, version, text = self._completion(http, asked | {"stream": count % 2 == 0})
                answers.longest_s = max(answers.longest_s, time.monotonic() - began_s)
                answers.versions.append(version)
                if status != 200 or text != self._texts.get(version, {prompt: None})[prompt]:
                    answers.wrong.append(f"{status} of {version}: {text[:300]!r}")

    def _completion(self, http: httpx.Client, asked: dict[str, Any]) -> tuple[int, str, str]:
        answer = http.post("/v1/completions", json=asked)
        version = answer.headers.get("x-model-version", "none")
        if answer.status_code != 200 or not asked["stream"]:
            body = answer.json()
            return (
                answer.status_code,
                version,
                body["choices"][0]["text"] if "choices" in body else answer.text,
            )
        *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        if done != "[DONE]":
            return answer.status_code, version, f"no end: {done}"
        parts = [json.loads(event) for event in events]
        if {part["system_fingerprint"] for part in parts} != {version}:
            return answer.status_code, version, "mixed"
        return answer.status_code, version, "".join(part["choices"][0]["text"] for part in parts)


def promote_under_load(
    admin: Admin,
    load: Load,
    checkpoint: Path,
    other: Path,
    *,
    before: int,
    after: int,
    **terms: Any,
) -> None:
    """Every connection sees the old version and then the new one, and every answer is right."""
    old, new = version(checkpoint), version(other)
    with load.running():
        load.wait_for_more(before)
        admin.promoted(other, **terms)
        load.wait_for_more(after)
    assert load.wrong == []
    assert load.num_answers >= before + after
    for answers in load.connections:
        assert set(answers.versions) == {old, new}
        assert answers.versions == sorted(answers.versions, key=lambda v: v == new), (
            "the old version came back"
        )
    assert admin.delivery["live"]["version"] == new
