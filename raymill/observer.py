"""Observers, which watch a step without being part of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from raymill.state.bundle import Bundle
    from raymill.state.span import Span
    from raymill.sums.step_plan import StepPlan
    from raymill.sums.step_totals import Measured


class StepObserver:
    """Sees a step as one worker takes it. A subclass overrides the methods that it wants: each of
    them does nothing here.

    Where the tree of lanes is added up by two workers, of which this one has lanes 0 and 1:

        begin                         the step's plan is known
        gradient   lane 0             of each parameter, as backward brings it
        gradient   lane 1
        partial_sum                   lane 1 was added to lane 0
        subtree    lanes 0 to 1       of each bundle, before it is exchanged
        node       lanes 0 to 3       of this worker's part, after the other's half was added
        update                        the whole gradient is there, and is about to be applied
        end                           the weights are updated

    What is handed over is the step's own memory. An observer that keeps it has to copy it; one that
    writes into it changes the step, as only a test would. Gradients and sums come from whichever
    thread makes them.
    """

    def begin(self, plan: "StepPlan", buffers: "Sequence[Tensor]") -> None:
        """The step begins; its sums are going to lie in the buffers."""

    def gradient(self, numbers: Sequence[int], name: str, values: "Tensor") -> None:
        """A parameter has its gradient of one turn, the sum over these micro-batches, before it is
        added to others. The losses are already divided by the count that the batch's mean is over:
        in an `ExactEngine`, by the number of lanes."""

    def partial_sum(self, values: "Tensor") -> None:
        """A gradient was added to the sum of lanes before it, which these values now are."""

    def subtree(self, lanes: range, bundle: "Bundle", values: "Tensor") -> None:
        """This worker has the sum of some lanes by itself, packed as the bundle exchanges it."""

    def node(self, lanes: range, bundle: "Bundle", span: "Span", values: "Tensor") -> None:
        """This worker has added others' sums to its own: a span of the bundle's packed values now
        has the sum of these lanes."""

    def update(self, measured: "Measured", *, learning_rate: float) -> None:
        """The gradient of the whole batch is in the state's buffer, and is about to be applied."""

    def end(self, measured: "Measured") -> None:
        """The step is over."""
