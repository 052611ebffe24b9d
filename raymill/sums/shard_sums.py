"""Sums the gradients of a group's micro-batches along the tree: each member sums the parts that it
owns.

A bucket goes to the owners of its parts as soon as backward has finished it: an owner gets a piece
from each member at once, and adds them in order. No member ever holds a whole gradient (ZeRO-2,
arXiv 1910.02054). In bf16, the gradients of the blocks' matrices are bf16 numbers and travel as
such: no bit is lost. Sums are fp32.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raymill.loans import Scratch, gradient_sinks, lent, scratch_memory
from raymill.observer import StepObserver
from raymill.side_thread import SideStream, SideThread
from raymill.state.flat_layout import FlatLayout
from raymill.state.span import Span
from raymill.state.train_state import TrainState
from raymill.sums.lane_sums import FinalBuckets, add_up, hand_over_gradients
from raymill.sums.step_faults import OddGradient
from raymill.sums.step_plan import StepPlan


class ShardSums:
    """Sums into `buffers`, each of which has this member's parts (P / g,) end to end. In the last
    turn it calls `on_final`, beside backward, with each bucket whose parts are summed.

    With `lends` backward is lent memory for the largest gradient, which `model.cpu_ops` then makes
    only once.
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
        layout = state.layout
        self._buckets = layout.buckets
        self._buffers = buffers
        self._peers = state.peers
        self._homes = state.owned.homes  # of each bucket's part in the buffers
        self._lengths = [[*map(len, parts)] for parts in layout.divided(len(self._peers))]
        self._side_work = side_work
        self._lends = lends
        self._on_final = on_final
        self._parameters = dict(state.model.named_parameters())
        self._final = FinalBuckets(layout, self._send)
        self._types: list[torch.dtype] = []  # of each bucket
        self._has_gaps: list[bool] = []
        for bucket in layout.buckets:
            has_matrices_only = _is_full(bucket, layout.decoder_blocks)
            self._types.append(state.matrix_type if has_matrices_only else torch.float32)
            self._has_gaps.append(not _is_full(bucket, layout.places.values()))
        self._stretches = {name: _stretches(layout, place) for name, place in layout.places.items()}
        self._pieces: dict[int, Tensor] = {}  # of the buckets that backward has begun
        self.odd: OddGradient | None = None
        """The first gradient of the step that came in another number of parts than one."""
        self._plan: StepPlan | None = None
        self._observers: Sequence[StepObserver] = ()
        self._numbers: Sequence[int] = ()  # of the turn's micro-batches
        self._scratch = Scratch()
        self._largest = max(self._parameters.values(), key=nn.Parameter.numel)
        hand_over_gradients(self._parameters, self._take)

    @contextmanager
    def turn(
        self, plan: StepPlan, turn: int, observers: Sequence[StepObserver] = ()
    ) -> Iterator[None]:
        """Lasts for the forward and backward pass of one micro-batch."""
        self._plan = plan
        self._turn = turn
        self._lane = plan.turns[turn][0] // plan.num_micro_batches
        self._final.begin()
        with self._pass(plan.turns[turn], observers):
            yield

    @contextmanager
    def again(
        self, plan: StepPlan, numbers: Sequence[int], observers: Sequence[StepObserver]
    ) -> Iterator[None]:
        """Lasts for the pass of a micro-batch whose gradients only the observers want."""
        self._plan = None
        with self._pass(numbers, observers):
            yield

    @contextmanager
    def _pass(self, numbers: Sequence[int], observers: Sequence[StepObserver]) -> Iterator[None]:
        self._numbers, self._observers = numbers, observers
        self._num_parts = dict.fromkeys(self._parameters, 0)
        sinks = {self._largest: torch.empty_like(self._largest)} if self._lends else {}
        try:
            with lent(gradient_sinks, sinks), lent(scratch_memory, self._scratch):
                yield
            if self._plan:
                self._note_odd()
        finally:
            self._plan = None
            self._observers = ()

    def _note_odd(self) -> None:
        """Notes a parameter of which the pass brought no gradient, or several. Other members get
        zeros for one that there is not, which nobody applies: they wait for it."""
        for name, num_parts in self._num_parts.items():
            if num_parts == 1:
                continue
            self.odd = self.odd or OddGradient(self._lane, name, num_parts)
            if not num_parts:
                self._put_into_buckets(name, torch.zeros_like(self._parameters[name]).flatten())

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        if self._plan is None and not self._observers:
            return
        assert parameter.grad is not None
        gradient = parameter.grad.flatten()
        parameter.grad = None
        self._num_parts[name] += 1
        if self._num_parts[name] > 1:
            return  # the step is refused
        for observer in self._observers:
            observer.gradient(self._numbers, name, gradient)
        if self._plan:
            self._put_into_buckets(name, gradient)

    def _put_into_buckets(self, name: str, gradient: Tensor) -> None:
        for bucket, in_bucket, in_parameter in self._stretches[name]:
            if bucket not in self._pieces:
                self._pieces[bucket] = self._new_piece(bucket, gradient.device)
            target = in_bucket.of(self._pieces[bucket])
            target.copy_(in_parameter.of(gradient))
        self._final.finish(name)

    def _new_piece(self, bucket: int, device: torch.device) -> Tensor:
        make = torch.zeros if self._has_gaps[bucket] else torch.empty
        size = len(self._buckets[bucket])
        return make(size, dtype=self._types[bucket], device=device)

    def _send(self, bucket: int) -> None:
        piece = self._pieces.pop(bucket)
        for stream in self._side_work.streams:
            piece.record_stream(stream)
        self._side_work.submit(self._add, bucket, piece, self._plan, self._turn, self._observers)

    def _add(
        self,
        bucket: int,
        piece: Tensor,
        plan: StepPlan,
        turn: int,
        observers: Sequence[StepObserver],
    ) -> None:
        steps = plan.steps_of_turn(turn)
        home = self._homes[bucket]
        num_peers = len(self._peers)
        lengths = self._lengths[bucket]
        if self._peers.index >= len(steps):  # this member's micro-batch does not count
            piece = piece[:0]
            lengths = [0] * num_peers
        received = piece.new_empty(len(steps) * len(home))
        num_received = [len(home)] * len(steps) + [0] * (num_peers - len(steps))
        self._peers.exchange(received, piece, num_received, lengths)
        views = [home.of(buffer) for buffer in self._buffers]
        pieces = received.view(len(steps), len(home))
        for step, values in zip(steps, pieces, strict=True):
            target = views[step.buffer]
            if step.adds:
                target.add_(values)
                for observer in observers:
                    observer.partial_sum(target)
            else:
                target.copy_(values)
            add_up(views, step)
        if turn == len(plan.turns) - 1:
            self._on_final(bucket)


def _is_full(bucket: Span, places: Iterable[Span]) -> bool:
    """Reports whether a bucket has nothing beside what lies at these places."""
    return sum(len(bucket & place) for place in places) == len(bucket)


def _stretches(layout: FlatLayout, place: Span) -> list[tuple[int, Span, Span]]:
    """Returns each bucket that has values of a parameter, and their places in the bucket and in the
    parameter."""
    stretches: list[tuple[int, Span, Span]] = []
    for number, bucket in enumerate(layout.buckets):
        overlap = bucket & place
        if not overlap.is_empty:
            in_bucket = overlap.shifted(-bucket.start)
            in_parameter = overlap.shifted(-place.start)
            stretches.append((number, in_bucket, in_parameter))
    return stretches
