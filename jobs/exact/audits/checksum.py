"""Makes checksums of gradients and states, which ranks compare in place of the values.

Words are multiplied with odd numbers that grow with their places, and added up modulo 2^64. A
single flipped bit always changes the sum, as an odd number times a power of two below 2^64 is no
multiple of 2^64; so do two flips of the same bit at two places, which an exclusive or would miss.
Sums of integers are the same in any order, and so on any device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raymill.observer import StepObserver
from raymill.state.flat_layout import FlatLayout
from raymill.state.train_state import TrainState

# Words at a time, which take 8 bytes each meanwhile: those of a processor stay in its cache
_CHUNKS = {"cpu": 1 << 15, "cuda": 1 << 22}
_LOW = 0xFFFF_FFFF
_LOSSES = 0x9E37_79B9  # an odd number: losses do not make up for gradients
_WORDS = {2: torch.int16, 4: torch.int32}  # by the bytes of a value
_NAN = 0x7FFF_FFFF  # the word in place of whatever is no number


def checksum(values: Tensor, *, start: int, one_nan: bool = False) -> Tensor:
    """Returns the checksum (), int64, of values (n,) of two or four bytes, of which the first has
    the place `start`. With `one_nan` it does not tell apart what is no number: which NaN a sum is
    depends on the order of its terms, which is free."""
    words = words_of(values)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    size = min(_CHUNKS[values.device.type], max(1, len(words)))
    first_weights = torch.arange(1, 2 * size, 2, device=values.device)
    for first in range(0, len(words), size):
        chunk = words[first : first + size].long()
        if one_nan:
            part = values[first : first + size]
            # Seldom: on a CPU a sum, which shows it, takes a quarter of the time
            if part.is_cuda or not part.sum().isfinite():
                chunk.masked_fill_(part.isnan(), _NAN)
        total += (chunk * first_weights[: len(chunk)]).sum()
        total += 2 * (start + first) * chunk.sum()
    return total


def words_of(values: Tensor) -> Tensor:
    """Returns the bits of values (n,) as whole numbers, in the same memory."""
    return values.view(_WORDS[values.element_size()])


def checksums_of_state(state: TrainState) -> tuple[Tensor, Tensor]:
    """Returns the checksums of a rank's part of the weights, and of the update rule's vectors."""
    values = _checksum_of_kept(state, "values", state.values)
    vectors = torch.zeros_like(values)
    for number, (name, flat) in enumerate(state.vectors.items()):
        vectors += (2 * number + 1) * _checksum_of_kept(state, name, flat)
    return values, vectors


def _checksum_of_kept(state: TrainState, name: str, flat: Tensor) -> Tensor:
    kept = state.kept(name)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for home, span in zip(kept.homes, kept.spans, strict=True):
        total += checksum(home.of(flat), start=span.start)
    return total


class TurnChecksum(StepObserver):
    """The checksum of the gradients that the backward passes of one turn bring."""

    def __init__(self, layout: FlatLayout, device: torch.device) -> None:
        self._layout = layout
        self.total = torch.zeros((), dtype=torch.int64, device=device)

    def gradient(self, numbers: object, name: str, values: Tensor) -> None:
        start = self._layout.places[name].start
        self.total += checksum(values.flatten(), start=start, one_nan=True)


def checksum_of_turns(turns: Sequence[Tensor], losses: Sequence[Tensor]) -> Tensor:
    """Returns the checksum (), int64, of some turns, from the checksums of their gradients and the
    losses of their micro-batches."""
    total = _LOSSES * checksum(torch.stack([*losses]), start=0, one_nan=True)
    for number, turn in enumerate(turns):
        total = total + (2 * number + 1) * turn
    return total


def halves_of(checksums: Sequence[Tensor]) -> Tensor:
    """Returns checksums as numbers (2 n,) that float64 holds exactly: of each its low half, then
    its high one."""
    sums = torch.stack([*checksums])
    return torch.stack([sums & _LOW, (sums >> 32) & _LOW], dim=1).flatten().double()


def from_halves(numbers: Sequence[float]) -> list[int]:
    """Reverses `halves_of`; the checksums are numbers from 0 to 2^64 - 1."""
    lows, highs = numbers[0::2], numbers[1::2]
    return [int(low) | int(high) << 32 for low, high in zip(lows, highs, strict=True)]
