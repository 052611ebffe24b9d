"""Notes what an update makes of a few blocks that one rank alone holds, and of a hidden matrix that
is updated as a whole, so that others can make it again.

Where each rank updates a copy of its own, or several groups do, audits compare the copies. Where
one rank owns each part, nobody else has its vectors: so in an audited step the owner shows what it
had before the update and what it has after it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.exact.audits.checksum import words_of
from jobs.exact.audits.excerpt import NotedSum, Repeated, checksum_of, disputed
from raymill.rules.hidden_matrix import HiddenMatrix
from raymill.rules.rules import vectors_of
from raymill.rules.update_rule import Stretch
from raymill.state.span import PackedSpans, Span
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup

_NO_LANES = range(0)


class Before(NamedTuple):
    """The owner's copy of neighboring values before their update."""

    span: Span  # of the layout
    decays: bool
    values: Tensor
    gradient: Tensor
    vectors: Sequence[Tensor]  # in the order of the rule's names
    matrix: HiddenMatrix | None = None  # which these values are


class UpdateNotes:
    """One rank's notes of one update, of what it owns at `span` of the layout outside of the
    matrices that are updated as a whole, and of one of these, if it owns that."""

    def __init__(self, span: Span, matrix: str | None, state: TrainState) -> None:
        layout = state.layout
        self._state = state
        self._num_updates = state.num_updates
        self._has_matrix = matrix is not None
        self._matrix: Before | None = None
        if matrix and (PackedSpans([layout.places[matrix]]) & state.owned).spans:
            self._matrix = self._noted(
                layout.places[matrix], decays=True, matrix=state.matrices[matrix]
            )
        self._before: list[Before] = []
        for owned in (PackedSpans([span]) & state.owned & layout.outside_matrices).spans:
            decayed = owned & Span(0, layout.boundary)
            undecayed = owned & Span(layout.boundary, layout.size)
            for part, decays in ((decayed, True), (undecayed, False)):
                if not part.is_empty:
                    self._before.append(self._noted(part, decays=decays))

    def repeated(self, group: WorkerGroup, *, norm: float, learning_rate: float) -> Repeated:
        """Returns the updates for which a rank finds other values than their owner now has; all
        ranks call together after the update, with the same figures."""
        own = [(_on_host(before), self._after(before)) for before in self._before]
        before_all: list[Before] = []
        shown: list[tuple[int, NotedSum]] = []
        for rank, notes in enumerate(group.gather(own)):
            for before, after in notes:
                before_all.append(before)
                shown.append((rank, after))
        if self._has_matrix:
            # Not with the others: where all gather, each sends as much as the one that has most
            owner = group.gather(self._matrix is not None).index(True)
            mine = (_on_host(self._matrix), self._after(self._matrix)) if self._matrix else None
            before, after = group.broadcast(mine, source=owner)
            before_all.append(before)
            shown.append((owner, after))
        differing: dict[int, int] = {}
        for number, (before, (_, noted)) in enumerate(zip(before_all, shown, strict=True)):
            values = self._updated(before, norm=norm, learning_rate=learning_rate)
            if not torch.equal(words_of(values), words_of(noted.values.to(values.device))):
                differing[number] = checksum_of(values, noted.start)
        return disputed(group, shown, differing)

    def _after(self, before: Before) -> NotedSum:
        now = self._noted(before.span, decays=before.decays, matrix=before.matrix)
        values = torch.cat([now.values, *now.vectors])
        return NotedSum(_NO_LANES, before.span.start, values.cpu())

    def _noted(self, span: Span, *, decays: bool, matrix: HiddenMatrix | None = None) -> Before:
        state = self._state

        def copied(name: str, flat: Tensor) -> Tensor:
            return state.kept(name).home_of(span).of(flat).clone()

        return Before(
            span,
            decays,
            copied("values", state.values),
            copied("gradient", state.gradient),
            [copied(name, state.vectors[name]) for name in vectors_of(state.rule, matrix)],
            matrix,
        )

    def _updated(self, before: Before, *, norm: float, learning_rate: float) -> Tensor:
        """Returns the values and the vectors after the update, end to end."""
        device = self._state.device
        scale = self._state.clipping(norm)
        gradient = before.gradient.to(device)
        stretch = Stretch(
            values=before.values.to(device, copy=True),
            gradient=gradient * scale if scale != 1.0 else gradient,
            vectors=[vector.to(device, copy=True) for vector in before.vectors],
            count=torch.full((), float(self._num_updates), device=device),
            decays=before.decays,
            matrix=before.matrix,
        )
        self._state.rule.update([stretch], learning_rate=learning_rate)
        return torch.cat([stretch.values, *stretch.vectors])


def _on_host(before: Before) -> Before:
    return before._replace(
        values=before.values.cpu(),
        gradient=before.gradient.cpu(),
        vectors=[vector.cpu() for vector in before.vectors],
    )
