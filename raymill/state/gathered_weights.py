"""Puts the weights where the model computes with them: rounded once a step, or brought together
from the members that own parts of them.

Where the model computes in bf16, the matrices of the decoder's blocks are bf16 parameters, however
the run is sharded: so compiled kernels are one graph. Their products are those of fp32 parameters
that autocast rounds, and so are their gradients, which are bf16 numbers.

Sharded weights are gathered (ZeRO-3, arXiv 1910.02054; as PyTorch's FSDP, arXiv 2304.11277).
Embeddings, biases and LayerNorms are gathered once a step, as fp32. The matrices of blocks take
turns in two slots of memory, block n in slot n % 2: each is gathered while the block before it
computes, and again for backward. Whole weights have memory for the rounded matrices of all blocks.

Kernels may be chosen by where a matrix lies in memory, so each lies as aligned whatever is sharded:
in fp32 at the same address modulo `ALIGNMENT_BYTES`, and in bf16 as autocast's copies, each of
which is memory of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from raymill.memory import ALIGNMENT_BYTES, aligned, large_zeros, room_to_align
from raymill.side_thread import side_work
from raymill.state.flat_layout import FlatLayout
from raymill.state.peers import Peers
from raymill.state.span import PackedSpans, Span
from raymill.step_timer import StepTimer

_TAG = 1  # of these messages: gloo keeps them apart from those of the exchange, in another thread
_NUM_SLOTS = 2


@runtime_checkable
class Gatherable(Protocol):
    """The tensors that are gathered of a model: its parameters, or those frozen beside them."""

    @property
    def blocks(self) -> Iterable[object]:
        """The modules that compute in turn, each of which is passed to `in_turn`'s call."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Makes the tensors themselves what the model computes with."""


def gatherable(model: object) -> Gatherable:
    """Returns a model whose weights can be gathered block by block."""
    assert isinstance(model, Gatherable), "nothing tells the blocks of this model"
    return model


@dataclass(frozen=True)
class Rounding:
    """How a model computes with matrices of blocks that are rounded once a step."""

    dtype: torch.dtype  # of the products, and of the matrices' gradients
    apart: bool  # whether each lies at an aligned place, as autocast's copies do


@dataclass(frozen=True)
class Home:
    """The place of a stretch of the flat layout in some memory."""

    span: Span  # of the flat layout
    start: int  # in the memory

    @property
    def stop(self) -> int:
        return self.start + len(self.span)

    def place_of(self, stretch: Span) -> Span:
        """Returns where the values of a stretch of the span lie."""
        return stretch.shifted(self.start - self.span.start)


class RoundedMatrices:
    """The matrices of the decoder's blocks in the type of their products, in memory that is filled
    from the whole `values` once a step."""

    def __init__(
        self, layout: FlatLayout, values: Tensor, *, dtype: torch.dtype, apart: bool
    ) -> None:
        """With `apart` each matrix begins at an aligned place."""
        self._values = values
        self._homes: list[Home] = []
        unit = ALIGNMENT_BYTES // dtype.itemsize
        end = 0
        for span in layout.decoder_blocks:
            for home in block_homes(layout, span, dtype, apart=apart):
                self._homes.append(Home(home.span, end + home.start))
            end = -(-self._homes[-1].stop // unit) * unit
        self._memory = large_zeros(end, dtype=dtype, device=values.device)

    def views(self, places: Mapping[str, Span]) -> dict[str, Tensor]:
        """Returns the matrices (n,) among the parameters that have these places in the layout."""
        views: dict[str, Tensor] = {}
        for name, place in places.items():
            view = _view_at_home(place, self._homes, self._memory)
            if view is not None:
                views[name] = view
        return views

    def refresh(self) -> None:
        """Rounds the values as they are now."""
        for home in self._homes:
            rounded = home.place_of(home.span).of(self._memory)
            rounded.copy_(home.span.of(self._values))


class _Rest:
    """Memory for a stretch outside the decoder's blocks, which exists while the weights are in
    use."""

    def __init__(self, home: Home, device: torch.device) -> None:
        self.home = home
        size = home.stop + room_to_align(torch.float32, device)
        self._memory = torch.empty(size, device=device)
        self._offset: int | None = None  # of the parameters' views in the memory
        self._parameters: list[tuple[Span, Tensor]] = []

    def add(self, place: Span, parameter: Tensor) -> None:
        """Makes a parameter, whose place in the flat layout is given, a view of the memory."""
        self._parameters.append((self.home.place_of(place), parameter))

    def view(self, place: Span) -> Tensor:
        return self.home.place_of(place).of(self._memory)

    def allocated(self) -> Tensor:
        """Returns new memory to fill, with the parameters as views of it."""
        self._memory.untyped_storage().resize_(self._memory.nbytes)
        memory = aligned(self._memory)
        offset = int(memory.storage_offset())  # on a CPU, memory begins anywhere
        if offset != self._offset:
            self._offset = offset
            for place, parameter in self._parameters:
                parameter.data = place.of(memory).view(parameter.shape)
        return memory

    def release(self) -> None:
        self._memory.untyped_storage().resize_(0)


class GatheredWeights:
    """Makes the model's parameters views of memory that is filled while `in_use`, from each
    member's `own_values`."""

    def __init__(
        self,
        model: Gatherable,
        layout: FlatLayout,
        own_values: Tensor,
        peers: Peers,
        *,
        block_type: torch.dtype,
        apart: bool,
    ) -> None:
        """`own_values` has this member's parts of all buckets, end to end. With `apart` each matrix
        of a block begins at an aligned place."""
        device = own_values.device
        self._own_values = own_values
        self._peers = peers
        num_peers = len(peers)
        self._parts = [layout.parts(peer, world_size=num_peers) for peer in range(num_peers)]
        self._side_work = side_work(device)

        spans = layout.decoder_blocks
        self._numbers = {id(block): number for number, block in enumerate(model.blocks)}
        self._homes = [block_homes(layout, span, block_type, apart=apart) for span in spans]
        longest = max(homes[-1].stop for homes in self._homes)
        self._slots = [
            large_zeros(longest, dtype=block_type, device=device) for _ in range(_NUM_SLOTS)
        ]
        self._held: list[int | None] = [None] * _NUM_SLOTS  # the number of the block in each slot

        between = _between(spans, layout.size)
        self._rests = [_Rest(_as_in_the_layout(span, torch.float32), device) for span in between]
        self._move_parameters(model, layout)
        self._release()

    def _move_parameters(self, model: Gatherable, layout: FlatLayout) -> None:
        """Makes each parameter a view of the memory that will hold it."""
        views: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            place = layout.places[name]
            # The slot is filled in between
            views[name] = self._view(place).view(parameter.shape).data
        model.adopt(views)
        for name, parameter in model.named_parameters():
            place = layout.places[name]
            for rest in self._rests:
                if place.meets(rest.home.span):
                    rest.add(place, parameter)

    def _view(self, place: Span) -> Tensor:
        for number, homes in enumerate(self._homes):
            view = _view_at_home(place, homes, self._slots[number % _NUM_SLOTS])
            if view is not None:
                return view
        [rest] = [rest for rest in self._rests if place.meets(rest.home.span)]
        return rest.view(place)

    @contextmanager
    def in_use(self, timer: StepTimer | None) -> Iterator[None]:
        """Lasts while the model computes, between two updates; all members enter and leave
        together. The timer learns how long the model waits for weights."""
        self._held = [None] * _NUM_SLOTS
        with self._side_work.timed_by(timer):
            for rest in self._rests:
                self._side_work.submit(self._gather, rest.allocated(), [rest.home])
            self._side_work.wait()
            yield
            self._side_work.wait()
        self._release()

    def close(self) -> None:
        self._side_work.close()

    def in_turn(self, block: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Returns the call of a block, which gets its module and values, such that it waits for the
        block's matrices, forward and backward, and begins to gather the next."""

        def waiting(module: nn.Module, *values: object) -> Tensor:
            number = self._numbers[id(module)]
            self._prepare(number, number + 1)
            y = block(module, *values)
            if y.requires_grad:
                y.register_hook(lambda _: self._prepare(number, number - 1))
            return y

        return waiting

    def _prepare(self, number: int, following: int) -> None:
        """Returns with a block's matrices there; the other slot is free for those of the following
        one."""
        if not self._is_begun(number):
            self._begin(number)
        self._side_work.wait()
        if 0 <= following < len(self._homes) and not self._is_begun(following):
            self._begin(following)

    def _is_begun(self, number: int) -> bool:
        return self._held[number % _NUM_SLOTS] == number

    def _begin(self, number: int) -> None:
        slot = number % _NUM_SLOTS
        self._held[slot] = number
        self._side_work.submit(self._gather, self._slots[slot], self._homes[number])

    def _gather(self, target: Tensor, homes: Sequence[Home]) -> None:
        """Fills the target with the values of some stretches of the flat buffer, in order."""
        spans = PackedSpans([home.span for home in homes])
        own_values: list[Tensor] = []
        for own_place, _ in self._parts[self._peers.index].overlaps(spans):
            own_values.append(own_place.of(self._own_values).to(target.dtype))
        sources = [(peer, own_values) for peer in range(len(self._peers))]
        targets: list[tuple[int, list[Tensor]]] = []
        for peer, parts in enumerate(self._parts):
            places = _places(parts.spans, homes)
            targets.append((peer, [place.of(target) for place in places]))
        self._peers.pass_on(sources, targets, tag=_TAG)

    def _release(self) -> None:
        for rest in self._rests:
            rest.release()


def _view_at_home(place: Span, homes: Sequence[Home], memory: Tensor) -> Tensor | None:
    """Returns the view of a parameter, given its place in the flat layout; None where it has no
    home in this memory."""
    for home in homes:
        if place.meets(home.span):
            return home.place_of(place).of(memory)
    return None


def block_homes(layout: FlatLayout, span: Span, dtype: torch.dtype, *, apart: bool) -> list[Home]:
    """Returns where the matrices of a block lie in a slot: as in the flat layout, or each at an
    aligned place. Matrices that need no gap between them are one stretch, and travel together."""
    if not apart:
        return [_as_in_the_layout(span, dtype)]
    unit = ALIGNMENT_BYTES // dtype.itemsize
    homes: list[Home] = []
    for place in layout.places.values():
        if not place.meets(span):
            continue
        if not homes:
            homes.append(Home(place, 0))
            continue
        last = homes[-1]
        if (place.start - last.span.start) % unit == 0:
            longer = Span(last.span.start, place.stop)
            homes[-1] = Home(longer, last.start)
        else:
            next_unit = -(-last.stop // unit) * unit
            homes.append(Home(place, next_unit))
    return homes


def _as_in_the_layout(span: Span, dtype: torch.dtype) -> Home:
    return Home(span, span.start % (ALIGNMENT_BYTES // dtype.itemsize))


def _places(parts: Sequence[Span], homes: Sequence[Home]) -> list[Span]:
    """Returns where the values of some parts lie in the memory of the homes, in order."""
    places: list[Span] = []
    for home in homes:
        for part in parts:
            stretch = part & home.span
            if not stretch.is_empty:
                places.append(home.place_of(stretch))
    return places


def _between(spans: Sequence[Span], size: int) -> list[Span]:
    """Returns the stretches of the flat buffer outside the spans."""
    between: list[Span] = []
    end = 0
    for span in sorted(spans, key=lambda span: span.start):
        between.append(Span(end, span.start))
        end = span.stop
    between.append(Span(end, size))
    return [span for span in between if not span.is_empty]
