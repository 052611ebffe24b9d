"""Small tasks in context: they show whether a model continues from its context rather than from its
weights.

All tokens are random ids, so that nothing learned by heart helps. B sequences, T tokens of each, V
vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.decoder import Decoder
from raymill.errors import UserError

_NUM_SEQUENCES = 64
_MAX_TOKENS = 256
_NUM_KEYS = 4  # of the few-shot task
_LEAST_TOKENS = 2 * 2 * _NUM_KEYS  # every key twice: only the second time is its value asked for


@dataclass(frozen=True)
class Task:
    """Token ids (B, T), and which of them (T,) the model is asked for."""

    ids: Tensor
    asked: Tensor


def copy(vocab_size: int, length: int, generator: torch.Generator) -> Task:
    """Repeats a sequence: the second time, every token can be copied from the first."""
    half = length // 2
    first = torch.randint(vocab_size, (_NUM_SEQUENCES, half), generator=generator)
    return Task(torch.cat([first, first], dim=1), torch.arange(2 * half) > half)


def induction(vocab_size: int, length: int, generator: torch.Generator) -> Task:
    """Ends random tokens with one that occurred before: what followed it then follows again (Olsson
    et al., 2022)."""
    ids = torch.randint(vocab_size, (_NUM_SEQUENCES, length), generator=generator)
    places = torch.randint(1, length - 3, (_NUM_SEQUENCES,), generator=generator)
    rows = torch.arange(_NUM_SEQUENCES)
    ids[:, -2], ids[:, -1] = ids[rows, places], ids[rows, places + 1]
    return Task(ids, torch.arange(length) == length - 1)


def few_shot(vocab_size: int, length: int, generator: torch.Generator) -> Task:
    """Lists pairs of a key and its value, the same few keys over and over in changing order, and
    asks for the values of keys that occurred before. A guess among the values is right once in
    `_NUM_KEYS` times."""
    num_turns = length // (2 * _NUM_KEYS)
    pairs = torch.stack(
        [
            torch.randperm(vocab_size, generator=generator)[: 2 * _NUM_KEYS]
            for _ in range(_NUM_SEQUENCES)
        ]
    ).view(_NUM_SEQUENCES, _NUM_KEYS, 2)
    turns = [
        torch.stack(
            [pair[torch.randperm(_NUM_KEYS, generator=generator)] for pair in pairs]
        ).flatten(1)
        for _ in range(num_turns)
    ]
    asked = torch.zeros(num_turns * 2 * _NUM_KEYS, dtype=torch.bool)
    asked[2 * _NUM_KEYS + 1 :: 2] = True
    return Task(torch.cat(turns, dim=1), asked)


TASKS = {"copy": copy, "induction": induction, "few-shot": few_shot}


@torch.inference_mode()
def accuracy(model: Decoder, task: Task) -> float:
    """Returns the share of the asked tokens that the model finds likeliest."""
    hidden = model.forward(task.ids[:, :-1])  # (B, T - 1, C)
    asked = task.asked[1:]
    found = model.logits(hidden[:, asked]).argmax(-1)  # (B, asked)
    return float((found == task.ids[:, 1:][:, asked]).double().mean())


def probe(model: Decoder, *, seq_len: int) -> dict[str, float]:
    """Returns the accuracy by task, on sequences of at most `seq_len` tokens, the longest the model
    was trained on.

    Raises `UserError` where they are too short for the tasks.
    """
    if seq_len < _LEAST_TOKENS:
        raise UserError(
            f"the model was trained on sequences of {seq_len} tokens, the few-shot task needs {_LEAST_TOKENS}; probe a "
            "run with a longer train.seq_len"
        )
    size, length = model.config.vocab_size, min(seq_len, _MAX_TOKENS)
    return {
        n: accuracy(model, task(size, length, torch.Generator().manual_seed(0)))
        for n, task in TASKS.items()
    }
