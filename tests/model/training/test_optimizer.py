"""PyTorch's AdamW computes its formula, and the learning rate follows its schedule."""

import pytest
import torch

from model.training.optimizer import learning_rate


def test_torchs_fused_adamw_is_the_formula_in_float64() -> None:
    lr, beta1, beta2, eps, decay = 6e-4, 0.9, 0.95, 1e-8, 0.1
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW(
        [parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, fused=True
    )
    w, m, v = (
        parameter.detach().clone(),
        torch.zeros(50, dtype=torch.float64),
        torch.zeros(50, dtype=torch.float64),
    )
    for t in range(1, 101):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64) * 10 ** (t % 5 - 2)
        parameter.grad = gradient.clone()
        optimizer.step()
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        w = w - lr * (m_hat / (v_hat.sqrt() + eps) + decay * w)
        assert (parameter.detach() - w).abs().max() <= 1e-12


def gpt3_rate(tokens_seen: float) -> float:
    return learning_rate(
        int(tokens_seen),
        peak=6e-4,
        warmup_tokens=375_000_000,
        decay_tokens=260_000_000_000,
        min_ratio=0.1,
    )


def test_gpt3_schedule() -> None:
    assert gpt3_rate(0) == 0
    assert gpt3_rate(187.5e6) == pytest.approx(3e-4, rel=1e-12)
    assert gpt3_rate(375e6) == pytest.approx(6e-4, rel=1e-12)
    assert gpt3_rate((375e6 + 260e9) / 2) == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-9)
    assert gpt3_rate(260e9) == pytest.approx(6e-5, rel=1e-12)
    assert gpt3_rate(300e9) == gpt3_rate(260e9)
    rates = [gpt3_rate(tokens) for tokens in range(375_000_000, 260_000_000_000, 2_000_000_000)]
    assert rates == sorted(rates, reverse=True)


def test_schedule_without_warmup_and_with_warmup_to_the_end() -> None:
    assert learning_rate(0, peak=1.0, warmup_tokens=0, decay_tokens=10, min_ratio=0.0) == 1.0
    assert learning_rate(9, peak=1.0, warmup_tokens=10, decay_tokens=10, min_ratio=0.5) == 0.9
    assert learning_rate(10, peak=1.0, warmup_tokens=10, decay_tokens=10, min_ratio=0.5) == 0.5


def test_warmup_stable_decay() -> None:
    def rate(tokens_seen: int, *, cooldown_tokens: int = 200, warmup_tokens: int = 100) -> float:
        return learning_rate(
            tokens_seen,
            peak=1.0,
            warmup_tokens=warmup_tokens,
            decay_tokens=1000,
            min_ratio=0.1,
            cooldown_tokens=cooldown_tokens,
        )

    assert [rate(tokens) for tokens in (0, 50, 100, 500, 800)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert rate(850) == pytest.approx(0.775, rel=1e-12)
    assert rate(900) == pytest.approx(0.55, rel=1e-12)
    assert rate(1000) == rate(5000) == 0.1
    falls = [rate(tokens) - rate(tokens + 1) for tokens in range(800, 1000)]
    assert max(falls) == pytest.approx(min(falls), rel=1e-9)
    # A warm-up that reaches into the cooldown shortens it, without a jump.
    assert rate(900, warmup_tokens=900) == 1.0
    assert rate(950, warmup_tokens=900) == pytest.approx(0.55, rel=1e-12)
