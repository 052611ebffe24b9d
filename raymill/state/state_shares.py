"""Takes a training state apart into the shares that ranks write, keep in memory or send, and puts it
together again from the shares of any world."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from raymill.state.span import PackedSpans, Span
from raymill.state.train_state import TrainState


class StatePiece(NamedTuple):
    """Some of the state's values, which lie end to end."""

    name: str  # "values" or one of the rule's vectors
    places: list[Span]  # in the flat buffer
    values: Tensor


class StateShares:
    """The share of a training state that each rank has to store. The shares of all ranks of any world make
    the whole state."""

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def spans(self, name: str, rank: int, *, world_size: int) -> PackedSpans:
        """Returns the spans of the layout of which a rank's share has the values of this name."""
        state = self._state
        return state.layout.parts(rank, world_size=world_size) & state.extent(name)

    def views(self, rank: int, *, world_size: int) -> dict[str, list[Tensor]]:
        """Returns views of a rank's share by name, in the order of its `spans`; where the state is
        sharded, that rank must be this one."""
        share: dict[str, list[Tensor]] = {}
        for name, flat in self._state.parts.items():
            kept = self._state.kept(name)
            spans = self.spans(name, rank, world_size=world_size).spans
            share[name] = [kept.home_of(span).of(flat) for span in spans]
        return share

    def own_spans(self, name: str) -> PackedSpans:
        """Returns the `spans` of this rank's share to store, whether the state is sharded or
        not."""
        sharding = self._state.sharding
        return self.spans(name, sharding.place, world_size=sharding.num_holders)

    def own_views(self) -> dict[str, list[Tensor]]:
        """Returns the `views` of this rank's share to store."""
        sharding = self._state.sharding
        return self.views(sharding.place, world_size=sharding.num_holders)

    def load(self, num_updates: int, pieces: Iterable[StatePiece]) -> None:
        """Loads the whole state; each rank takes the values that it keeps. A piece is used before
        the next one is asked for."""
        state = self._state
        state.set_num_updates(num_updates)
        num_loaded = 0
        for piece in pieces:
            num_loaded += len(piece.values)
            state.load(*piece)
        expected = sum(state.extent(name).num_values for name in state.parts)
        assert num_loaded == expected, f"{num_loaded} of {expected} values"

    def brought(self, name: str, span: Span, *, bucket: int) -> Tensor:
        """Returns "values" or one of the rule's vectors at a stretch of a bucket on rank 0, from
        the owners of its parts; all ranks call together, and the others get nothing."""
        state = self._state
        flat = state.parts[name]
        is_receiver = state.group.rank == 0
        received = flat.new_empty(len(span) if is_receiver else 0)
        if not state.sharding.writes:
            return received
        parts = state.layout.divided(len(state.peers))[bucket]
        overlaps = [part & span for part in parts]
        own_overlap = overlaps[state.sharding.place]
        sources: list[Tensor] = []
        if not own_overlap.is_empty:
            sources = [state.kept(name).home_of(own_overlap).of(flat)]
        targets: list[tuple[int, list[Tensor]]] = []
        for peer, overlap in enumerate(overlaps):
            if is_receiver and not overlap.is_empty:
                target = overlap.shifted(-span.start).of(received)
                targets.append((peer, [target]))
        state.peers.pass_on([(0, sources)], targets)
        return received
