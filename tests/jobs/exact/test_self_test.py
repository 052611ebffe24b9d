"""The self-test passes on this processor in every way to compute, and names what a planted fault
breaks."""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cluster.settings.run import RunConfig
from jobs.exact import compute
from jobs.exact.run_state import run_state
from jobs.exact.self_test import self_test
from jobs.exact.step_gradient import step_gradient
from jobs.exact.untested import UntestedError
from model import gpt
from model.config import GPTConfig
from model.gpt import GPT
from model.kernels import portable
from model.kernels.native_library import NoNativeLibraryError
from model.operations import PLAIN, Operations, compiled
from raymill.errors import UserError
from raymill.state.shard import Shard
from raymill.step_timer import StepTimer
from raymill.sums.step_totals import Measured, StepTotals
from tests.gpu.made_runs import EOT_ID, MadeRows
from tests.jobs.lone_rank import rank_0_of
from tests.jobs.shardings import sharding
from tests.jobs.train_worlds import CPU


def config(shape: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    model = {"preset": "tiny", "n_positions": 128, "dropout": 0.1} | (shape or {})
    return RunConfig.model_validate({"model": model, "train": {"precision": "fp32"} | train})


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"precision": "bf16", "document_mask": True},
        {"compute": "plain", "recompute": True, "document_mask": True},
        {"compute": "plain", "precision": "bf16", "micro_batches_per_lane": 2},
        {"exact": False},
        pytest.param({"compute": "compiled", "precision": "bf16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_healthy_processor_passes(train: dict[str, Any]) -> None:
    self_test(config(**train), CPU)


@pytest.mark.parametrize(
    "preset",
    ["gpt2-124m", "gpt3-6.7b", "llama3.2-1b", pytest.param("seed", marks=pytest.mark.slow)],
)
def test_a_healthy_processor_passes_in_bf16_however_wide_the_heads_are(preset: str) -> None:
    """64, 128, 64 and 768 values: with logits that grow with the width, rounding would look like a
    fault."""
    train = {"precision": "bf16", "compute": "plain"}
    self_test(RunConfig.model_validate({"model": {"preset": preset}, "train": train}), CPU)


@pytest.mark.slow  # imports the compiler
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("document_mask", [False, True], ids=["whole rows", "documents"])
def test_what_trains_is_compiled_in_the_test__however_a_run_is_sharded(
    dropout: float, document_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all: a rank of four then compiles nothing in its first step."""
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compute, "compiled", lambda: compiled(backend))
    shape = {"n_layer": 3, "dropout": dropout}
    settings = {"compute": "compiled", "precision": "bf16", "document_mask": document_mask}
    settings |= {"micro_batch_size": 2, "global_batch_size": 16}
    run = config(shape, **settings)
    self_test(run, CPU)
    tested = len(graphs)
    assert tested == (3 if dropout else 2), "a block with and without dropout, and the head's loss"
    for shard in get_args(Shard):
        for micro_batches in (1, 2):
            take_a_step(run, shard, micro_batches)
            assert len(graphs) == tested, (shard, micro_batches)


def take_a_step(run: RunConfig, shard: Shard, micro_batches: int) -> None:
    """Computes a step as rank 0 of four, which the others send nothing."""
    per_lane = {"micro_batches_per_lane": micro_batches}
    run = run.model_copy(update={"train": run.train.model_copy(update=per_lane)})
    with rank_0_of(4) as group, pytest.MonkeyPatch.context() as patched:
        patched.setattr(StepTotals, "finish", lambda *_, **__: Measured(0.0, 0.0, 1))
        assert isinstance(run.model, GPTConfig)
        state = run_state(
            GPT(run.model),
            run.train,
            device=CPU,
            group=group,
            sharding=sharding(shard, world_size=4),
        )
        eot_id = EOT_ID if run.train.document_mask else None
        rows = MadeRows.of(run)
        gradient = step_gradient(run, state, rows, group, eot_id=eot_id)  # type: ignore[arg-type]
        gradient.of_step(1, StepTimer())
        gradient.close()
        state.close()


@pytest.mark.parametrize("llama", [False, True])
def test_portable_kernels__pass_with_one_hash_however_many_threads(llama: bool) -> None:
    shape = {"preset": "demo-llama" if llama else "tiny", "dropout": 0.0}
    before, hashes = torch.get_num_threads(), set()
    for number in (1, 3):
        torch.set_num_threads(number)
        hashes.add(self_test(config(shape, compute="portable", document_mask=True), CPU))
    torch.set_num_threads(before)
    assert len(hashes) == 1


def test_portable_kernels__that_cannot_be_compiled__are_no_fault_of_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise NoNativeLibraryError("there is no C++ compiler")

    monkeypatch.setattr(portable, "_library", missing)
    with pytest.raises(UntestedError, match=r"there is no C\+\+ compiler.*Install g\+\+"):
        self_test(config({"dropout": 0.0}, compute="portable"), CPU)


def wrong(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Has the value of a projection, and a gradient that is 1 % too long where it is C wide."""
    y = PLAIN.affine(x, weight, bias)
    longer = y * 1.01
    return y.detach() + longer - longer.detach() if weight.shape[1] == weight.shape[0] * 4 else y


CALLS = itertools.count()


def unsteady(hidden: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    return PLAIN.cross_entropy(hidden * (1 + 2e-6 * next(CALLS)), weight, *rest, **options)


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (
            PLAIN._replace(affine=wrong),
            "a feed-forward layer has a gradient of transformer.h.1.mlp.c_fc.bias that is 0.01",
        ),
        (PLAIN._replace(cross_entropy=unsteady), "another gradient each time"),
    ],
    ids=["wrong", "unsteady"],
)
def test_a_planted_fault_is_named(
    ops: Operations, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "PLAIN", ops)
    with pytest.raises(UserError, match=message):
        self_test(config(compute="plain"), CPU)


def test_dropout_is_tested_too() -> None:
    """It is part of the hash, and of what must be the same twice and about as long."""
    hashes = {self_test(config({"dropout": dropout}), CPU) for dropout in (0.0, 0.1, 0.3)}
    assert len(hashes) == 3


@pytest.mark.parametrize("compute_way", ["plain", "cpu"])
def test_a_fault_of_dropout_is_named(compute_way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drops_all(x: Tensor, p: float, training: bool) -> Tensor:
        return 0.0 * x if p else x

    monkeypatch.setattr(gpt.F, "dropout", drops_all)
    with pytest.raises(UserError, match=r"has, with dropout 0\.1, a gradient of .* times as long"):
        self_test(config(compute=compute_way), CPU)
