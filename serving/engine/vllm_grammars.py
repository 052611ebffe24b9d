"""Has vLLM's sequences follow our grammars, without the tokenizer that vLLM's own would need.

vLLM's scheduler asks each sequence's grammar which tokens may come next, before each of its draws,
and tells it the token that was drawn. The mask is applied to the logits before penalties,
temperature and log-probabilities. A sequence that is put back keeps its grammar where it was.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)
from vllm.v1.structured_output.request import StructuredOutputRequest

from serving.structured.token_mask import TokenMask

WORD_BITS = 32  # of a mask, in which each token has a bit, the first one the lowest
ALL_TOKENS = -1  # a word whose bits are all set


class FollowedGrammar(StructuredOutputGrammar):
    """One sequence's grammar, by the interface that vLLM's scheduler expects."""

    def __init__(self, mask: TokenMask) -> None:
        self._mask = mask
        self.has_token = True  # until the grammar has exceeded its bounds, or leaves no token

    def fill_bitmask(self, bitmask: Tensor, batch_index: int) -> None:
        """Writes into its row of the masks which tokens may come next. A grammar that leaves none
        lets vLLM draw any, and then refuses it."""
        allowed = self._mask.allowed()
        if allowed is None:
            self.has_token = False
            bitmask[batch_index].fill_(ALL_TOKENS)
            return
        packed = np.packbits(allowed, bitorder="little")
        row = bitmask[batch_index].numpy().view(np.uint8)
        row[: len(packed)] = packed
        row[len(packed) :] = 0

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Records what was drawn. Returns whether the sequence may go on; else vLLM ends it with an
        error."""
        if self.has_token:
            for token_id in tokens:
                self._mask.advance(token_id)
        return self.has_token

    def is_terminated(self) -> bool:
        """An answer ends by a token that stops it, and is masked until then."""
        return False

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        raise AssertionError("only speculative decoding asks this, which is refused")

    def rollback(self, num_tokens: int) -> None:
        raise AssertionError("only speculative decoding asks this, which is refused")

    def reset(self) -> None:
        raise AssertionError("vLLM's scheduler never starts an answer again")


class CompiledElsewhere(StructuredOutputBackend):
    """The grammars of an engine that gives vLLM only sequences whose grammar is compiled."""

    def compile_grammar(
        self, request_type: Any, grammar_spec: str, stop_token_ids: set[int] | None = None
    ) -> StructuredOutputGrammar:
        raise AssertionError("vLLM is given no grammar as text")

    def allocate_token_bitmask(self, max_num_seqs: int) -> Tensor:
        num_words = -(-self.vocab_size // WORD_BITS)
        return torch.full((max_num_seqs, num_words), ALL_TOKENS, dtype=torch.int32)

    def destroy(self) -> None:
        """Holds nothing."""


def prepare(scheduler: Any, vllm_config: Any) -> int:
    """Lets the sequences of vLLM's scheduler have our grammars. Returns the size of the model's
    vocabulary as vLLM knows it."""
    vocab_size = int(vllm_config.model_config.get_vocab_size())
    backend = CompiledElsewhere(vllm_config, tokenizer=None, vocab_size=vocab_size)
    scheduler.structured_output_manager.backend = backend
    return vocab_size


def follow(scheduler: Any, vllm_id: str, grammar: FollowedGrammar) -> None:
    """Gives a grammar to a sequence that vLLM's scheduler has and not yet started."""
    # vLLM's own field would ask for a tokenizer; what it says is read only to compile a grammar
    asked = StructuredOutputRequest(StructuredOutputsParams(json_object=True))
    asked.grammar = grammar
    scheduler.requests[vllm_id].structured_output_request = asked
