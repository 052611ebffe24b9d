"""The messages between a replica and its engine process: lines of JSON over one socket."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from model.generation.sampling_params import SamplingParams
from serving.structured.grammar import Grammar


class FinishReason(StrEnum):
    STOP = "stop"  # the end-of-text token, or a stop string
    LENGTH = "length"  # max_tokens were generated
    # The model gave logits that are not finite numbers, or the engine refused the sequence
    ERROR = "error"
    # The grammar has exceeded its bounds, or leaves no token of the vocabulary
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class SequenceRequest:
    """One sequence to generate. A request with several prompts or choices is several sequences."""

    seq_id: int
    prompt_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # before which nothing that would end the sequence is drawn
    # Candidates reported for each token; 0: only the chosen token's logprob
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens
    embed: bool = False  # reports the mean of the prompt's hidden states
    # Whose prompts may share blocks of the cache with it; empty for all without one
    cache_scope: str = ""
    grammar: Grammar | None = None  # that its tokens follow
    weights: int = 0  # the version that computes it, if several share the engine (weight_turns.py)

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether it needs the results of all of its prompt; other sequences share what the cache
        has of it."""
        return self.embed or self.num_prompt_logprobs is not None


class Candidates(NamedTuple):
    """A token's log-probability and the most likely tokens at its place, from the unmodified
    logits; under a grammar, among the tokens that it allows."""

    logprob: float
    top: list[tuple[int, float]]
    rank: int  # of the token itself, 1 for the most likely


class TokenEvent(NamedTuple):
    """The result of one step for one sequence."""

    seq_id: int
    token_id: int | None  # None if nothing was sampled (max_tokens 0, or an error)
    finish_reason: FinishReason | None = None
    logprobs: Candidates | None = None
    # In the first event, if asked for; the first token has none
    prompt_logprobs: list[Candidates | None] | None = None
    embedding: str | None = None  # C fp32 numbers, little-endian, in base64


class EngineFacts(NamedTuple):
    """Sent once, when the engine takes sequences."""

    dtype: str
    max_num_seqs: int  # sequences that are decoded together
    tokens_per_step: int  # of prompts, that a step may read
    embeds: bool = False  # it computes embeddings
    least_tokens: int = 0  # for which a sequence needs room in the context, also if it draws none
    is_portable: bool = False  # its numbers have the same bits on every processor


class Admission(NamedTuple):
    """Sent before a step that starts new sequences. On a slow processor that step takes seconds,
    during which no request that has begun may be refused for having waited too long."""

    admitted: list[int]  # sequences
    num_running: int
    num_waiting: int
    num_found: Sequence[int] = ()  # of each, tokens of its prompt that the cache had


class MetricFamily(NamedTuple):
    """One of vLLM's own metrics, in Prometheus' terms."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, dict[str, str], float]]  # name, labels, value


class StepReport(NamedTuple):
    """Sent after each step, or after several alike."""

    events: list[TokenEvent]  # in the order of the steps
    num_running: int
    num_waiting: int
    kv_cache_usage: float  # share of the KV cache blocks that are held, 0 to 1
    num_prompt_tokens: int  # read in this step, or found in the cache
    # Computed in each step: of prompts, and one for each sequence that continues
    num_tokens: int = 0
    # Prompt tokens of the sequences that this step admitted, if the cache may have them
    num_looked_up: int = 0
    num_found: int = 0  # of those, tokens that the cache had
    steps_s: tuple[float, ...] = ()  # how long each step took

    def is_like(self, before: "StepReport") -> bool:
        """Whether this step and those before it drew a token for the same sequences, and did
        nothing else, so that one report can tell of all of them."""
        num_drawn = len([event for event in self.events if event.token_id is not None])
        return (
            num_drawn == self.num_tokens == before.num_tokens
            and self.num_prompt_tokens == before.num_prompt_tokens == 0
            and [event.seq_id for event in self.events]
            == [event.seq_id for event in before.events[-num_drawn:]]
        )

    def after(self, before: "StepReport") -> "StepReport":
        """Returns the report of the steps before, and of this one, which is like them."""
        return self._replace(
            events=before.events + self.events, steps_s=before.steps_s + self.steps_s
        )


parse_request = TypeAdapter(SequenceRequest).validate_python

# `json.dumps` would build it for each message
_written = json.JSONEncoder(separators=(",", ":")).encode


def encode_message(message: Any) -> bytes:
    """Returns a line. What most events lack is left out at their end, as nearly all tokens of an
    engine are in such events."""
    if isinstance(message, StepReport):
        message = ([_without_rest(event) for event in message.events], *message[1:])
    return _written(message).encode() + b"\n"


def _without_rest(event: TokenEvent) -> tuple[Any, ...]:
    if event[3:] != (None, None, None):
        return event
    return event[:2] if event.finish_reason is None else event[:3]
