"""Whoever makes a noted update again finds its bits, and each bit of it that is wrong."""

import random

import pytest
import torch
from torch import Tensor

from jobs.exact.audits.audit import Audits
from jobs.exact.audits.checksum import words_of
from jobs.exact.audits.excerpt import Repeated
from jobs.exact.audits.update_notes import UpdateNotes
from raymill.state.flat_layout import BLOCK
from raymill.state.span import Span
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.train_worlds import Case, Trainer

ALONE = WorkerGroup(0, 1)
FIGURES = {"norm": 3.0, "learning_rate": 1e-2}  # the gradient is clipped
CASES = [
    Case(optimizer="muon", num_lanes=2),
    Case("bf16", optimizer="muon", num_lanes=2, llama=True, is_tied=False),
    Case(optimizer="muon", num_lanes=2, compute="plain", family="qwen3"),
]


@pytest.fixture(params=CASES, ids=str)
def state(request: pytest.FixtureRequest) -> TrainState:
    """The state amid a step: with the gradient of the step before."""
    torch.manual_seed(0)
    trainer = Trainer(request.param, ALONE)
    trainer.steps(range(1, 3))
    return trainer.state


def updated(state: TrainState, matrix: str | None) -> UpdateNotes:
    notes = UpdateNotes(Span(0, BLOCK), matrix, state)
    state.apply(**FIGURES)
    return notes


def again(notes: UpdateNotes) -> Repeated:
    return notes.repeated(ALONE, **FIGURES)


def flip(values: Tensor) -> None:
    words = words_of(values)
    words[random.Random(7).randrange(len(words))] ^= 1


def test_a_right_update_of_any_matrix_has_the_same_bits_again(state: TrainState) -> None:
    assert state.layout.matrices
    for matrix in [*state.layout.matrices, None]:
        assert again(updated(state, matrix)).shown == [], matrix


def test_a_wrong_bit_of_any_matrix_or_of_its_momentum_is_found(state: TrainState) -> None:
    for number, matrix in enumerate(state.layout.matrices):
        place = state.layout.places[matrix]
        part = ("values", "momentum_buffer")[number % 2]
        notes = updated(state, matrix)
        flip(state.kept(part).home_of(place).of(state.parts[part]))
        [shown] = again(notes).shown
        assert (shown.rank, shown.span.start) == (0, place.start), matrix
        assert again(updated(state, matrix)).shown == [], "the next update is right again"


def test_a_wrong_bit_of_another_matrix_is_left_to_other_audits(state: TrainState) -> None:
    first, second, *_ = state.layout.matrices
    notes = updated(state, first)
    flip(state.kept("values").home_of(state.layout.places[second]).of(state.values))
    assert again(notes).shown == []


def test_every_matrix_that_is_not_too_large_is_drawn(
    state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, audits = state.layout, Audits(every_steps=1, seed=3, shifts=[0])
    assert {audits.matrix(step, layout) for step in range(400)} == {*layout.matrices}
    lengths = sorted(len(matrix.blocks) for matrix in layout.matrices.values())
    monkeypatch.setattr("jobs.exact.audits.audit._MOST_OF_MATRIX", lengths[0])
    drawn = {audits.matrix(step, layout) for step in range(400)}
    assert {len(layout.matrices[str(name)].blocks) for name in drawn} == {lengths[0]}
    monkeypatch.setattr("jobs.exact.audits.audit._MOST_OF_MATRIX", lengths[0] - 1)
    assert audits.matrix(1, layout) is None
