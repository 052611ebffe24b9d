"""A LoRA adapter as data, and where it stands in a module.

The matrix W (out, in) of a linear layer is frozen, and the layer computes with W + alpha / r * B A,
of which A (r, in) and B (out, r) are trained (Hu et al., arXiv 2106.09685). Files and names of
parameters are PEFT's, so that PEFT and vLLM load what is stored. This module imports PEFT and
PyTorch only when it is asked for a module.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from model.tables import pip_line
from raymill.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_ON_HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?")
_PREFIX = "base_model.model."
_SLOT = ".default."  # PEFT's name for the only adapter of a module
_BASE = ".base_layer."
_CHANGES = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


class AdapterError(UserError):
    """An adapter cannot be made, or a stored one is of another kind."""


@dataclass(frozen=True)
class Adapter:
    """The low-rank matrices that are trained beside frozen ones."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    """The last names of the layers that have one, such as `q_proj`, sorted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(sorted(self.targets)))  # a file has a list

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_peft(self, base: str | None) -> dict[str, Any]:
        """Returns the content of adapter_config.json, over a base by its path, or its place on the
        Hub: hf://OWNER/NAME@REVISION."""
        on_hub = _ON_HUB.fullmatch(base or "")
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": on_hub[1] if on_hub else base,
            "revision": on_hub[2] if on_hub else None,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": [*self.targets],
            "bias": "none",
            "inference_mode": True,
        }

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> Self:
        """Raises `AdapterError` for an adapter of another kind."""
        targets = values.get("target_modules")
        is_plain = values.get("peft_type") == "LORA" and values.get("bias", "none") == "none"
        changes = [name for name in _CHANGES if values.get(name)]
        if not is_plain or changes or not isinstance(targets, list):
            raise AdapterError(
                f"adapter_config.json: expected a plain LoRA with a list of target_modules; it has peft_type "
                f"{values.get('peft_type')!r}, bias {values.get('bias')!r}"
                f"{''.join(f', {name}' for name in changes)}"
            )
        return cls(int(values["r"]), int(values["lora_alpha"]), tuple(targets))


def linear_layers(module: "nn.Module", blocks: str) -> dict[str, "nn.Module"]:
    """Returns the linear layers below the module of this name, by their own names."""
    from torch import nn  # noqa: PLC0415 (takes a second, which reading a file need not)
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 (as above)

    layers: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        if name.startswith(f"{blocks}.") and isinstance(layer, (nn.Linear, Conv1D)):
            layers[name] = layer
    return layers


def chosen_targets(layers: Iterable[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Returns the last names of the layers that get an adapter: all, unless some are wanted. Raises
    `AdapterError` for one that there is not."""
    there = {name.rpartition(".")[2] for name in layers}
    if unknown := sorted({*wanted} - there):
        raise AdapterError(
            f"train.lora_targets has {unknown[0]!r}, which no linear layer of the model's blocks is called; expected "
            f"some of {', '.join(sorted(there))}"
        )
    return tuple({*wanted} or there)


def put_into(module: "nn.Module", adapter: Adapter, layers: Mapping[str, "nn.Module"]) -> None:
    """Gives these of the module's layers their low-rank matrices, without values, by PEFT's own
    layer. Raises `AdapterError` where PEFT is missing or cannot."""
    try:
        import peft  # noqa: PLC0415 (optional, and takes seconds)
    except ImportError as error:
        raise AdapterError(
            f"an adapter is computed by PEFT, which is not installed ({error}): `{pip_line('lora')}`"
        ) from None
    chosen = [name for name in layers if name.rpartition(".")[2] in adapter.targets]
    settings = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=chosen,
        # GPT-2's layers have their matrices the other way round
        fan_in_fan_out=any(type(layers[name]).__name__ == "Conv1D" for name in chosen),
    )
    try:
        peft.inject_adapter_in_model(settings, module, low_cpu_mem_usage=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise AdapterError(f"PEFT cannot adapt this model: {error}") from error


def stored_name(parameter: str) -> str:
    """Returns the name by which PEFT stores a parameter of an adapter."""
    return _PREFIX + parameter.replace(_SLOT, ".")


def base_name(parameter: str) -> str:
    """Returns the name that a frozen parameter has in the base."""
    return parameter.replace(_BASE, ".")
