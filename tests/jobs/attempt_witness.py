"""Notes what a process makes to compute, and tells what of it is alive: states, parameters, sums
and flat buffers."""

import weakref
from collections import Counter
from typing import Any

from jobs.exact.batch_gradient import BatchGradient
from jobs.exact.state.train_state import TrainState


class AttemptWitness:
    """Watches every `BatchGradient` that this process makes from now on, a self-test's too, with
    the state below it."""

    def __init__(self) -> None:
        self.num_watched = 0
        self._made: list[tuple[str, weakref.ref[Any]]] = []
        make = BatchGradient.__init__

        def watched(
            gradient: BatchGradient, config: Any, state: TrainState, *rest: Any, **options: Any
        ) -> None:
            make(gradient, config, state, *rest, **options)
            self._note(gradient, state)

        BatchGradient.__init__ = watched  # type: ignore[method-assign]
        self._undo = make

    def close(self) -> None:
        BatchGradient.__init__ = self._undo  # type: ignore[method-assign]

    def alive(self) -> Counter[str]:
        """Returns how many of each kind are alive."""
        return Counter(kind for kind, made in self._made if made() is not None)

    def _note(self, gradient: BatchGradient, state: TrainState) -> None:
        self.num_watched += 1
        kinds = {
            "gradient": [gradient],
            "state": [state],
            "model": [state.model],
            "parameter": [*state.model.parameters()],
            "flat buffer": [state.values, state.gradient, *state.vectors.values()],
        }
        if gradient._is_exact:
            kinds["sums"] = [gradient._sum._sums]
            kinds["flat buffer"] += gradient._sum._exchange._buffers
        for kind, values in kinds.items():
            self._made += [(kind, weakref.ref(value)) for value in values]
