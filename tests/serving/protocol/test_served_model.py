"""What a replica knows of its checkpoint, with a shorter context than the model has."""

from pathlib import Path

import pytest

from serving.protocol.errors import ApiError
from serving.protocol.served_model import read_served_model


def test_a_shorter_context_is_what_clients_see_and_may_fill(checkpoint: Path) -> None:
    model = read_served_model(checkpoint, name="tiny", max_context=32)
    assert model.card()["max_model_len"] == 32
    assert len(model.prompt_ids([1] * 24, max_tokens=8)) == 24
    with pytest.raises(ApiError, match="32") as refused:
        model.prompt_ids([1] * 24, max_tokens=9)
    assert refused.value.code == "context_length_exceeded"
    assert read_served_model(checkpoint, name="tiny", max_context=4096).config.n_positions == 128
