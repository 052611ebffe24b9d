"""The answer of POST /v1/embeddings: for each text the mean of its tokens' hidden states after the final norm.

The engine computes it while it reads a prompt, so embeddings are scheduled, bounded and counted like completions.
"""

import base64
from typing import Any

import numpy as np

from serving.api.answers import Answer, Usage
from serving.api.choice_output import Part
from serving.protocol.protocol import CompletionRequest, EmbeddingRequest
from serving.protocol.served_model import ServedModel


def reading_only(request: EmbeddingRequest) -> CompletionRequest:
    """Returns the completion that reads the texts and draws no token."""
    return CompletionRequest.model_construct(model=request.model, prompt=request.input, max_tokens=0, temperature=0.0)


class EmbeddingAnswer(Answer):
    ID_PREFIX, KIND = "embd", "list"
    EMBEDS, PROMPT_FIELD = True, "input"

    def __init__(self, model: ServedModel, *, encoding: str) -> None:
        super().__init__(model)
        self._encoding = encoding

    def whole(self, choices: list[Part], usage: Usage) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.KIND,
            "created": self._created,
            "model": self._model.name,
            "data": [self._whole_choice(choice) for choice in choices],
            "usage": {name: usage[name] for name in ("prompt_tokens", "total_tokens")},
        }

    def _whole_choice(self, part: Part) -> dict[str, Any]:
        assert part.embedding is not None
        vector: str | list[float] = part.embedding
        if self._encoding != "base64":
            vector = np.frombuffer(base64.b64decode(part.embedding), dtype="<f4").tolist()
        return {"object": "embedding", "index": part.index, "embedding": vector}
