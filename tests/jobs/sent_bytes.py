"""Counts the bytes that this process sends to other ranks while a gradient or a sharded update is
exchanged."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


class SentBytes:
    """Bytes, which several threads add."""

    num_bytes = 0

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes


@contextmanager
def sent_bytes() -> Iterator[SentBytes]:
    """Counts messages from rank to rank and what is gathered from all, as they are handed to
    torch."""
    sent, stock = (
        SentBytes(),
        (dist.batch_isend_irecv, dist.all_to_all_single, dist.all_gather_single),
    )
    exchange, all_to_all, all_gather = stock

    def counted_exchange(messages: list[dist.P2POp]) -> Any:
        sent.add(sum(message.tensor.nbytes for message in messages if message.op is dist.isend))
        return exchange(messages)

    def counted_all_to_all(
        found: Tensor, own: Tensor, found_lengths: list[int], own_lengths: list[int]
    ) -> Any:
        sent.add(own.nbytes - own_lengths[dist.get_rank()] * own.itemsize)
        return all_to_all(found, own, found_lengths, own_lengths)

    def counted_gather(found: Tensor, own: Tensor) -> Any:
        sent.add(found.nbytes - own.nbytes)
        return all_gather(found, own)

    dist.batch_isend_irecv = counted_exchange
    dist.all_to_all_single, dist.all_gather_single = counted_all_to_all, counted_gather
    try:
        yield sent
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single, dist.all_gather_single = stock
