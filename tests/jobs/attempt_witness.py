"""Notes what a process makes to compute, and tells what of it is alive: states, parameters, sums
and flat buffers."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from jobs.exact.batch_gradient import BatchGradient
from jobs.exact.lane_passes import LanePasses
from jobs.exact.stock_gradient import StockGradient
from raymill.state.train_state import TrainState


class AttemptWitness:
    """Watches every gradient that this process makes from now on, a self-test's too, with the state
    below it."""

    def __init__(self) -> None:
        self.num_watched = 0
        self._made: list[tuple[str, weakref.ref[Any]]] = []
        self._undo = [(kind, kind.__init__) for kind in (BatchGradient, StockGradient)]
        for kind, make in self._undo:
            kind.__init__ = self._watched(make)  # type: ignore[method-assign]

    def _watched(self, make: Callable[..., None]) -> Callable[..., None]:
        def watched(gradient: Any, passes: LanePasses, state: TrainState, *rest: Any) -> None:
            make(gradient, passes, state, *rest)
            self._note(gradient, state)

        return watched

    def close(self) -> None:
        for kind, make in self._undo:
            kind.__init__ = make  # type: ignore[method-assign]

    def alive(self) -> Counter[str]:
        """Returns how many of each kind are alive."""
        return Counter(kind for kind, made in self._made if made() is not None)

    def _note(self, gradient: BatchGradient | StockGradient, state: TrainState) -> None:
        self.num_watched += 1
        kinds = {
            "gradient": [gradient],
            "state": [state],
            "model": [state.model],
            "parameter": [*state.model.parameters()],
            "flat buffer": [state.values, state.gradient, *state.vectors.values()],
        }
        if isinstance(gradient, BatchGradient):
            kinds["sums"] = [gradient._sum._sums]
            kinds["flat buffer"] += gradient._sum._exchange._buffers
        for kind, values in kinds.items():
            self._made += [(kind, weakref.ref(value)) for value in values]
