"""The explanation of a step: its lanes and rows, the rows that are to blame, and the step without
them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from cluster.output.json_result import JsonResult
from jobs.proof.step_outcomes import Outcome
from jobs.proof.where_run import TaughtDocument

STANDS_OUT = 1.5
"""A row's loss, or a lane's gradient norm, stands out from so many times the median of all."""

_FIRST_CHARS = 60


@dataclass(frozen=True)
class Lane(JsonResult):
    """A lane's own loss and gradient."""

    lane: int
    loss: float  # nats per token that it counts
    part: float  # of the step's loss: those of all lanes add up to it
    grad_norm: float  # of the gradient of its own loss
    tokens: int  # that count


@dataclass(frozen=True)
class Row(JsonResult):
    lane: int
    row: int  # its number in the lane
    sample: int  # of the run
    loss: float  # nats per token that it counts
    tokens: int  # that count


@dataclass(frozen=True)
class StepWithout(JsonResult):
    """The step without the tokens of some samples."""

    loss: float  # nats per counted token
    grad_norm: float
    tokens: int  # that count
    # The distance of the two updates, relative to that of the whole step, and their cosine; None
    # where one of them is nothing or not finite
    update_change: float | None
    update_cosine: float | None


@dataclass(frozen=True)
class RowDocument(TaughtDocument):
    """A document of a row, with its loss there, in nats per token that counts."""

    loss: float


@dataclass(frozen=True)
class WorstRow(Row):
    """A row that is to blame. The step without it is None where no token is left."""

    highest: list[str]  # in what it is the highest: `loss`, `grad_norm` or both
    grad_norm: float  # of the gradient of its own loss
    text: str
    documents: list[RowDocument]  # the one with the highest loss first
    document_rows: int  # of the step, that teach tokens of the first document
    without_row: StepWithout | None
    without_document: StepWithout | None
    without_lane: StepWithout | None

    @property
    def shown(self) -> str:
        """Where it is, and what it teaches first, for a sentence."""
        place = f"lane {self.lane}, row {self.row}"
        if not self.documents:
            return f'{place} ("{shortened(self.text)}")'
        document = self.documents[0]
        place += f": {document.name}"
        if document.text is not None:
            place += f' ("{document.text}")'
        if self.document_rows > 1:
            place += f", which has {self.document_rows} rows of the step"
        return place

    def json(self) -> dict[str, Any]:
        return {"highest": self.highest} | super().json()


@dataclass(frozen=True)
class Explanation(JsonResult):
    """The explanation of a step."""

    note: str | None  # how the step differs from what the ledger has of it
    step: int
    outcome: Outcome
    from_checkpoint: str | None  # from which the steps before it were taken again
    loss: float  # nats per counted token
    grad_norm: float
    tokens: int  # that count
    guard: str | None  # why the guard would not let the step stand
    stands_out: bool
    worst: list[WorstRow]
    no_documents: str | None  # why the documents are unknown
    lanes: list[Lane]
    rows: list[Row]
    html: str = ""  # URIs of its page and its figure, once they are written
    figure: str = ""

    @property
    def verdict(self) -> str:
        """The explanation in a sentence or two."""
        head = f"step {self.step}"
        head += "" if self.outcome is Outcome.LEARNED else f" ({self.outcome})"
        loss, norm = _number(self.loss), _number(self.grad_norm)
        first, *others = self.worst
        if not self.stands_out:
            return (
                f"{head}: no row stands out; loss {loss} and gradient norm {norm}. The highest loss, "
                f"{_number(first.loss)}, has {first.shown}"
            )
        without = first.without_document
        if without is None:
            return f"{head}: loss {loss} and gradient norm {norm} are those of all that counts, {first.shown}"
        loss_without, norm_without = _number(without.loss), _number(without.grad_norm)
        if not others and rank(without.grad_norm) < rank(self.grad_norm):
            return (
                f"{head}: loss {loss} and gradient norm {norm} come from {first.shown}; "
                f"without it {loss_without} and {norm_without}"
            )
        text = f"{head}: loss {loss} comes from {first.shown}; without it {loss_without}"
        if not others:
            return f"{text}, and gradient norm {norm_without} in place of {norm}"
        (other,) = others
        text += f". Of gradient norm {norm}, the largest gradient is that of {other.shown}"
        without = other.without_document
        return f"{text}; without it {_number(without.grad_norm)}" if without else text

    def json(self) -> dict[str, Any]:
        return {"verdict": self.verdict} | super().json()


def stands_out(values: Iterable[float]) -> bool:
    """Reports whether the highest is far from the others."""
    ranks = [rank(value) for value in values]
    return math.isinf(max(ranks)) or max(ranks) >= STANDS_OUT * median_low(ranks)


def rank(value: float) -> float:
    """Returns what figures are compared by: one that is not finite is above all."""
    return value if math.isfinite(value) else math.inf


def shortened(text: str) -> str:
    """Returns the front of a text in one line."""
    words = " ".join(text.split())
    return f"{words[:_FIRST_CHARS]}…" if len(words) > _FIRST_CHARS else words


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"
