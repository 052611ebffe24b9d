"""Who asks: by whom turns are taken, and what work beside the engine is charged to."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Asker:
    """The client of a request."""

    name: str  # of its key, or else of its connection
    has_key: bool
    charge: Callable[[float], None]  # takes seconds of processor time


NOBODY = Asker("", has_key=False, charge=lambda seconds: None)
CURRENT_ASKER: ContextVar[Asker] = ContextVar("asker", default=NOBODY)
"""The client of the request that is being answered."""
