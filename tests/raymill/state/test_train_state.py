"""The flat training state: views of one buffer, AdamW as torch has it, and the same bits after a
round trip."""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cluster.settings.train import TrainConfig
from jobs.exact.run_state import run_state
from raymill.errors import LostPeerError
from raymill.files.safetensors_file import parameter_hash
from raymill.rules.adamw import AdamW
from raymill.rules.update_rule import Stretch
from raymill.state.bundle import Bundle
from raymill.state.flat_layout import BLOCK
from raymill.state.peers import Peers
from raymill.state.span import Span
from raymill.state.state_shares import StateShares
from raymill.state.stored_state import restore
from raymill.state.train_state import TrainState
from raymill.sums.step_totals import block_square_sums, norm_of
from raymill.workers.worker_group import WorkerGroup
from tests.jobs.shardings import sharding
from tests.jobs.train_states import (
    RATE,
    apply,
    gradients,
    make_model,
    make_state,
    moments,
    pieces_of,
    stored,
)
from tests.time_limits import limit_s


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_gradients_are_views_of_the_flat_buffers(tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    before = parameter_hash(model.state_dict())
    state = make_state(model)
    assert parameter_hash(model.state_dict()) == before
    parameters = dict(model.named_parameters())
    state.gradient.fill_(3.0)
    assert all(bool((p.grad == 3.0).all()) for p in parameters.values() if p.grad is not None)
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad.zero_()
    # What is left over is padding, of less than 16 values a parameter and of a block at the end.
    padding = int((state.gradient == 3.0).sum()) - sum(-p.numel() % 16 for p in parameters.values())
    assert 0 <= padding < BLOCK
    addresses = sorted((p.data_ptr(), p.numel()) for p in parameters.values())
    assert all(start + 4 * size <= nxt for (start, size), (nxt, _) in itertools.pairwise(addresses))


def test_views_are_aligned_to_64_bytes() -> None:
    state = make_state()
    for name, parameter in state.model.named_parameters():
        assert parameter.data_ptr() % 64 == 0, name
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() % 64 == 0, name
        assert parameter.is_contiguous()


def test_backward_adds_into_the_buffer() -> None:
    state, plain = make_state(), make_model()
    tokens = torch.randint(0, 301, (3, 10), generator=torch.Generator().manual_seed(0))
    (gradient,) = gradients(state, 1)
    plain.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in plain.named_parameters():
        view = state.model.get_parameter(name).grad
        assert view is not None
        assert parameter.grad is not None
        assert torch.equal(view, parameter.grad), name
    assert torch.equal(gradient, state.gradient)


def test_a_step_is_torchs_adamw_with_decay_on_matrices_only() -> None:
    state, plain = make_state(), make_model()
    parameters = dict(plain.named_parameters())
    decayed = {name for name in parameters if not name.endswith("bias") and "ln_" not in name}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for name, p in parameters.items() if name in decayed],
                "weight_decay": 0.3,
            },
            {
                "params": [p for name, p in parameters.items() if name not in decayed],
                "weight_decay": 0.0,
            },
        ],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step, gradient in enumerate(gradients(state, 5)):
        for name, parameter in parameters.items():
            parameter.grad = state.model.get_parameter(name).grad.clone()  # type: ignore[union-attr]
        norm = apply(state, gradient, learning_rate=RATE)
        optimizer.step()
        torch_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values()])  # type: ignore[misc]
        assert norm == pytest.approx(float(torch_norm), rel=1e-6)
        for name, parameter in parameters.items():
            updated = state.model.get_parameter(name)
            assert torch.allclose(updated, parameter, rtol=0, atol=1e-7), (step, name)
    assert parameter_hash(plain.state_dict()) != parameter_hash(make_model().state_dict())


def test_the_learning_rate_is_each_steps_own() -> None:
    state = make_state()
    before = parameter_hash(state.model.state_dict())
    for gradient in gradients(state, 2):
        apply(state, gradient, learning_rate=0.0)
        assert parameter_hash(state.model.state_dict()) == before
        apply(state, gradient, learning_rate=RATE)
        assert parameter_hash(state.model.state_dict()) != before
        before = parameter_hash(state.model.state_dict())


def test_a_long_gradient_is_clipped_and_a_short_one_is_not() -> None:
    state = make_state(grad_clip=1.0)
    (long,) = gradients(state, 1, scale=100.0)
    norm = apply(state, long, learning_rate=RATE)
    assert norm > 100
    assert norm_of(block_square_sums(state.gradient)) == pytest.approx(1.0, rel=1e-6)
    assert torch.allclose(state.gradient * norm, long, rtol=1e-5)
    short = long * (0.5 / norm)
    apply(state, short, learning_rate=RATE)
    assert torch.equal(state.gradient, short)

    unclipped = make_state(grad_clip=0.0)
    apply(unclipped, long, learning_rate=RATE)
    assert torch.equal(unclipped.gradient, long)


def test_nothing_that_is_not_a_number_passes_unseen() -> None:
    state = make_state(grad_clip=1.0)
    (gradient,) = gradients(state, 1)
    gradient[5] = math.nan
    assert math.isnan(apply(state, gradient, learning_rate=RATE))


@given(st.integers(1, 200_000), st.integers(0, 3))
def test_the_norm_is_the_euclidean_one(size: int, seed: int) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    assert norm_of(block_square_sums(vector)) == pytest.approx(
        float(vector.double().norm()), rel=1e-6
    )


@contextmanager
def sending_state() -> Iterator[TrainState]:
    """Yields rank 0's state of two ranks with half of the moments each."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        config = TrainConfig(precision="fp32", grad_clip=0.0)
        model = make_model(n_embd=96, n_inner=384)
        halves = sharding("optimizer", world_size=2)
        state = run_state(
            model, config, device=torch.device("cpu"), group=WorkerGroup(0, 2), sharding=halves
        )
        assert len(state.layout.buckets) > 2
        yield state
        state.close()
    finally:
        dist.destroy_process_group()


def test_updated_weights_go_round_while_the_next_are_updated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with sending_state() as state:
        state.gradient.fill_(1.0)
        before = state.values.clone()
        begun, ended = threading.Event(), threading.Event()
        sent: list[Span] = []

        def gather(bundle: Bundle, peers: Peers, flat: Tensor) -> None:
            for own_part in bundle.parts(0):
                assert not (own_part.of(flat) == own_part.of(before)).all(), (
                    "sent before it was updated"
                )
            begun.set()
            assert ended.wait(limit_s(10))
            sent.append(bundle.span)

        num_updated = num_calls = 0
        adamw = AdamW.update

        def update(rule: AdamW, stretches: Sequence[Stretch], *, learning_rate: float) -> None:
            nonlocal num_updated, num_calls
            assert not num_updated or begun.wait(limit_s(10)), (
                "nothing is sent while the second stretch is updated"
            )
            assert not sent
            adamw(rule, stretches, learning_rate=learning_rate)
            num_calls += 1
            num_updated += sum(len(stretch.values) for stretch in stretches)
            if num_updated == state.owned.num_values:
                ended.set()

        monkeypatch.setattr(Bundle, "gather", gather)
        monkeypatch.setattr(AdamW, "update", update)
        state.apply(norm=1.0, learning_rate=RATE)
        ends = [span.stop for span in sent]
        assert ends[-1] == state.layout.size, "none is missing once the step is taken"
        assert [span.start for span in sent] == [0, *ends[:-1]]
        assert num_calls > 2


def test_a_step_whose_weights_do_not_come_back__fails_and_is_not_taken_for_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`Snapshots.rescue` keeps a state whose number of updates is still that of the last whole
    step."""
    with sending_state() as state:

        def gather(peers: Peers, flat: Tensor, bucket: Span) -> None:
            if bucket != state.layout.buckets[0]:
                raise LostPeerError("the connection was closed")

        monkeypatch.setattr(Bundle, "gather", gather)
        with pytest.raises(LostPeerError, match="the connection was closed"):
            state.apply(norm=1.0, learning_rate=RATE)
        assert state.num_updates == 1


@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_moments_carry_on_with_the_same_bits(num_before: int) -> None:
    whole = make_state()
    steps = list(gradients(whole, 6))  # of the initial weights: the optimizer does not mind
    for gradient in steps[:num_before]:
        apply(whole, gradient, learning_rate=RATE)
    kept = moments(whole)
    names = [name for name, _ in whole.model.named_parameters()]
    assert set(kept) == {"step"} | {
        f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in names
    }
    assert int(kept["step"]) == num_before
    assert kept["exp_avg.transformer.wte.weight"].shape == whole.model.get_parameter(names[0]).shape

    resumed = make_state()
    restore(resumed, stored(kept, dict(whole.model.state_dict())))
    for gradient in steps[num_before:]:
        apply(whole, gradient, learning_rate=RATE)
        apply(resumed, gradient, learning_rate=RATE)
    assert parameter_hash(resumed.model.state_dict()) == parameter_hash(whole.model.state_dict())
    again, first = moments(resumed), moments(whole)
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_parts_of_any_world_make_the_state_in_any_other() -> None:
    whole = make_state()
    for gradient in gradients(whole, 3):
        apply(whole, gradient, learning_rate=RATE)
    for world_size in (1, 3, 4):
        ranks = []
        for rank in range(world_size):
            group = WorkerGroup(rank, world_size)
            part = sharding("optimizer", rank=rank, world_size=world_size)
            state = run_state(
                make_model(),
                TrainConfig(precision="fp32"),
                device=torch.device("cpu"),
                group=group,
                sharding=part,
            )
            restore(state, stored(moments(whole), dict(whole.model.state_dict())))
            ranks.append(state)
        fresh = make_state(make_model())
        pieces = (pieces_of(state, rank, world_size=world_size) for rank, state in enumerate(ranks))
        StateShares(fresh).load(3, itertools.chain(*pieces))
        assert parameter_hash(fresh.model.state_dict()) == parameter_hash(whole.model.state_dict())
        first, again = moments(whole), moments(fresh)
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert fresh.num_updates == 3
