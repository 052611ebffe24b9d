"""A step's gradient as training computes it: that of autograd; dropout that every process draws
alike."""

import dataclasses
import gc
import os
import subprocess
import sys
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.settings.run import RunConfig, batch_schedule
from jobs.exact.run_state import run_state
from jobs.exact.step_gradient import step_gradient
from model.attention import document_mask, document_positions
from model.gpt import GPT
from model.linear_cross_entropy import IGNORE_INDEX
from model.numerics import NUMERICS
from raymill.step_timer import StepTimer
from raymill.sums.step_plan import StepPlan
from raymill.sums.step_totals import Measured
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.train_worlds import CPU, EOT, Case, MadeRows

DROPOUT = """
import torch
from raymill.dropout import dropout_seed
torch.manual_seed(dropout_seed(0, step=3, micro_batch=5))
print(dropout_seed(0, step=3, micro_batch=5), torch.rand(3).tolist())
"""


@pytest.mark.parametrize(
    ("num_lanes", "micro_batches", "tied", "compute"),
    [
        (1, 1, True, "cpu"),
        (3, 1, True, "plain"),
        (8, 1, True, "cpu"),
        (3, 2, False, "cpu"),
        (8, 1, False, "plain"),
    ],
)
def test_of_a_step_is_autograds(
    num_lanes: int, micro_batches: int, tied: bool, compute: str
) -> None:
    config = Case(num_lanes=num_lanes, micro_batches=micro_batches, compute=compute).config()
    shape = dataclasses.replace(config.model, dropout=0.0, tie_word_embeddings=tied)
    config = config.model_copy(update={"model": shape})
    model = GPT(config.model)
    model.init_weights(0)
    rows = MadeRows()
    inputs, targets = rows.samples(range(2 * num_lanes * micro_batches))
    expected = torch.autograd.grad(
        model.loss(inputs, targets) / targets.numel(), list(model.parameters())
    )

    state = run_state(model, config.train, device=CPU)
    gradient = step_gradient(config, state, rows, WorkerGroup(0, 1), eot_id=None)  # type: ignore[arg-type]
    gradient.of_step(1, StepTimer())
    gradient.close()
    for (name, parameter), whole in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - whole).norm() / whole.norm() < 1e-5, name


@pytest.mark.parametrize(("compute", "documents"), [("cpu", True), ("plain", False)])
def test_of_conversations_is_that_of_the_mean_over_counted_tokens(
    compute: str, documents: bool
) -> None:
    """Held against PyTorch's cross-entropy of all logits, over micro-batches of which each counts
    as many as it has."""
    config = Case(num_lanes=3, micro_batches=2, compute=compute).config()
    config = config.model_copy(update={"model": dataclasses.replace(config.model, dropout=0.0)})
    model = GPT(config.model)
    model.init_weights(0)
    rows, eot_id = MadeRows(chat=True), EOT if documents else None
    inputs, targets = rows.samples(range(12))
    counts = (targets != IGNORE_INDEX).sum(dim=1).view(6, 2).sum(dim=1).tolist()
    assert len({*counts}) > 3
    positions = document_positions(inputs, targets, eot_id=EOT) if documents else None
    mask = None if positions is None else document_mask(positions)
    logits = model.logits(model(inputs, positions=positions, mask=mask))
    mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    expected = torch.autograd.grad(mean, list(model.parameters()))

    state = run_state(model, config.train, device=CPU)
    gradient = step_gradient(config, state, rows, WorkerGroup(0, 1), eot_id=eot_id)  # type: ignore[arg-type]
    measured = gradient.of_step(1, StepTimer())
    gradient.close()
    assert measured.num_counted == sum(counts)
    assert measured.loss == pytest.approx(mean.item(), rel=1e-5)
    assert measured.norm == pytest.approx(
        float(torch.cat([each.flatten() for each in expected]).norm()), rel=1e-5
    )
    for (name, parameter), whole in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - whole).norm() / whole.norm() < 1e-5, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("exact", "compute", "chat"),
    [(True, "cpu", True), (True, "plain", False), (False, "cpu", True)],
)
def test_gradient__with_another_loss_scale__has_the_same_bits(
    exact: bool, compute: str, chat: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power of two rounds nothing, neither where the loss is multiplied nor where the gradient
    is divided."""
    config = Case(precision, num_lanes=3, exact=exact, compute=compute).config()

    def gradient_and_figures(loss_scale: float) -> tuple[Tensor, Measured]:
        record = dataclasses.replace(NUMERICS[precision], loss_scale=loss_scale)
        monkeypatch.setitem(NUMERICS, precision, record)
        model = GPT(config.model)
        model.init_weights(0)
        state = run_state(model, config.train, device=CPU)
        rows = MadeRows(chat=chat)
        gradient = step_gradient(config, state, rows, WorkerGroup(0, 1), eot_id=None)  # type: ignore[arg-type]
        measured = gradient.of_step(1, StepTimer())
        gradient.close()
        return state.gradient, measured

    plain, plain_figures = gradient_and_figures(1.0)
    scaled_losses: list[float] = []
    loss_of = GPT.loss_of

    def noted(*args: Any, **options: Any) -> Tensor:
        loss = loss_of(*args, **options)
        scaled_losses.append(loss.item())
        return loss

    monkeypatch.setattr(GPT, "loss_of", noted)
    scaled, scaled_figures = gradient_and_figures(2.0**10)
    assert sum(scaled_losses) > 100 * plain_figures.loss, "nothing was scaled"
    assert plain.any()
    assert torch.equal(scaled, plain)
    assert scaled_figures == plain_figures


def test_a_batch_that_grows_through_250_lane_counts__of_512_ranks__begins_at_once() -> None:
    """Counts calls of Python's and C's functions: asking each rank for each subtree of each count
    made fifty times as many."""
    config = RunConfig.model_validate(
        {
            "model": {
                "preset": "tiny",
                "n_positions": 8,
                "n_embd": 8,
                "n_head": 1,
                "n_layer": 1,
                "vocab_size": 300,
            },
            "train": {
                "global_batch_size": 761,
                "micro_batch_size": 1,
                "batch_ramp_start": 512,
                "batch_ramp_tokens": 10**7,
                "max_tokens": 2 * 10**8,
                "precision": "fp32",
            },
            "scaling": {"max_workers": 512},
        }
    )
    assert len(batch_schedule(config).lane_counts) == 250
    num_calls = 0

    def count(frame: FrameType, event: str, function: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")
        assert num_calls < 40 * 250 * 512

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=512)
    try:
        group = WorkerGroup(3, 512)
        state = run_state(GPT(config.model), config.train, device=CPU, group=group)
        sys.setprofile(count)
        gradient = step_gradient(config, state, MadeRows(), group, eot_id=None)  # type: ignore[arg-type]
    finally:
        sys.setprofile(None)
        dist.destroy_process_group()
    plans = [thing for thing in gc.get_objects() if isinstance(thing, StepPlan)]
    assert len(plans) < 10, "those of the steps to come are made when they come"
    gradient.close()


@pytest.mark.more
def test_dropout_is_the_same_in_every_process() -> None:
    """Python's own hashes differ between the processes."""
    drawn = {
        subprocess.check_output(
            [sys.executable, "-c", DROPOUT], env=os.environ | {"PYTHONHASHSEED": seed}
        )
        for seed in ("0", "4242")
    }
    assert len(drawn) == 1
    # Recorded runs with dropout have these bits.
    assert drawn.pop().decode().startswith("7655728555746275550 ")
