"""The tasks can be solved by looking back into the context, and not without."""

import pytest
import torch
from torch import Tensor

from model.insight.probes import TASKS, Task, accuracy, probe
from raymill.errors import UserError
from tests.model.small_models import small_model

VOCAB, LENGTH = 97, 48


def made(name: str) -> Task:
    return TASKS[name](VOCAB, LENGTH, torch.Generator().manual_seed(3))


def by_looking_back(ids: list[int], place: int) -> int | None:
    """Returns what followed the last time that the token before `place` occurred."""
    before = [i for i in range(place - 1) if ids[i] == ids[place - 1]]
    return ids[before[-1] + 1] if before else None


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_solved_by_looking_back(name: str) -> None:
    task = made(name)
    assert task.ids.shape[1] == len(task.asked) <= LENGTH
    right = [
        by_looking_back(row, place) == row[place]
        for row in task.ids.tolist()
        for place in task.asked.nonzero().flatten().tolist()
    ]
    # Of random tokens some occur more often than once, with another follower each time.
    assert sum(right) / len(right) > (0.75 if name != "few-shot" else 0.99)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_learned_nothing_is_at_chance(name: str) -> None:
    # A guess among the keys' values, or among all tokens
    chance = 1 / 4 if name == "few-shot" else 1 / VOCAB
    assert accuracy(small_model(), made(name)) < chance + 0.1


def test_the_same_seed_asks_the_same() -> None:
    model = small_model()
    assert probe(model, seq_len=40) == probe(model, seq_len=40)
    assert probe(model, seq_len=40).keys() == TASKS.keys()


@pytest.mark.parametrize("seq_len", [7, 8, 15])
def test_sequences_too_short_for_a_task_are_refused(seq_len: int) -> None:
    with pytest.raises(
        UserError, match=rf"sequences of {seq_len} tokens, the few-shot task needs 16"
    ):
        probe(small_model(), seq_len=seq_len)


def test_the_shortest_sequences_ask_each_task_something() -> None:
    assert all(0 <= share <= 1 for share in probe(small_model(), seq_len=16).values())


class LookingBack:
    """A model that continues as the context did the last time; where that is unknown, with token
    0."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = [
            [by_looking_back([*row, 0], place + 1) or 0 for place in range(len(row))]
            for row in ids.tolist()
        ]
        return torch.nn.functional.one_hot(torch.tensor(rows), VOCAB).float()  # (B, T, V)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize("name", TASKS)
def test_a_model_that_looks_back_is_measured_to_do_so(name: str) -> None:
    found = accuracy(LookingBack(), made(name))  # type: ignore[arg-type]
    assert found > (0.75 if name != "few-shot" else 0.99)
