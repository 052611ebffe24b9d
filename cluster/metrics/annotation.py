"""Moments of a run or an endpoint that are shown beside its curves."""

from dataclasses import dataclass
from typing import Protocol

from cluster.wings import added


@dataclass(frozen=True)
class Annotation:
    """A moment that is shown in every dashboard that asks for its tags."""

    time_s: float
    kind: str
    subject: str  # such as run:ID
    text: str


class Annotating(Protocol):
    """Shows annotations, and delays nobody who adds one."""

    def add(self, annotation: Annotation) -> None: ...

    def close(self) -> None:
        """Waits some seconds for what is left to show."""


def annotator() -> Annotating | None:
    """Returns what the wings annotate with here, or None where nothing does."""
    found = (make() for make in added(lambda wing: wing.annotator))
    return next(filter(None, found), None)
