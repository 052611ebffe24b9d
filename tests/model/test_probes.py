"""The tasks can be solved by what they are about, and not without it."""

import pytest
import torch

from model.probes import TASKS, Task, accuracy, probe
from tests.model.conftest import small_model

VOCAB, LENGTH = 97, 48


def made(name: str) -> Task:
    return TASKS[name](VOCAB, LENGTH, torch.Generator().manual_seed(3))


def by_looking_back(ids: list[int], place: int) -> int | None:
    """What followed the last time that the token before `place` occurred."""
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
    task = made(name)
    assert accuracy(small_model(), task) < task.chance + 0.1


def test_the_same_seed_asks_the_same() -> None:
    model = small_model()
    assert probe(model, seq_len=40) == probe(model, seq_len=40)
    assert probe(model, seq_len=40).keys() == TASKS.keys()


def test_training_on_a_task_is_measured() -> None:
    """A model that is trained on few-shot sequences comes to solve others of them."""
    torch.manual_seed(0)
    model = small_model(n_positions=32, vocab_size=24, n_embd=48, initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        task = TASKS["few-shot"](24, 32, generator)
        targets = task.ids[:, 1:].masked_fill(~task.asked[1:], -100)
        optimizer.zero_grad()
        (model.loss(task.ids[:, :-1], targets) / (targets != -100).sum()).backward()
        optimizer.step()
    found = accuracy(model.eval(), TASKS["few-shot"](24, 32, torch.Generator().manual_seed(2)))
    assert found > 0.6, "one in four by naming any of the values"
