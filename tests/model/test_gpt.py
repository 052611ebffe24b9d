"""The network computes GPT-2: shapes, gradients, causality, loss, cache."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import PRESETS, GPTConfig, preset_fields
from model.gpt import GPT
from model.kv_cache import KVCache
from model.linear_cross_entropy import IGNORE_INDEX
from tests.model.small_models import chunked_loss, small_model


def random_ids(*shape: int, vocab_size: int = 97, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def plain_loss(model: GPT, token_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model.logits(model(token_ids))
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
    )


def gradients(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_is_that_of_the_real_module(preset: str) -> None:
    config = GPTConfig(**preset_fields({"preset": preset}))
    with torch.device("meta"):
        model = GPT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters


def test_published_parameter_counts() -> None:
    assert GPTConfig(**preset_fields({"preset": "gpt2-124m"})).num_parameters == 124_439_808
    assert GPTConfig(**preset_fields({"preset": "gpt3-175b"})).num_parameters == pytest.approx(
        174.6e9, rel=1e-3
    )


def test_initial_weights_are_gpt2s_and_a_function_of_the_seed() -> None:
    config = GPTConfig(vocab_size=500, n_positions=64, n_layer=8, n_head=2, n_embd=64)
    models = [GPT(config) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        model.init_weights(seed)
    state, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not torch.equal(state["transformer.wte.weight"], other["transformer.wte.weight"])
    assert state["transformer.wte.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert state["transformer.h.3.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert state["transformer.h.3.mlp.c_proj.weight"].std().item() == pytest.approx(
        0.02 / 4, rel=0.03
    )
    assert (state["transformer.h.3.ln_1.weight"] == 1).all()
    assert (state["transformer.h.3.mlp.c_fc.bias"] == 0).all()
    # An untrained model knows nothing: its loss is that of a uniform guess.
    ids = random_ids(4, 32, vocab_size=500)
    assert models[0].loss(ids, ids.roll(1)).item() / ids.numel() == pytest.approx(
        math.log(500), abs=0.1
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_exact", "relu"])
def test_gradients_equal_finite_differences(activation: str) -> None:
    model = small_model(
        vocab_size=11,
        n_positions=6,
        n_head=2,
        n_embd=8,
        activation_function=activation,
        tie_word_embeddings=False,
    ).double()
    token_ids, targets = random_ids(2, 5, vocab_size=11), random_ids(2, 5, vocab_size=11, seed=2)
    targets[0, 1] = IGNORE_INDEX
    exact = gradients(model, chunked_loss(model, token_ids, targets, chunk_tokens=3))
    generator, h = torch.Generator().manual_seed(3), 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=h)
            above = model.loss(token_ids, targets).item()
            parameter.add_(direction, alpha=-2 * h)
            below = model.loss(token_ids, targets).item()
            parameter.add_(direction, alpha=h)
        assert (exact[name] * direction).sum().item() == pytest.approx(
            (above - below) / (2 * h), rel=1e-5, abs=1e-6
        ), name


@pytest.mark.parametrize("chunk_tokens", [1, 7, 60, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_equals_plain_cross_entropy(chunk_tokens: int, *, tied: bool) -> None:
    model = small_model(tie_word_embeddings=tied)
    token_ids, targets = random_ids(3, 20), random_ids(3, 20, seed=2)
    targets[0, :7] = IGNORE_INDEX
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = model.to(dtype)
        plain, chunked = (
            plain_loss(model, token_ids, targets),
            chunked_loss(model, token_ids, targets, chunk_tokens=chunk_tokens),
        )
        torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=0)
        # A scaled loss scales them
        expected, found = gradients(model, plain / 3), gradients(model, chunked / 3)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def test_loss_of_masked_positions_is_the_sum_over_the_others(model: GPT) -> None:
    token_ids, targets = random_ids(2, 20), random_ids(2, 20, seed=2)
    first, second = targets.clone(), targets.clone()
    first[:, :5] = IGNORE_INDEX
    second[:, 5:] = IGNORE_INDEX
    parts = model.loss(token_ids, first) + model.loss(token_ids, second)
    torch.testing.assert_close(parts, model.loss(token_ids, targets))
    assert model.loss(token_ids, torch.full_like(targets, IGNORE_INDEX)).item() == 0


def test_loss_and_gradients_are_the_same_bits_every_time(model: GPT) -> None:
    token_ids, targets = random_ids(4, 40), random_ids(4, 40, seed=2)
    first, again = (
        gradients(model, chunked_loss(model, token_ids, targets, chunk_tokens=64)) for _ in range(2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements in any operation's result."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        numels = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *numels])
        return result


def test_no_more_logits_than_one_chunk_exist_forward_or_backward() -> None:
    vocab_size, chunk_tokens = 5000, 16
    model = small_model(vocab_size=vocab_size, n_embd=8, n_head=1)
    token_ids = random_ids(4, 40)
    with LargestTensor() as chunked:
        chunked_loss(model, token_ids, token_ids, chunk_tokens=chunk_tokens).backward()
    with LargestTensor() as plain:
        plain_loss(model, token_ids, token_ids).backward()
    assert plain.largest == token_ids.numel() * vocab_size
    assert chunked.largest == chunk_tokens * vocab_size


def test_bf16_autocast_trains_fp32_weights(model: GPT) -> None:
    token_ids, targets = random_ids(3, 20), random_ids(3, 20, seed=2)
    exact = gradients(model, model.loss(token_ids, targets))
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_loss(model, token_ids, targets, chunk_tokens=16)
    assert loss.dtype == torch.float32
    rounded = gradients(model, loss)
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.99, name
        assert not torch.equal(gradient, exact[name])


def test_a_later_token_changes_no_earlier_logit(model: GPT) -> None:
    token_ids = random_ids(1, 30)
    changed = token_ids.clone()
    changed[0, 17] = (changed[0, 17] + 1) % 97
    before, after = model.logits(model(token_ids)), model.logits(model(changed))
    assert torch.equal(before[:, :17], after[:, :17])
    assert ((before - after)[0, 17:].abs().amax(dim=-1) > 1e-4).all()


def test_a_sequence_may_be_cached_in_pieces(model: GPT) -> None:
    token_ids = random_ids(1, 30)
    cache = KVCache(model.config, max_len=48, dtype=torch.float32, device="cpu")
    cache.keys.fill_(1e4)  # an earlier sequence's leftovers must not show
    cache.values.fill_(1e4)
    pieces = [
        model(token_ids[:, piece], kv_cache=cache, positions=piece[None])
        for piece in torch.arange(30).split([11, 11, 1, 1, 6])
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(token_ids), rtol=0, atol=1e-4)


def test_dropout_is_off_in_evaluation_and_keyed_by_the_seed_in_training() -> None:
    model = small_model(dropout=0.3)
    token_ids = random_ids(2, 20)
    assert torch.equal(model(token_ids), small_model()(token_ids))
    model.train()
    hidden = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        hidden.append(model(token_ids))
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])
