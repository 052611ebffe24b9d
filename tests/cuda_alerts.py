"""Tells on a CPU which operations of a computation a GPU would refuse, under
`torch.use_deterministic_algorithms(True)`, as they have no deterministic form there.

`cuda_alerts.toml` has them, by the sentences of PyTorch's documentation.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
TABLE_OF_VERSION: str = _TABLE["torch"]
DETERMINISTIC: Sequence[str] = _TABLE["deterministic"]
"""The sentences of what acts deterministically."""


@dataclass(frozen=True)
class Alert:
    """One sentence of what raises."""

    documented: str
    is_backward: bool
    operations: Sequence[str]  # of `torch.ops.aten`, with their overloads
    when: Mapping[str, object] = field(default_factory=dict)
    """For which arguments, by name: their value, or "given", "quantized" or "floating", also of the
    "result"."""

    @property
    def name(self) -> str:
        """The last word of its name in the documentation."""
        return name_of(self.documented)

    def holds_for(self, arguments: Mapping[str, Any]) -> bool:
        return all(_is(arguments.get(name), value) for name, value in self.when.items())


ALERTS = [
    Alert(
        documented=entry["documented"],
        is_backward=entry["pass"] == "backward",
        operations=entry["operations"],
        when=entry.get("when", {}),
    )
    for entry in _TABLE["refused"]
]


def name_of(documented: str) -> str:
    [name, *_] = re.findall(r"`([\w.]+)`", documented)
    return str(name.rpartition(".")[2])


def _is(argument: object, expected: object) -> bool:
    match expected:
        case "given":
            return argument is not None
        case "quantized":
            return isinstance(argument, Tensor) and argument.is_quantized
        case "floating":
            dtype = argument.dtype if isinstance(argument, Tensor) else argument
            assert isinstance(dtype, torch.dtype)
            return dtype.is_floating_point or dtype.is_complex
    return argument == expected


class CudaAlerts(TorchDispatchMode):
    """Watches the operations of this thread, forward and backward, as long as it is entered. Those
    that a GPU would refuse come into `found`, by the last word of their names in PyTorch's
    documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._alerts: dict[object, list[Alert]] = defaultdict(list)
        for alert in ALERTS:
            for operation in alert.operations:
                name, _, overload = operation.partition(".")
                self._alerts[getattr(getattr(torch.ops.aten, name), overload)].append(alert)

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        for alert in self._alerts.get(func, ()):
            if alert.holds_for(_arguments(func, args, named)):
                self.found.add(alert.name)
        return func(*args, **named)


def _arguments(func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an operation's arguments by name, with those that are left out, and the type of its
    result."""
    declared = func._schema.arguments
    arguments = {argument.name: argument.default_value for argument in declared}
    arguments |= {argument.name: value for argument, value in zip(declared, args, strict=False)}
    arguments |= named
    arguments["result"] = arguments.get("dtype") or arguments.get("self")
    return arguments


def documented_sentences() -> tuple[list[str], list[str]]:
    """Returns what the installed PyTorch's documentation says acts deterministically, and what it
    says raises."""
    text = str(torch.use_deterministic_algorithms.__doc__)
    _, _, after = text.partition("normally-nondeterministic operations will act")
    first, _, rest = after.partition("normally-nondeterministic operations will throw a")
    second, _, _ = rest.partition("In addition, several operations")
    deterministic, refused = (_bullets(section) for section in (first, second))
    return deterministic, refused


def _bullets(section: str) -> list[str]:
    """Returns the points of a list, each on one line."""
    without_next = section.rpartition("\n\n    The following")[0] or section
    _, *points = re.split(r"^\s+\* ", without_next, flags=re.MULTILINE)
    return [" ".join(point.split()) for point in points]
