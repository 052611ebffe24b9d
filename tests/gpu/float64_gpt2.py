"""GPT-2's loss in float64, as a formula over its weights: what the model's gradients on any device
are compared with.

B sequences, T tokens of each, C width, H heads of width D, V vocabulary.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import GPTConfig


def mean_loss(
    weights: Mapping[str, Tensor],
    config: GPTConfig,
    inputs: Tensor,
    targets: Tensor,
    *,
    eot_id: int | None,
) -> Tensor:
    """Returns the mean cross-entropy of targets (B, T); with `eot_id`, documents see nothing of
    each other."""

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], scale, shift, config.layer_norm_epsilon)

    def project(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    num_tokens = inputs.shape[1]
    starts = torch.zeros_like(inputs)  # where each token's document begins
    for place in range(num_tokens):
        begins = (
            (inputs[:, place] == eot_id)
            if eot_id is not None
            else torch.zeros_like(inputs[:, 0], dtype=torch.bool)
        )
        starts[:, place] = torch.where(begins, place, starts[:, max(place - 1, 0)])
    places = torch.arange(num_tokens, device=inputs.device)
    seen = (starts[:, :, None] == starts[:, None, :]) & (places <= places[:, None])  # (B, T, T)

    # (B, T, C)
    x = (
        weights["transformer.wte.weight"][inputs]
        + weights["transformer.wpe.weight"][places - starts]
    )
    for layer in range(config.n_layer):
        of = f"transformer.h.{layer}"
        parts = project(norm(x, f"{of}.ln_1"), f"{of}.attn.c_attn").chunk(3, dim=-1)
        # (B, H, T, D)
        q, k, v = (part.unflatten(-1, (config.n_head, -1)).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(2, 3) / math.sqrt(config.head_dim)
        shares = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
        x = x + project((shares @ v).transpose(1, 2).flatten(2), f"{of}.attn.c_proj")
        up = project(norm(x, f"{of}.ln_2"), f"{of}.mlp.c_fc")
        active = (
            F.relu(up) if config.activation_function == "relu" else F.gelu(up, approximate="tanh")
        )
        x = x + project(active, f"{of}.mlp.c_proj")
    head = weights["transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return F.cross_entropy((norm(x, "transformer.ln_f") @ head.T).flatten(0, 1), targets.flatten())


def loss_and_gradients(
    values: Mapping[str, Tensor],
    config: GPTConfig,
    inputs: Tensor,
    targets: Tensor,
    *,
    eot_id: int | None,
) -> tuple[float, dict[str, Tensor]]:
    """Returns the mean loss and its gradient by parameter, in float64 on the values' device."""
    weights = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    loss = mean_loss(weights, config, inputs, targets, eot_id=eot_id)
    return float(loss.detach()), dict(
        zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
    )
