"""The state of a run on a device: copied beside the steps, restored in pieces, with the same bits,
in bounded memory."""

import itertools
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.snapshots.slots import Header, Slots
from raymill.state.host_copies import HostCopies
from raymill.state.span import Span
from raymill.state.state_shares import StatePiece, StateShares
from raymill.state.train_state import TrainState
from tests.gpu.made_runs import MadeRun, made_config

NUM_SHARES = 3


def start_snapshot(state: TrainState, folder: Path, step: int) -> None:
    for rank in range(NUM_SHARES):
        share, path = StateShares(state).views(rank, world_size=NUM_SHARES), folder / f"{rank}"
        views = list(itertools.chain(*share.values()))
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(Slots.bytes_needed(sum(view.nbytes for view in views)))
        header = Header(1, step, rank, NUM_SHARES, state.num_updates, list(share), {})
        state.copies.start("snapshot", views, partial(write, Slots.at(str(path)), header))


def write(slots: Slots, header: Header, pieces: Iterator[Tensor]) -> None:
    slots.write(header, (piece.view(torch.uint8).numpy() for piece in pieces))


def pieces_of(state: TrainState, folder: Path, step: int, size: int) -> Iterator[StatePiece]:
    for rank in range(NUM_SHARES):
        slots = Slots.at(str(folder / f"{rank}"))
        (slot,) = [
            slot
            for slot in range(2)
            if (head := slots.header(slot)) is not None and head.step == step
        ]
        header = slots.header(slot)
        assert header is not None
        assert slots.is_whole(slot)
        values = (
            torch.from_numpy(slots.data(slot)[: header.num_bytes]).view(torch.float32).view(3, -1)
        )
        parts = state.layout.parts(rank, world_size=NUM_SHARES)
        for name, tensor in zip(header.names, values, strict=True):
            for start in range(0, len(tensor), size):
                span = Span(start, min(start + size, len(tensor)))
                yield StatePiece(name, parts.cut(span), span.of(tensor))


def test_a_state_that_was_copied_beside_the_steps_continues_with_the_same_bits(
    device: torch.device, tmp_path: Path
) -> None:
    """A copy after each step, of many pieces."""
    config = made_config(device)
    run, undisturbed, other = (MadeRun(config, device) for _ in range(3))
    run.state.copies = HostCopies(device, beside=True, piece_values=10_000)
    expected: dict[int, Tensor] = {}
    for step in range(1, 5):
        assert run.step(step) == undisturbed.step(step)
        start_snapshot(run.state, tmp_path, step)
        state = undisturbed.state
        expected[step] = torch.cat([state.values, *state.vectors.values()]).cpu()
    run.state.copies.close()
    assert torch.equal(run.state.values, undisturbed.state.values)
    for step in (3, 4):
        StateShares(other.state).load(step, pieces_of(other.state, tmp_path, step, 7777))
        assert torch.equal(
            torch.cat([other.state.values, *other.state.vectors.values()]).cpu(), expected[step]
        )
    assert other.step(5) == undisturbed.step(5)
    assert torch.equal(other.state.values, undisturbed.state.values)
    for each in (run, undisturbed, other):
        each.close()


def test_an_update_waits_for_a_slow_copy(device: torch.device) -> None:
    run = MadeRun(made_config(device), device)
    run.state.copies = HostCopies(device, beside=True)
    run.step(1)
    before, go, taken = run.state.values.cpu().clone(), threading.Event(), []

    def take(pieces: Iterator[Tensor]) -> None:
        go.wait()
        taken.extend(piece.clone() for piece in pieces)

    copy = run.state.copies.start("snapshot", [run.state.values], take)
    threading.Timer(0.2, go.set).start()
    start_s = time.monotonic()
    run.step(2)
    assert time.monotonic() - start_s > 0.1
    assert copy.future.done()
    assert torch.equal(torch.cat(taken), before)
    assert not torch.equal(run.state.values.cpu(), before)
    run.state.copies.close()
    run.close()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA device on this machine"
)
def test_copies_and_a_restore_take_a_piece_of_the_gpus_memory_at_most(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    run = MadeRun(made_config(device, model={"n_embd": 1024, "n_layer": 8}), device)
    run.step(1)
    start_snapshot(run.state, tmp_path, 1)
    run.state.copies.wait()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start_snapshot(run.state, tmp_path, 2)
    run.state.copies.wait()
    StateShares(run.state).load(1, pieces_of(run.state, tmp_path, 1, 1 << 20))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 << 20
    run.state.copies.close()
    run.close()
