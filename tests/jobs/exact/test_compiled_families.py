"""Models of transformers with fused kernels: what trains is compiled in the self-test, which names
what cannot be."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from cluster.settings.run import RunConfig
from jobs.exact import compute
from jobs.exact.run_state import run_state
from jobs.exact.self_test import self_test
from jobs.exact.step_gradient import step_gradient
from model.decoders.foreign import ForeignModel
from model.foreign_config import ForeignConfig
from model.operations import compiled
from raymill.errors import UserError
from raymill.state.shard import Shard
from raymill.step_timer import StepTimer
from raymill.sums.step_totals import Measured, StepTotals
from tests.foreign_models import small
from tests.jobs.lone_rank import rank_0_of
from tests.jobs.shardings import sharding
from tests.jobs.train_worlds import CPU, EOT, SEQ_LEN, Case, MadeRows

Graphs = list[torch.fx.GraphModule]


def config_of(family: str, precision: Any = "fp32", **changes: Any) -> RunConfig:
    case = Case(precision, compute="compiled", family=family, documents=family != "bloom")
    run = case.config()
    train = run.train.model_copy(update={"seq_len": SEQ_LEN})
    return run.model_copy(update={"model": small(family, **changes), "train": train})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Has graphs computed by PyTorch's own operations, and returns them as they come to be."""
    torch.compiler.reset()
    graphs: Graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compute, "compiled", lambda: compiled(backend))
    return graphs


def take_a_step(run: RunConfig, shard: Shard, *, has_documents: bool) -> None:
    """Computes a step as rank 0 of four, which the others send nothing."""
    with rank_0_of(4) as group, pytest.MonkeyPatch.context() as patched:
        patched.setattr(StepTotals, "finish", lambda *_, **__: Measured(0.0, 0.0, 1))
        assert isinstance(run.model, ForeignConfig)
        state = run_state(
            ForeignModel(run.model),
            run.train,
            device=CPU,
            group=group,
            sharding=sharding(shard, world_size=4),
        )
        rows: Any = MadeRows()
        eot_id = EOT if has_documents else -1  # which no row has
        known = eot_id if run.train.document_mask else None
        gradient = step_gradient(run, state, rows, group, eot_id=known)
        gradient.of_step(1, StepTimer())
        gradient.close()
        state.close()


def check_that_all_is_compiled(graphs: Graphs, run: RunConfig) -> None:
    for shard in get_args(Shard):
        for has_documents in (True, False):
            num_before = len(graphs)
            take_a_step(run, shard, has_documents=has_documents)
            assert len(graphs) == num_before, (shard, has_documents)


def test_what_trains_is_compiled_in_the_self_test__however_a_run_is_sharded(graphs: Graphs) -> None:
    """One graph for all layers: a rank of four then compiles nothing in its first step."""
    run = config_of("qwen3")
    self_test(run, CPU)
    assert len(graphs) == 3, "a layer with and without a mask, and the head's loss"
    check_that_all_is_compiled(graphs, run)


@pytest.mark.more
@pytest.mark.parametrize(
    ("family", "changes", "num_graphs"),
    [
        ("gemma3_text", {}, 4),  # layers with a window have a mask in any case
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, 5),  # layers with and without positions
        ("falcon", {}, 5),  # with dropout and without
        ("bloom", {}, 3),  # the same, and never documents
    ],
)
def test_what_trains_is_compiled_in_the_self_test__for_each_kind_of_layer(
    family: str, changes: dict[str, Any], num_graphs: int, graphs: Graphs
) -> None:
    run = config_of(family, "bf16", **changes)
    self_test(run, CPU)
    assert len(graphs) == num_graphs
    check_that_all_is_compiled(graphs, run)


def test_layers_of_one_kind_that_are_no_common_graph__are_refused(graphs: Graphs) -> None:
    """Each divides its scores by its own number."""
    with pytest.raises(UserError, match="type 'gpt2' each layer is another graph: nothing was"):
        self_test(config_of("gpt2"), CPU)


def test_a_layer_that_branches_by_its_values__is_refused(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Qwen3MLP.forward

    def branching(self: Any, x: Any) -> Any:
        return forward(self, x * 2 if x.sum() > 1e9 else x)

    monkeypatch.setattr(Qwen3MLP, "forward", branching)
    with pytest.raises(UserError, match="type 'qwen3' cannot be compiled"):
        self_test(config_of("qwen3"), CPU)


def test_kernels_that_compute_something_else__are_named(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        return lambda *values: [1.01 * value for value in graph.forward(*values)]

    monkeypatch.setattr(compute, "compiled", lambda: compiled(wrong))
    with pytest.raises(UserError, match=r"has a gradient of .* off, relative to autograd"):
        self_test(config_of("qwen3"), CPU)
