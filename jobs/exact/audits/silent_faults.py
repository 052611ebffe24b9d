"""Makes values wrong without a sign, as a device does that corrupts silently: for tests."""

import os
import random

import torch
from torch import Tensor

from jobs.exact.audits.checksum import words_of
from model.files.failpoints import VARIABLE, flips, sticks, value
from raymill.observer import StepObserver
from raymill.state.bundle import Bundle
from raymill.state.span import Span
from raymill.state.train_state import TrainState

_chance = random.SystemRandom()


class SilentFaults(StepObserver):
    """Corrupts what a step computes, where a test wants that."""

    def __init__(self, state: TrainState) -> None:
        sizes: dict[str, int] = {}
        for name, parameter in state.model.named_parameters():
            if parameter.dtype == torch.float32 or state.sharding.divided.gradient:
                sizes[name] = parameter.numel()
        self._largest = max(sizes, key=sizes.__getitem__)

    def gradient(self, numbers: object, name: str, values: Tensor) -> None:
        if name == self._largest:
            corrupt("gradient", values)

    def partial_sum(self, values: Tensor) -> None:
        corrupt("lane_sum", values)

    def node(self, lanes: range, bundle: Bundle, span: Span, values: Tensor) -> None:
        corrupt("exchanged_sum", span.of(values))


def silent_faults(state: TrainState) -> list[StepObserver]:
    """Returns what corrupts a step, if a test wants any of it corrupted."""
    return [SilentFaults(state)] if os.environ.get(VARIABLE) else []


def corrupt(name: str, values: Tensor) -> None:
    """Flips a random bit of a random value, in place, where a test wants that at this place; or one
    and the same each time; or puts another value there."""
    if values.numel() and flips(name):
        if (wrong := value(name)) is not None:
            values.view(-1)[0] = wrong
            return
        words = words_of(values.view(-1))
        if sticks(name):
            words[0] ^= 1
            return
        bit = _chance.randrange(8 * words.element_size() - 1)  # leaves out the sign
        words[_chance.randrange(len(words))] ^= 1 << bit
