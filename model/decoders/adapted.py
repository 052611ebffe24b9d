"""A causal language model of which an adapter is trained, and all else is frozen.

The module is transformers' own with PEFT's layers in it. What is frozen becomes a buffer, so that
the module's parameters are what is trained; their names are those of PEFT's files.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from model.adapters.lora import base_name, stored_name
from model.decoders import foreign
from model.decoders.foreign import ForeignModel, seeded
from model.foreign_config import ForeignConfig


class AdaptedModel(ForeignModel):
    """Computes once it has adopted the adapter's weights and the frozen ones."""

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__(config)
        self.rounds_matrices = False  # an adapter's are too small for their messages to matter
        self._frozen: dict[str, list[tuple[nn.Module, str]]] = {}
        """By the base's name of a tensor: the buffers that are it, several where it is tied."""
        tied: dict[nn.Parameter, str] = {}
        for path, parameter in [*nn.Module.named_parameters(self, remove_duplicate=False)]:
            if parameter.requires_grad:
                continue
            place, _, name = path.rpartition(".")
            module = self.get_submodule(place)
            base = tied.setdefault(parameter, base_name(path))
            self._frozen.setdefault(base, []).append((module, name))
            delattr(module, name)
            module.register_buffer(name, parameter.detach(), persistent=False)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for path, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield self.name_of(path), parameter

    def name_of(self, path: str) -> str:
        return stored_name(path)

    def init_weights(self, seed: int) -> None:
        """Draws the adapter's weights, and the frozen ones too where there are none yet."""
        self.adopt(dict(initial_weights(self.config, seed)))
        if any(values.is_meta for values in self.frozen.values()):
            self.adopt_frozen(dict(foreign.initial_weights(self.config.base, seed)))

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The frozen tensors by the base's names, in its order."""
        tensors: dict[str, Tensor] = {}
        for name, places in self._frozen.items():
            module, buffer = places[0]
            tensors[name] = module.get_buffer(buffer)
        return tensors

    def adopt_frozen(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the tensors themselves the frozen ones, tied ones in all places."""
        for name, places in self._frozen.items():
            for module, buffer in places:
                module.register_buffer(buffer, weights[name], persistent=False)

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Returns the base's tensors as they compute alone what it computes with the adapter:
        W + alpha / r * B A."""
        tensors = self.frozen
        for path, module in self.named_modules():
            added = getattr(module, "get_delta_weight", None)
            if added is not None:
                tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + added("default")
        return tensors


def initial_weights(config: ForeignConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields an adapter's weights as PEFT draws them, so that at first it adds nothing: A is uniform
    in +-1 / sqrt(in), by a generator of each matrix's own, and B is zero."""
    for name, shape in config.parameter_shapes.items():
        matrix = torch.zeros(shape)
        if ".lora_A." in name:
            with seeded(f"weights:{seed}:{name}"):
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        yield name, matrix


class FrozenWeights:
    """The frozen tensors as what `jobs.exact` gathers from several workers."""

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model

    @property
    def blocks(self) -> Iterable[object]:
        return self._model.blocks

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self._model.frozen.items()

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        self._model.adopt_frozen(weights)
