"""Makes values wrong without a sign, as a device does that corrupts silently: for tests."""

import random

from torch import Tensor

from jobs.exact.sums.checksum import words_of
from model.files.failpoints import flips, sticks, value

_chance = random.SystemRandom()


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
