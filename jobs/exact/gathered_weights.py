"""Brings weights together from the members that own parts of them, for as long as the model computes with them.

(ZeRO-3, arXiv 1910.02054; as PyTorch's FSDP, arXiv 2304.11277.) Embeddings, biases and LayerNorms are gathered once a
step, as fp32. The matrices of the decoder's blocks take turns in two slots of memory, block n in slot n % 2: each is
gathered while the block before it computes, again for backward, and in bf16 where the model computes in it. They are
then bf16 parameters, with the same products.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jobs.exact.flat_layout import FlatLayout, at, moved, shared, stretches
from jobs.exact.peers import Peers
from jobs.exact.side_thread import side_work
from model.gpt import GPT
from model.operations import Operations

_TAG = 1  # of these messages: gloo keeps them apart from those of the exchange, in another thread
_ALIGNMENT = 32  # values: a slot's memory begins at a multiple in the flat buffer, so that kernels find the same one
_NUM_SLOTS = 2


class GatheredWeights:
    """Makes the model's parameters views of memory that is filled while `in_use`, from each member's `own_values`."""

    def __init__(self, model: GPT, layout: FlatLayout, own_values: Tensor, peers: Peers, *, bf16: bool) -> None:
        """`own_values` has this member's parts of all buckets, end to end."""
        self._layout, self._own_values, self._peers = layout, own_values, peers
        self._blocks = {id(block): number for number, block in enumerate(model.blocks)}
        self._side_work = side_work(own_values.device)
        self._parts = [layout.parts(n, world_size=len(peers)) for n in range(len(peers))]
        self._held: list[int | None] = [None] * _NUM_SLOTS
        spans = layout.decoder_blocks
        longest = max(len(span) for span in spans) + _ALIGNMENT
        block_type = torch.bfloat16 if bf16 else torch.float32
        self._slots = [own_values.new_zeros(longest, dtype=block_type) for _ in range(_NUM_SLOTS)]
        self._rest_spans = _between(spans, layout.size)
        self._rest = [own_values.new_empty(len(span)) for span in self._rest_spans]
        homes = [(span, _aligned(span).start, self._slots[n % _NUM_SLOTS]) for n, span in enumerate(spans)]
        homes += [(span, span.start, flat) for span, flat in zip(self._rest_spans, self._rest, strict=True)]
        views: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            place = layout.places[name]
            start, flat = next((start, flat) for span, start, flat in homes if shared(span, place))
            views[name] = at(flat, moved(place, start)).view(parameter.shape).data  # the slot is filled in between
        model.load_state_dict(views, assign=True)
        self._release()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lasts while the model computes, between two updates; all members enter and leave together."""
        self._held = [None] * _NUM_SLOTS
        for flat, span in zip(self._rest, self._rest_spans, strict=True):
            flat.untyped_storage().resize_(flat.nbytes)
            self._gather(flat, span)
        yield
        self._side_work.wait()
        self._release()

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
        self._side_work.submit(self._gather, self._slots[slot], _aligned(self._layout.decoder_blocks[number]))

    def _gather(self, target: Tensor, span: range) -> None:
        """Fills the target with the values at a stretch of the flat buffer."""
        pieces = [[both for part in parts if (both := shared(part, span))] for parts in self._parts]
        own_places = stretches(self._parts[self._peers.index], [span])
        own = [at(self._own_values, place).to(target.dtype) for place, _ in own_places]
        places = [[at(target, moved(both, span.start)) for both in of_peer] for of_peer in pieces]
        self._peers.pass_on([(n, own) for n in range(len(self._peers))], [*enumerate(places)], tag=_TAG)

    def _release(self) -> None:
        for flat in self._rest:
            flat.untyped_storage().resize_(0)


def _aligned(span: range) -> range:
    return range(span.start - span.start % _ALIGNMENT, span.stop)


def _between(spans: Sequence[range], size: int) -> list[range]:
    """Returns the stretches of the flat buffer outside the spans."""
    ends = sorted([0, size, *(end for span in spans for end in (span.start, span.stop))])
    return [range(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=True) if stop > start]
