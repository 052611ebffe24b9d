"""Looks inside a query: the request, its limits, and the process beside the replica that computes
the answer.

The engine must not do it: reading a prompt with all attention weights takes many times as long as a
step, and its own weights may be packed for speed. A thread of the replica would take Python's lock
from other clients' tokens. So it is a separate process at low priority, which starts with the first
request, maps the same checkpoint file (the pages are in memory only once), and ends after some idle
time.
"""

import asyncio
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from model.files.checkpoint_folder import MANIFEST, read_metadata
from model.files.hf_config import shape_from_hf
from serving.engine_process.machine_memory import memory
from serving.protocol.errors import error_of, overloaded
from serving.protocol.protocol import Temperature, TopP
from serving.protocol.request import Request
from serving.protocol.served_model import version_of_weights
from serving.xray.asked_process import AskedProcess

MAX_NEW_TOKENS = 32
MAX_SEQUENCE_TOKENS = 160  # prompt and new tokens together
MAX_WEIGHTS = 500_000  # numbers of attention in an answer: 5 MB
MAX_TOP = 20
TIMEOUT_S = 60.0
# Of what is free: a kernel without memory ends the largest process, which is the engine
MEMORY_SHARE = 0.25
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 4}  # by the engine's type; see `LOADED_IN`
MAPPED_WITHIN = 0.05  # of the weights' size: a file of about this size has their type
GIB = 1 << 30


def _prompt(value: Any) -> str | list[int]:
    is_ids = isinstance(value, list) and value and all(type(token_id) is int for token_id in value)
    if not is_ids and not isinstance(value, str):
        raise ValueError("expected a string or a list of token ids that is not empty")
    return value


Indices = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=128)]


class XrayRequest(Request):
    """The body of POST /v1/xray. Sampling parameters mean the same as in /v1/completions; the
    default is greedy."""

    model: str
    prompt: Annotated[str | list[int], PlainValidator(_prompt)]
    max_tokens: int = Field(16, ge=0, le=MAX_NEW_TOKENS)
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: int = Field(0, ge=-1, le=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    layers: Indices = Field(default_factory=lambda: [0])
    heads: Indices | None = None  # None: all
    top: int = Field(5, ge=1, le=MAX_TOP)
    step: int | None = Field(None, ge=0)  # of another checkpoint of the run, beside the served one


def run_checkpoints(folder: Path) -> dict[int, Path]:
    """Returns the checkpoints of the served one's run that are beside it, by step, in order. Of a
    step that was written twice the later attempt counts. Folders that transformers saved have no
    run."""
    if not (folder / MANIFEST).exists():
        return {}
    run_id = read_metadata(folder).run_id
    beside = [
        path.parent
        for path in folder.parent.glob(f"[!.]*/{MANIFEST}")
        if path.with_name("raymill.json").exists()
    ]
    found = sorted(
        (m.step, m.generation, path)
        for path in beside
        if (m := read_metadata(path)).run_id == run_id
    )
    return {step: path for step, _, path in found}


def shown_checkpoints(folder: Path, withdrawn: Collection[str]) -> dict[int, Path]:
    """Returns the `run_checkpoints` without the weights of a version that was refused or rolled
    back."""
    return {
        step: path
        for step, path in run_checkpoints(folder).items()
        if version_of_weights(read_metadata(path)) not in withdrawn
    }


class Xray:
    """One replica's x-ray. Takes one request at a time."""

    def __init__(self, folder: Path, *, name: str | None, dtype: str) -> None:
        self._folder = folder.absolute()
        self._dtype = dtype
        self._is_busy = False
        arguments = {"checkpoint": str(self._folder), "dtype": dtype, "name": name, "threads": 1}
        self._process = AskedProcess("serving.xray.run_xray", arguments)

    async def card(self, *, withdrawn: Collection[str]) -> dict[str, Any]:
        """Returns what may be asked: the limits, and the steps of the run that have a checkpoint
        here, without the versions that are withdrawn."""
        steps = await asyncio.to_thread(shown_checkpoints, self._folder, withdrawn)
        limits = {
            "max_tokens": MAX_NEW_TOKENS,
            "max_sequence_tokens": MAX_SEQUENCE_TOKENS,
            "max_weights": MAX_WEIGHTS,
        }
        return limits | {"steps": list(steps)}

    async def answer(
        self, request: XrayRequest, *, withdrawn: Collection[str]
    ) -> tuple[int, bytes]:
        """Returns the status and JSON body. Raises `ApiError`: 429 during another request, 503
        without an answer."""
        if self._is_busy:
            raise overloaded("The replica looks into one query at a time; try again in a moment")
        num_models = 1 if request.step is None else 2  # the process keeps the served one too
        if not self._process.is_started or request.step is not None:
            await asyncio.to_thread(self._require_memory, num_models)
        self._is_busy = True
        asked = {
            "request": request.model_dump(),
            "arrived_s": time.monotonic(),
            "withdrawn": sorted(withdrawn),
        }
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._process.ask(json.dumps(asked).encode())
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
            reason = (
                f"took over {TIMEOUT_S:.0f} s" if isinstance(error, TimeoutError) else "has ended"
            )
            raise error_of("xray_unavailable", reason=reason) from None
        finally:
            self._is_busy = False

    def _require_memory(self, num_models: int) -> None:
        """Raises `ApiError` (503) if the weights take too much of the free memory. In the type that
        is stored they are the file's pages, which the engine's process has in memory too."""
        config = shape_from_hf(json.loads((self._folder / "config.json").read_bytes()))
        needed = config.num_parameters * NUMBER_BYTES[self._dtype]
        stored = sum(file.stat().st_size for file in self._folder.glob("model*.safetensors"))
        is_mapped = abs(stored - needed) < MAPPED_WITHIN * needed
        free = MEMORY_SHARE * memory().free_bytes
        if not is_mapped and num_models * needed > free:
            raise error_of(
                "xray_too_large", needed_gib=num_models * needed / GIB, free_gib=free / GIB
            )

    def close(self) -> None:
        self._process.close()
