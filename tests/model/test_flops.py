"""The count of operations per token equals counts made in other ways."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import GPTConfig, preset_fields
from tests.model.small_models import small_model


@pytest.mark.parametrize("tied", [True, False])
def test_it_counts_what_torch_counts(*, tied: bool) -> None:
    model = small_model(n_layer=3, n_embd=128, tie_word_embeddings=tied)
    token_ids = torch.zeros(2, 48, dtype=torch.long)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model.loss(token_ids, token_ids).backward()
    # torch counts matrix products only; ours adds 6 for each bias and LayerNorm weight, under 2% at
    # this width
    assert model.config.flops_per_token(48) == pytest.approx(
        counter.get_total_flops() / token_ids.numel(), rel=0.02
    )


def test_gpt3_on_300b_tokens() -> None:
    config = GPTConfig(**preset_fields({"preset": "gpt3-175b"}))
    # 3.14e23 is 6ND alone; the scores add 12 x 96 x 12288 x 2048 per token.
    assert config.flops_per_token(0) * 300e9 == pytest.approx(3.14e23, rel=2e-3)
    assert config.flops_per_token(2048) - config.flops_per_token(0) == 12 * 96 * 12288 * 2048
