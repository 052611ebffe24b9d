"""A step's gradient as training computes it: that of autograd; dropout that every process draws alike."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from jobs.exact.batch_gradient import BatchGradient
from jobs.exact.train_state import TrainState
from jobs.run.step_timer import StepTimer
from jobs.workers.worker_group import WorkerGroup
from model.gpt import GPT
from tests.jobs.train_worlds import CPU, Case, MadeRows

DROPOUT = """
import torch
from jobs.exact.batch_gradient import dropout_seed
torch.manual_seed(dropout_seed(0, step=3, micro_batch=5))
print(dropout_seed(0, step=3, micro_batch=5), torch.rand(3).tolist())
"""


@pytest.mark.parametrize(
    ("num_lanes", "micro_batches", "tied", "compute"),
    [(1, 1, True, "cpu"), (3, 1, True, "plain"), (8, 1, True, "cpu"), (3, 2, False, "cpu"), (8, 1, False, "plain")],
)
def test_of_a_step_is_autograds(num_lanes: int, micro_batches: int, tied: bool, compute: str) -> None:
    config = Case(num_lanes=num_lanes, micro_batches=micro_batches, compute=compute).config()
    shape = dataclasses.replace(config.model, dropout=0.0, tie_word_embeddings=tied)
    config = config.model_copy(update={"model": shape})
    model = GPT(config.model)
    model.init_weights(0)
    rows = MadeRows()
    inputs, targets = rows.samples(range(2 * num_lanes * micro_batches))
    expected = torch.autograd.grad(model.loss(inputs, targets) / targets.numel(), list(model.parameters()))

    state = TrainState(model, config.train, device=CPU)
    gradient = BatchGradient(config, state, rows, WorkerGroup(0, 1), eot_id=None)  # type: ignore[arg-type]
    gradient.of_step(1, StepTimer())
    gradient.close()
    for (name, parameter), whole in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - whole).norm() / whole.norm() < 1e-5, name


def test_dropout_is_the_same_in_every_process() -> None:
    """Python's own hashes differ between the processes."""
    drawn = {
        subprocess.check_output([sys.executable, "-c", DROPOUT], env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("0", "4242")
    }
    assert len(drawn) == 1
    # Recorded runs with dropout have these bits.
    assert drawn.pop().decode().startswith("7655728555746275550 ")
