"""Looking inside a query: the request, its limits, and the process beside the replica that computes the answer.

The engine must not wait for it: reading a prompt with all attention weights takes many times a step, and its weights
may be packed for speed. In a thread of the replica it would take Python's lock from other clients' tokens. So it is a
process of its own at low priority, which starts with the first request, maps the same checkpoint file (the kernel
keeps its pages once for all who map it) and ends when it has been idle.
"""

import asyncio
import json
import struct
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from model.checkpoint_folder import MANIFEST, read_metadata
from serving.engine_process.child_process import start_child
from serving.protocol.errors import ApiError, overloaded
from serving.protocol.protocol import Request, Temperature, TopP

MAX_NEW_TOKENS = 32
MAX_SEQUENCE_TOKENS = 160  # prompt and new ones
MAX_WEIGHTS = 500_000  # numbers of attention in an answer: 5 MB
MAX_TOP = 20
TIMEOUT_S = 60.0
IDLE_S = 300.0
ANSWER_HEAD = struct.Struct(">HI")  # status, bytes of the body


def _prompt(value: Any) -> str | list[int]:
    is_ids = isinstance(value, list) and value and all(type(token_id) is int for token_id in value)
    if not is_ids and not isinstance(value, str):
        raise ValueError("expected a string or a list of token ids that is not empty")
    return value


Indices = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=128)]


class XrayRequest(Request):
    """Body of POST /v1/xray. Sampling parameters mean what they do in /v1/completions; greedy unless told otherwise."""

    model: str
    prompt: Annotated[str | list[int], PlainValidator(_prompt)]
    max_tokens: int = Field(16, ge=0, le=MAX_NEW_TOKENS)
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: int = Field(0, ge=-1, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    layers: Indices = Field(default_factory=lambda: [0])
    heads: Indices | None = None  # all
    top: int = Field(5, ge=1, le=MAX_TOP)
    step: int | None = Field(None, ge=0)  # of the run's checkpoints that lie beside the served one


def run_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of the served one's run that lie beside it, by step, in order. A step that was written twice
    counts once, as its later attempt wrote it. Folders that transformers saved have no run."""
    if not (folder / MANIFEST).exists():
        return {}
    run_id = read_metadata(folder).run_id
    beside = [
        path.parent for path in folder.parent.glob(f"[!.]*/{MANIFEST}") if path.with_name("raymill.json").exists()
    ]
    found = sorted((m.step, m.generation, path) for path in beside if (m := read_metadata(path)).run_id == run_id)
    return {step: path for step, _, path in found}


class Xray:
    """One replica's process for it. Takes one request at a time."""

    def __init__(self, folder: Path, *, name: str | None, dtype: str) -> None:
        self._folder = folder.absolute()
        self._name = name
        self._dtype = dtype
        self._is_busy = False
        self._process: XrayProcess | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def card(self) -> dict[str, Any]:
        """What may be asked: the limits, and the steps of the run whose checkpoints are there."""
        steps = await asyncio.to_thread(run_checkpoints, self._folder)
        limits = {"max_tokens": MAX_NEW_TOKENS, "max_sequence_tokens": MAX_SEQUENCE_TOKENS, "max_weights": MAX_WEIGHTS}
        return limits | {"steps": list(steps)}

    async def answer(self, request: XrayRequest) -> tuple[int, bytes]:
        """Status and JSON body. Raises `ApiError`: 429 while another request is answered, 503 without an answer."""
        if self._is_busy:
            raise overloaded("The replica looks into one query at a time; try again in a moment")
        self._is_busy = True
        asked = {"request": request.model_dump(), "arrived_s": time.monotonic()}
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._ask(json.dumps(asked))
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
            reason = f"took over {TIMEOUT_S:.0f} s" if isinstance(error, TimeoutError) else "has ended"
            raise ApiError(
                503,
                f"The process that looks into queries {reason}; completions are not affected. Try again.",
                code="xray_unavailable",
                headers={"Retry-After": "5"},
            ) from None
        finally:
            self._is_busy = False

    async def _ask(self, message: str) -> tuple[int, bytes]:
        if self._idle is not None:
            self._idle.cancel()
        process, self._process = self._process, None
        if process is None:
            process = await XrayProcess.start(self._folder, name=self._name, dtype=self._dtype)
        try:
            answer = await process.ask(message)
            # Only now: an answer that was not read to its end must not become the next request's.
            self._process = process
        finally:
            if self._process is None:
                process.kill()
        self._idle = asyncio.get_running_loop().call_later(IDLE_S, self.close)
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


class XrayProcess:
    """The process, and the socket to it. It ends when the socket closes, so also with a replica that dies."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, folder: Path, *, name: str | None, dtype: str) -> "XrayProcess":
        arguments = {"--checkpoint": folder, "--dtype": dtype, "--name": name}
        return cls(*await start_child("serving.xray.run_xray", arguments, threads=1))

    async def ask(self, message: str) -> tuple[int, bytes]:
        self._writer.write(f"{message}\n".encode())
        status, num_bytes = ANSWER_HEAD.unpack(await self._reader.readexactly(ANSWER_HEAD.size))
        return status, await self._reader.readexactly(num_bytes)

    def kill(self) -> None:
        """It holds nothing that could be lost. Waiting for a killed process takes no time worth a thread."""
        self._writer.close()
        self._process.kill()
        self._process.wait()
