"""What a training step changes: the weights and AdamW's moments, each in one flat buffer.

The model's parameters and gradients are views into flat fp32 buffers, matrices first and the undecayed biases and
LayerNorms after them, so a lane's gradient is summed, clipped and applied as one vector. The slot behind the
gradient carries the lane's loss through the same sum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cluster.config import TrainConfig
from model.gpt import GPT
from model.optimizer import decay_parameter_names

# Parameters start at multiples of 64 bytes, as torch's own allocations do: vector kernels may round differently on
# other alignments.
_ALIGNMENT = 16
_NORM_BLOCK = 1 << 16


class TrainState:
    """The model, its flat buffers and its optimizer."""

    def __init__(self, model: GPT, config: TrainConfig, *, device: torch.device) -> None:
        self.model, self.device = model, device
        decayed = decay_parameter_names(model)
        parameters = dict(model.named_parameters())
        self._offsets: dict[str, int] = {}
        end, boundary = 0, 0
        for name in sorted(parameters, key=lambda name: name not in decayed):
            boundary = boundary if name in decayed else boundary or end
            self._offsets[name] = end
            end += -(-parameters[name].numel() // _ALIGNMENT) * _ALIGNMENT
        self._values = torch.zeros(end, device=device)
        self.gradient = torch.zeros(end + 1, device=device)  # (P + 1,): the last is the loss
        for name, parameter in parameters.items():
            view = self._view(self._values, name)
            view.copy_(parameter.detach())
            parameter.data, parameter.grad = view, self._view(self.gradient, name)
        self._groups = [nn.Parameter(self._values[:boundary]), nn.Parameter(self._values[boundary:])]
        self._groups[0].grad, self._groups[1].grad = self.gradient[:boundary], self.gradient[boundary:end]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self._groups[:1], "weight_decay": config.weight_decay},
                {"params": self._groups[1:], "weight_decay": 0.0},
            ],
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self._grad_clip = config.grad_clip

    def apply(self, summed: Tensor, *, learning_rate: float) -> tuple[float, float]:
        """One AdamW step with the gradient of the whole batch (P + 1,). Returns (loss, gradient norm)."""
        self.gradient.copy_(summed)
        loss = float(self.gradient[-1])
        norm = gradient_norm(self.gradient[:-1])
        if self._grad_clip and norm > self._grad_clip:
            self.gradient.mul_(self._grad_clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return loss, norm

    def moments(self) -> dict[str, Tensor]:
        """AdamW's state by parameter, for a checkpoint."""
        tensors = {"step": torch.tensor(self._num_updates(), dtype=torch.int64)}
        for moment in ("exp_avg", "exp_avg_sq"):
            flat = self._flat_moment(moment)
            tensors |= {f"{moment}.{name}": self._view(flat, name).clone() for name in self._offsets}
        return tensors

    def load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `moments`."""
        for group in self._groups:
            self.optimizer.state[group] = {
                "step": torch.tensor(float(tensors["step"])),
                "exp_avg": torch.zeros_like(group.data),
                "exp_avg_sq": torch.zeros_like(group.data),
            }
        for moment in ("exp_avg", "exp_avg_sq"):
            flat = torch.zeros_like(self._values)
            for name in self._offsets:
                self._view(flat, name).copy_(tensors[f"{moment}.{name}"])
            for group, part in zip(self._groups, self._split(flat), strict=True):
                self.optimizer.state[group][moment].copy_(part)

    def _view(self, flat: Tensor, name: str) -> Tensor:
        parameter = self.model.get_parameter(name)
        start = self._offsets[name]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        boundary = self._groups[0].numel()
        return flat[:boundary], flat[boundary:]

    def _num_updates(self) -> int:
        state = self.optimizer.state.get(self._groups[0])
        return int(state["step"]) if state else 0

    def _flat_moment(self, moment: str) -> Tensor:
        if not self._num_updates():
            return torch.zeros_like(self._values)
        return torch.cat([self.optimizer.state[group][moment] for group in self._groups])


def gradient_norm(gradient: Tensor) -> float:
    """Euclidean norm (P,) → scalar, summed in float64 over fixed blocks: the same bits however it is computed."""
    blocks = gradient.split(_NORM_BLOCK)
    return float(torch.stack([block.double().square().sum() for block in blocks]).sum().sqrt())
