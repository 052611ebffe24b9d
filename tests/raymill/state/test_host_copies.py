"""Copies beside the training: the values of their moment, in bounded pieces, and before the next
update."""

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raymill.state.host_copies import HostCopies
from tests.jobs.train_states import RATE, apply, gradients, make_state

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(0, 40), max_size=6), piece_values=st.integers(1, 30))
def test_pieces_are_the_values_end_to_end(lengths: list[int], piece_values: int) -> None:
    tensors = [torch.randn(length) for length in lengths]
    copies = HostCopies(CPU, piece_values=piece_values)
    for _ in range(2):
        pieces, memory = [], set()
        for piece in copies.pieces(tensors):
            pieces.append(piece.clone())
            memory.add(piece.untyped_storage().data_ptr())
        assert torch.equal(
            torch.cat([torch.empty(0), *pieces]), torch.cat([torch.empty(0), *tensors])
        )
        assert all(len(piece) == piece_values for piece in pieces[:-1])
        assert len(memory) <= 2


@pytest.mark.parametrize("beside", [False, True])
def test_an_update_waits_for_the_copy_of_the_state_before_it(beside: bool) -> None:
    state = make_state()
    state.copies = HostCopies(CPU, beside=beside)
    go, taken = threading.Event(), []

    def take(pieces: Iterator[Tensor]) -> None:
        go.wait()
        taken.extend(piece.clone() for piece in pieces)

    def release() -> None:
        threading.Timer(0.1, go.set).start()

    steps = list(gradients(state, 2))
    apply(state, steps[0], learning_rate=RATE)
    before = state.values.clone()
    if not beside:
        release()
    copy = state.copies.start("snapshot", [state.values, *state.vectors.values()], take)
    assert copy.future.done() is not beside, "training goes on meanwhile, or has waited"
    list(gradients(state, 1))
    if beside:
        release()
    apply(state, steps[1], learning_rate=RATE)
    assert copy.future.done()
    assert torch.equal(torch.cat(taken)[: len(before)], before)
    assert not torch.equal(state.values, before)
    assert 0.05 < copy.exposed_s < 5
    state.copies.close()


def test_a_copy_that_fails_is_an_error_of_the_training() -> None:
    state = make_state()
    state.copies = HostCopies(CPU, beside=True)
    state.copies.start("snapshot", [state.values], lambda pieces: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        state.apply(norm=1.0, learning_rate=RATE)
    state.copies.close()
