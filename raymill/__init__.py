"""Exact elastic data parallelism for any PyTorch module: the same bits in the final weights for any
number of workers, however often that number changes.

What is named here is imported when it is asked for: `import raymill` itself loads no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymill.engine import ExactEngine, StepFigures
    from raymill.errors import LostPeerError, UserError
    from raymill.observer import StepObserver
    from raymill.rules.adamw import AdamW
    from raymill.rules.muon import Muon
    from raymill.rules.update_rule import Stretch, Unit, UpdateRule

_HOMES = {
    "AdamW": "raymill.rules.adamw",
    "ExactEngine": "raymill.engine",
    "LostPeerError": "raymill.errors",
    "Muon": "raymill.rules.muon",
    "StepFigures": "raymill.engine",
    "StepObserver": "raymill.observer",
    "Stretch": "raymill.rules.update_rule",
    "Unit": "raymill.rules.update_rule",
    "UpdateRule": "raymill.rules.update_rule",
    "UserError": "raymill.errors",
}

__all__ = [
    "AdamW",
    "ExactEngine",
    "LostPeerError",
    "Muon",
    "StepFigures",
    "StepObserver",
    "Stretch",
    "Unit",
    "UpdateRule",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raymill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
