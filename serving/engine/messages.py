"""What the replica and its engine process say to each other: length-prefixed JSON frames over one socket."""

import dataclasses
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from model.sampling import SamplingParams

_LENGTH = struct.Struct(">I")


class FinishReason(StrEnum):
    STOP = "stop"  # the end-of-text token, or a stop string
    LENGTH = "length"  # max_tokens were generated
    ERROR = "error"  # the model gave logits that are not finite numbers


@dataclass(frozen=True)
class SequenceRequest:
    """One sequence to generate; a request with several prompts or choices is several of them."""

    seq_id: int
    prompt_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    ignore_eos: bool = False
    num_logprobs: int | None = None  # candidates reported per token; 0 reports the chosen one's logprob only
    prompt_logprobs: bool = False


class Candidates(NamedTuple):
    """Log-probability of a token, and the most likely tokens at its place, from the unmodified logits."""

    logprob: float
    top: list[tuple[int, float]]


class TokenEvent(NamedTuple):
    """What one step gave one sequence."""

    seq_id: int
    token_id: int | None  # None: nothing was sampled (max_tokens 0, or an error)
    finish_reason: FinishReason | None
    logprobs: Candidates | None
    prompt_logprobs: list[Candidates | None] | None  # with the first event, when asked for; the first token has none


class Admission(NamedTuple):
    """What the engine says before a step that begins with sequences. On a slow processor that step takes seconds, in
    which nobody who has begun may be refused for having waited."""

    admitted: list[int]  # sequences
    num_running: int
    num_waiting: int


class StepReport(NamedTuple):
    events: list[TokenEvent]
    num_running: int
    num_waiting: int
    kv_cache_usage: float  # share of the KV cache blocks that are held, 0 to 1
    num_prompt_tokens: int  # read in this step, or found in the cache


def submit_message(request: SequenceRequest) -> dict[str, Any]:
    return {"submit": dataclasses.asdict(request)}


def parse_request(fields: dict[str, Any]) -> SequenceRequest:
    sampling = dict(fields["sampling"])
    sampling["logit_bias"] = tuple((token_id, bias) for token_id, bias in sampling["logit_bias"])
    return SequenceRequest(**fields | {"sampling": SamplingParams(**sampling)})


def parse_report(fields: list[Any]) -> StepReport:
    events, *figures = fields
    return StepReport([_parse_event(*event) for event in events], *figures)


def _parse_event(
    seq_id: int, token_id: int | None, finish: str | None, logprobs: Any, prompt_logprobs: Any
) -> TokenEvent:
    return TokenEvent(
        seq_id=seq_id,
        token_id=token_id,
        finish_reason=None if finish is None else FinishReason(finish),
        logprobs=None if logprobs is None else Candidates(*logprobs),
        prompt_logprobs=prompt_logprobs
        and [None if candidates is None else Candidates(*candidates) for candidates in prompt_logprobs],
    )


def encode_frame(message: Any) -> bytes:
    payload = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(payload)) + payload


class FrameBuffer:
    """Bytes as they arrive, frames as they are complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield json.loads(payload)
