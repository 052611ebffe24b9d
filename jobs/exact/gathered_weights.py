"""Brings weights together from the members that own parts of them, for as long as the model computes with them.

(ZeRO-3, arXiv 1910.02054; as PyTorch's FSDP, arXiv 2304.11277.) Embeddings, biases and LayerNorms are gathered once a
step, as fp32. The matrices of the decoder's blocks take turns in two slots of memory, block n in slot n % 2: each is
gathered while the block before it computes, again for backward, and in bf16 where the model computes in it. They are
then bf16 parameters, with the same products.

Kernels may be chosen by where a matrix lies in memory, so each lies as aligned as unsharded: in fp32 at the same
address modulo `ALIGNMENT_BYTES`, and in bf16 as autocast's copies, each of which is memory of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jobs.exact.flat_layout import FlatLayout, at, moved, shared, stretches
from jobs.exact.peers import Peers
from jobs.exact.side_thread import side_work
from model.gpt import GPT
from model.operations import Operations
from model.training_memory import ALIGNMENT_BYTES, aligned, large_zeros, room_to_align

_TAG = 1  # of these messages: gloo keeps them apart from those of the exchange, in another thread
_NUM_SLOTS = 2


class Home(NamedTuple):
    """Where a stretch of the flat layout lies in some memory."""

    span: range  # of the flat layout
    start: int  # in the memory

    @property
    def end(self) -> int:
        return self.start + len(self.span)

    def of(self, place: range) -> range:
        """Returns where the values at a place of the span lie."""
        return moved(place, self.span.start, self.start)


class GatheredWeights:
    """Makes the model's parameters views of memory that is filled while `in_use`, from each member's `own_values`."""

    def __init__(
        self, model: GPT, layout: FlatLayout, own_values: Tensor, peers: Peers, *, block_type: torch.dtype, apart: bool
    ) -> None:
        """`own_values` has this member's parts of all buckets, end to end. With `apart` each matrix of a block begins
        at an aligned place. `block_type` is that of the blocks' matrices while the model computes."""
        self._own_values, self._peers, device = own_values, peers, own_values.device
        self._blocks = {id(block): number for number, block in enumerate(model.blocks)}
        self._side_work = side_work(device)
        self._parts = [layout.parts(n, world_size=len(peers)) for n in range(len(peers))]
        self._held: list[int | None] = [None] * _NUM_SLOTS
        spans = layout.decoder_blocks
        self._homes = [block_homes(layout, span, block_type, apart=apart) for span in spans]
        longest = max(homes[-1].end for homes in self._homes)
        self._slots = [large_zeros(longest, dtype=block_type, device=device) for _ in range(_NUM_SLOTS)]
        self._rest_homes = [_as_in_the_layout(span, torch.float32) for span in _between(spans, layout.size)]
        room = room_to_align(torch.float32, device)
        self._rest = [own_values.new_empty(home.end + room) for home in self._rest_homes]
        self._rest_offsets: list[int | None] = [None] * len(self._rest)  # of the views in each
        memory = [(home, self._slots[n % _NUM_SLOTS]) for n, homes in enumerate(self._homes) for home in homes]
        memory += zip(self._rest_homes, self._rest, strict=True)
        views: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            place = layout.places[name]
            home, flat = next((home, flat) for home, flat in memory if shared(home.span, place))
            views[name] = at(flat, home.of(place)).view(parameter.shape).data  # the slot is filled in between
        model.load_state_dict(views, assign=True)
        named = [(layout.places[name], parameter) for name, parameter in model.named_parameters()]
        self._rest_parameters = [
            [(home.of(place), parameter) for place, parameter in named if shared(home.span, place)]
            for home in self._rest_homes
        ]
        self._release()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lasts while the model computes, between two updates; all members enter and leave together."""
        self._held = [None] * _NUM_SLOTS
        for number, home in enumerate(self._rest_homes):
            self._gather(self._allocated(number), [home])
        yield
        self._side_work.wait()
        self._release()

    def _allocated(self, number: int) -> Tensor:
        """Returns new memory for what is gathered for a step, with the parameters as views of it."""
        flat = self._rest[number]
        flat.untyped_storage().resize_(flat.nbytes)
        memory = aligned(flat)
        offset = int(memory.storage_offset())  # on a CPU, memory begins anywhere
        if offset != self._rest_offsets[number]:
            self._rest_offsets[number] = offset
            for place, parameter in self._rest_parameters[number]:
                parameter.data = at(memory, place).view(parameter.shape)
        return memory

    def close(self) -> None:
        self._side_work.close()

    def operations(self, ops: Operations) -> Operations:
        """Returns operations that wait for a block's matrices, forward and backward, and begin to gather the next."""

        def block(module: nn.Module, *values: object) -> Tensor:
            number = self._blocks[id(module)]
            self._prepare(number, number + 1)
            y: Tensor = ops.block(module, *values)
            if y.requires_grad:
                y.register_hook(lambda _: self._prepare(number, number - 1))
            return y

        return ops._replace(block=block)

    def _prepare(self, number: int, following: int) -> None:
        """Returns with a block's matrices there; the other slot is free for those of the following one."""
        if self._held[number % _NUM_SLOTS] != number:
            self._start(number)
        self._side_work.wait()
        if 0 <= following < len(self._blocks) and self._held[following % _NUM_SLOTS] != following:
            self._start(following)

    def _start(self, number: int) -> None:
        slot = number % _NUM_SLOTS
        self._held[slot] = number
        self._side_work.submit(self._gather, self._slots[slot], self._homes[number])

    def _gather(self, target: Tensor, homes: Sequence[Home]) -> None:
        """Fills the target with the values of some stretches of the flat buffer, in order."""
        own_places = stretches(self._parts[self._peers.index], [home.span for home in homes])
        own = [at(self._own_values, place).to(target.dtype) for place, _ in own_places]
        received = [[at(target, place) for place in _places(parts, homes)] for parts in self._parts]
        self._peers.pass_on([(n, own) for n in range(len(self._peers))], [*enumerate(received)], tag=_TAG)

    def _release(self) -> None:
        for flat in self._rest:
            flat.untyped_storage().resize_(0)


def block_homes(layout: FlatLayout, span: range, dtype: torch.dtype, *, apart: bool) -> list[Home]:
    """Returns where the matrices of a block lie in a slot: as in the flat layout, or each at an aligned place. Those
    between which no gap is needed are one stretch, and travel together."""
    if not apart:
        return [_as_in_the_layout(span, dtype)]
    unit, homes = ALIGNMENT_BYTES // dtype.itemsize, list[Home]()
    for place in layout.places.values():
        if not shared(place, span):
            continue
        if homes and (place.start - homes[-1].span.start) % unit == 0:
            homes[-1] = homes[-1]._replace(span=range(homes[-1].span.start, place.stop))
        else:
            homes.append(Home(place, -(-homes[-1].end // unit) * unit if homes else 0))
    return homes


def _as_in_the_layout(span: range, dtype: torch.dtype) -> Home:
    return Home(span, span.start % (ALIGNMENT_BYTES // dtype.itemsize))


def _places(parts: Sequence[range], homes: Sequence[Home]) -> list[range]:
    """Returns where the values of some parts lie in the memory of the homes, in order."""
    places = []
    for home in homes:
        for part in parts:
            if stretch := shared(part, home.span):
                places.append(home.of(stretch))
    return places


def _between(spans: Sequence[range], size: int) -> list[range]:
    """Returns the stretches of the flat buffer outside the spans."""
    ends = sorted([0, size, *(end for span in spans for end in (span.start, span.stop))])
    return [range(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=True) if stop > start]
