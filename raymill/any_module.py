"""Adapts a PyTorch module to the training state, and refuses what cannot be trained exactly."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raymill.errors import UserError
from raymill.rules.hidden_matrix import HiddenMatrix, hidden_matrices_by_name


class AnyModule:
    """The parameters of a module that require a gradient; what is frozen is no part of the
    state."""

    rounds_matrices = False

    def __init__(self, module: nn.Module) -> None:
        """Raises `UserError` for parameters that the state cannot hold."""
        self.module = module
        self._parameters: dict[str, nn.Parameter] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._parameters[name] = parameter
        _require_trainable(module, self._parameters)

    @property
    def device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    @property
    def hidden_matrices(self) -> Mapping[str, HiddenMatrix]:
        return hidden_matrices_by_name(
            {name: parameter.shape for name, parameter in self._parameters.items()}
        )

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self._parameters.items()

    def parameters(self) -> Iterable[nn.Parameter]:
        return self._parameters.values()

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        for name, values in weights.items():
            self._parameters[name].data = values


def _require_trainable(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    if isinstance(module, DistributedDataParallel):
        raise UserError(
            "the model is wrapped in DistributedDataParallel, which sums gradients in an order of its "
            "own: pass the module itself (model.module)"
        )
    if not parameters:
        raise UserError("no parameter of the model requires a gradient: there is nothing to train")
    devices = {parameter.device for parameter in parameters.values()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise UserError(f"the model lies on several devices ({names}): move it to one")
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise UserError(
                f"{name} is on the device meta, and has no values: initialize the model"
            )
        if parameter.dtype != torch.float32:
            raise UserError(
                f"{name} is {parameter.dtype}, expected torch.float32: sums and updates are in fp32. To "
                "compute in bf16, use torch.autocast in the loss"
            )
