"""Bounds the log-probabilities that a replica holds for an answer until the answer is written.

An answer that comes whole is held until its last token. A stream's new tokens are gone once they
are sent, so only the log-probabilities of its prompts are held: they come in one piece.
"""

from collections.abc import Sequence

from serving.engine.messages import SequenceRequest
from serving.protocol.errors import ApiError
from serving.protocol.protocol import CompletionRequest

MAX_SCORES = 600_000  # 200 MB while they are written; lm-eval's 256 prompts have fewer


def held_scores(request: CompletionRequest, sequences: Sequence[SequenceRequest]) -> int:
    """Returns the number of log-probabilities that the replica may hold at a time for these
    sequences of a request."""
    if request.logprobs is None and request.prompt_logprobs is None:  # as in most requests
        return 0
    num_prompt_tokens = sum(len(sequence.prompt_ids) for sequence in sequences)
    num_new_tokens = sum(sequence.max_tokens for sequence in sequences)
    return num_prompt_tokens * _per_prompt_token(request) + num_new_tokens * _per_new_token(request)


def require_few_scores(request: CompletionRequest, sequences: Sequence[SequenceRequest]) -> None:
    """Raises `ApiError` (400) for more log-probabilities than a replica holds."""
    num_scores = held_scores(request, sequences)
    if num_scores > MAX_SCORES:
        raise ApiError(
            f"{num_scores} log-probabilities were asked for ({len(sequences)} sequences), at most {MAX_SCORES} are "
            "given in one answer; ask for fewer prompts, tokens or candidates, or for a stream, whose new tokens do "
            "not count",
            param="logprobs" if request.prompt_logprobs is None else "prompt_logprobs",
        )


def most_new_tokens(request: CompletionRequest, *, num_prompt_tokens: int) -> int | None:
    """Returns the number of new tokens whose log-probabilities have room in the answer to one
    prompt, and at least one; None if they take no room."""
    per_token = request.n * _per_new_token(request)
    if per_token == 0:
        return None
    room = MAX_SCORES - request.n * num_prompt_tokens * _per_prompt_token(request)
    return max(1, room // per_token)


def prompt_candidates(request: CompletionRequest) -> int | None:
    """Returns how many candidates the engine reports for each token of a prompt; None if its
    log-probabilities are not asked for."""
    echoed = request.logprobs if request.echo else None
    asked = [number for number in (echoed, request.prompt_logprobs) if number is not None]
    return max(asked, default=None)


def _per_prompt_token(request: CompletionRequest) -> int:
    candidates = prompt_candidates(request)
    return 0 if candidates is None else 1 + candidates


def _per_new_token(request: CompletionRequest) -> int:
    return 0 if request.logprobs is None or request.stream else 1 + request.logprobs
