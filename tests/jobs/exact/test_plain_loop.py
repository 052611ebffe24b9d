"""With nanoGPT's numbers and from the same weights, raymill takes the steps of nanoGPT's loop."""

import numpy as np
import pytest

from tests.benchmarks.bench_loss import NANOGPT
from tests.benchmarks.loss_runs import Corpus, Ours, Rows, Task, nanogpt

TASK = Task(n_layer=2, n_head=2, n_embd=32, seq_len=32, batch_size=4, num_steps=40)


@pytest.mark.parametrize("seed", [0, 7])
def test_each_step_has_the_loss_of_a_plain_loop(seed: int) -> None:
    words = np.random.default_rng(seed).choice(["to be ", "or not ", "that is "], 1000)
    corpus = Corpus.of("".join(words))
    ours, plain = (
        Ours(corpus, TASK, seed, optimizer="adamw", **NANOGPT),
        nanogpt(corpus, TASK, seed),
    )
    validation = Rows(corpus.validation, TASK.seq_len, 0).samples(range(16))
    losses: list[float] = []
    for step in range(1, TASK.num_steps + 1):
        ours.step(step)
        plain.step(step)
        losses.append(ours.loss(*validation))
        assert losses[-1] == pytest.approx(plain.loss(*validation), abs=2e-5)
    assert losses[-1] < losses[0] - 0.5, "they learn which letter comes next"
