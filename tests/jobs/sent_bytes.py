"""Counts the bytes that this process sends to other ranks while a gradient or a sharded update is exchanged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


class SentBytes:
    num_bytes = 0


@contextmanager
def sent_bytes() -> Iterator[SentBytes]:
    """Counts messages from rank to rank and what is gathered from all, as they are handed to torch."""
    sent, exchange, all_gather = SentBytes(), dist.batch_isend_irecv, dist.all_gather

    def counted_exchange(messages: list[dist.P2POp]) -> Any:
        sent.num_bytes += sum(message.tensor.nbytes for message in messages if message.op is dist.isend)
        return exchange(messages)

    def counted_gather(found: list[Tensor], own: Tensor) -> Any:
        sent.num_bytes += (len(found) - 1) * own.nbytes
        return all_gather(found, own)

    dist.batch_isend_irecv, dist.all_gather = counted_exchange, counted_gather
    try:
        yield sent
    finally:
        dist.batch_isend_irecv, dist.all_gather = exchange, all_gather
