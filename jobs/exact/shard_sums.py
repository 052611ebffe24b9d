"""Sums the gradients of a group's micro-batches along the tree, each member the parts that it owns.

As backward finishes a bucket, it goes to the owners of its parts: an owner gets a piece from each member at once, and
takes them in order. No member ever holds a whole gradient (ZeRO-2, arXiv 1910.02054). The gradient of a block's matrix
that is computed in bf16 is a bf16 number, and travels as one: no bit is lost. Sums are fp32.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jobs.exact.flat_layout import FlatLayout, at, end_to_end, moved, part_of, shared
from jobs.exact.lane_sums import FinalBuckets, add_up, hand_over_gradients
from jobs.exact.side_thread import SideStream, SideThread
from jobs.exact.step_plan import StepPlan
from jobs.exact.train_state import TrainState
from model.cpu_ops.loans import Scratch, gradient_sinks, lent, scratch_memory
from model.operations import product_type


class ShardSums:
    """Sums into `buffers`, each of this member's parts (P / g,) end to end. In the last turn it calls `on_final`,
    beside backward, with each bucket whose parts are summed.

    With `lends` backward is lent memory for the largest gradient, which `model.cpu_ops` then makes only once.
    """

    def __init__(
        self,
        state: TrainState,
        buffers: list[Tensor],
        side_work: SideThread | SideStream,
        *,
        lends: bool,
        on_final: Callable[[int], None],
    ) -> None:
        self._layout = layout = state.layout
        self._buffers, self._peers = buffers, state.peers
        self._own = end_to_end(state.owned)  # where each bucket's part lies in the buffers
        self._side_work, self._lends, self._on_final = side_work, lends, on_final
        self._parameters, self._final = dict(state.model.named_parameters()), FinalBuckets(layout, self._send)
        gradient_type = product_type(state.config.numerics)
        self._types = [gradient_type if _is_full(b, layout.decoder_blocks) else torch.float32 for b in layout.buckets]
        self._stretches = {name: _stretches(layout, place) for name, place in layout.places.items()}
        self._has_gaps = [not _is_full(bucket, layout.places.values()) for bucket in layout.buckets]
        self._pieces: dict[int, Tensor] = {}  # of the buckets that backward has begun
        self._plan: StepPlan | None = None
        self._scratch = Scratch()
        self._largest = max(self._parameters.values(), key=nn.Parameter.numel)
        hand_over_gradients(self._parameters, self._take)

    @contextmanager
    def turn(self, plan: StepPlan, turn: int) -> Iterator[None]:
        """Lasts for the forward and backward pass of one micro-batch."""
        self._plan, self._turn, self._num_taken = plan, turn, 0
        self._final.begin()
        sinks = {self._largest: torch.empty_like(self._largest)} if self._lends else {}
        try:
            with lent(gradient_sinks, sinks), lent(scratch_memory, self._scratch):
                yield
        finally:
            self._plan = None
        assert self._num_taken == len(self._parameters), "a parameter got no gradient"

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        if self._plan is None:
            return
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.flatten(), None
        for bucket, target, source in self._stretches[name]:
            if bucket not in self._pieces:
                make = gradient.new_zeros if self._has_gaps[bucket] else gradient.new_empty
                self._pieces[bucket] = make(len(self._layout.buckets[bucket]), dtype=self._types[bucket])
            at(self._pieces[bucket], target).copy_(at(gradient, source))
        self._num_taken += 1
        self._final.finish(name)

    def _send(self, bucket: int) -> None:
        piece = self._pieces.pop(bucket)
        for stream in self._side_work.streams:
            piece.record_stream(stream)
        self._side_work.submit(self._add, bucket, piece, self._plan, self._turn)

    def _add(self, bucket: int, piece: Tensor, plan: StepPlan, turn: int) -> None:
        size, steps, own = len(self._peers), plan.steps_of_turn(turn), self._own[bucket]
        lengths = [len(part_of(self._layout.buckets[bucket], n, world_size=size)) for n in range(size)]
        if self._peers.index >= len(steps):  # this member's micro-batch does not count
            piece, lengths = piece[:0], [0] * size
        received = piece.new_empty(len(steps) * len(own))
        self._peers.exchange(received, piece, [len(own) * (n < len(steps)) for n in range(size)], lengths)
        views = [at(buffer, own) for buffer in self._buffers]
        for step, values in zip(steps, received.view(len(steps), len(own)), strict=True):
            if step.adds:
                views[step.buffer].add_(values)
            else:
                views[step.buffer].copy_(values)
            add_up(views, step)
        if turn == len(plan.turns) - 1:
            self._on_final(bucket)


def _is_full(bucket: range, places: Iterable[range]) -> bool:
    """Reports whether a bucket has nothing beside what lies at these places."""
    return sum(len(shared(bucket, place)) for place in places) == len(bucket)


def _stretches(layout: FlatLayout, place: range) -> list[tuple[int, range, range]]:
    """Returns each bucket that has values of a parameter, and where they are in the bucket and in the parameter."""
    found = [(number, bucket.start, shared(bucket, place)) for number, bucket in enumerate(layout.buckets)]
    return [(number, moved(both, start), moved(both, place.start)) for number, start, both in found if both]
