"""AdamW on flat buffers: the bits of PyTorch's fused kernel, and what the planner counts of it."""

from typing import Any

import torch
from torch import nn

from raymill.rules.adamw import AdamW
from raymill.rules.update_rule import Stretch

RULE = AdamW(beta1=0.9, beta2=0.95, weight_decay=0.3)


def test_steps_have_the_bits_of_torchs_fused_adamw() -> None:
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    parameters = [nn.Parameter(start.clone()) for _ in range(2)]
    decayed, undecayed = [{"params": [values]} for values in parameters]
    groups: list[dict[str, Any]] = [decayed | {"weight_decay": 0.3}, undecayed]
    plain = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    stretches = [
        Stretch(start.clone(), gradient, torch.zeros(2, 1000).unbind(), torch.zeros(()), decays)
        for decays in (True, False)
    ]
    for _ in range(3):
        for values in parameters:
            values.grad = gradient
        plain.step()
        RULE.update(stretches, learning_rate=0.01)
    for stretch, values in zip(stretches, parameters, strict=True):
        assert torch.equal(stretch.values, values.detach()) and stretch.count == 3


def test_operations_and_bytes_are_those_of_each_value() -> None:
    assert RULE.flops((3, 5)) == 14 * 15
    assert RULE.bytes_moved((3, 5)) == 7 * 4 * 15
