"""Models of transformers in the exact engine: one hash for any number of workers, however the state
is sharded, and the steps of a plain loop with PyTorch's AdamW."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import transformers

from cluster.settings.run import RunConfig
from jobs.exact.foreign_test import test_foreign as check_foreign
from jobs.exact.self_test import self_test
from model.decoders.foreign import ForeignModel
from model.foreign_config import ForeignConfig
from model.numerics import Precision
from raymill.errors import UserError
from raymill.workers.worker_group import WorkerGroup
from tests.foreign_models import (
    FAMILIES,
    ON_CPUS_ALONE,
    QUICK,
    UNROUNDED,
    WITH_DROPOUT,
    WITHOUT_DOCUMENTS,
    small,
)
from tests.jobs.train_worlds import CPU, SUITES, Case, MadeRows, Trainer
from tests.jobs.world_runs import Outcome, run_worlds

WORLD_SIZES = ("1", "2", "3")
MORE_WORLD_SIZES = (*WORLD_SIZES, "4", "5")
WITHIN_S = 300

Runs = Callable[[str], list[Outcome]]


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Returns the results of a suite's cases in real processes, in worlds of 1 to 3, or to 5 where it
    is compiled, and in one of changing size, which is sharded in another way at each step."""

    @functools.cache
    def outcomes(suite: str) -> list[Outcome]:
        folder = tmp_path_factory.mktemp("worlds")
        sizes = MORE_WORLD_SIZES if suite == "compiled" else WORLD_SIZES
        return run_worlds(folder, sizes[-1], suite, within_s=WITHIN_S)

    return outcomes


@functools.cache
def of_one_process(case: Case) -> str:
    """Returns the hash of one process that shards nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = Trainer(case, WorkerGroup(0, 1))
    trainer.steps(range(1, 5))
    torch.set_num_threads(threads)
    return trainer.hash


def check_one_hash(
    cases: list[Case], runs: list[Outcome], sizes: Sequence[str] = WORLD_SIZES
) -> None:
    for case in cases:
        mine = [run for run in runs if run["case"] == asdict(case)]
        assert [run["world"] for run in mine] == [*sizes, "resized"]
        hashes = {value for run in mine for value in run["hashes"]}
        assert hashes == {of_one_process(case.numbers)}, case
        assert len({tuple(run["losses"]) for run in mine}) == 1, case


@pytest.mark.more
def test_a_model_of_transformers__in_any_world_and_sharding__has_one_hash(runs_of: Runs) -> None:
    check_one_hash(SUITES["one family"], runs_of("one family"))


@pytest.mark.more
def test_three_families__in_any_world_and_sharding__have_one_hash(runs_of: Runs) -> None:
    cases = SUITES["three families"]
    assert {case.family for case in cases} == set(QUICK)
    check_one_hash(cases, runs_of("three families"))


@pytest.mark.slow  # compiles
def test_three_families_that_are_compiled__in_any_world_and_sharding__have_one_hash(
    runs_of: Runs,
) -> None:
    """One of them with dropout."""
    cases = SUITES["compiled"]
    assert [case.family for case in cases] == ["qwen3", "gemma3_text", "falcon"]
    check_one_hash(cases, runs_of("compiled"), MORE_WORLD_SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *ON_CPUS_ALONE])
def test_a_family__in_any_world_and_sharding__has_one_hash(family: str, runs_of: Runs) -> None:
    check_one_hash(SUITES[family], runs_of(family))
    if family not in UNROUNDED:
        sent = {
            run["case"]["precision"]: run["bytes_per_step"]
            for run in runs_of(family)
            if run["case"]["shard"] == "parameters" and run["world"] == "3"
        }
        assert sent["bf16"] < 0.75 * sent["fp32"], "embeddings alone travel as fp32"


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in FAMILIES
        if name not in WITH_DROPOUT  # a loop draws it otherwise
    ],
)
def test_ten_steps__of_a_family__are_those_of_a_plain_loop_with_pytorchs_adamw(family: str) -> None:
    case = Case(compute="plain", family=family, num_lanes=3)
    train = case.config().train
    trainer = Trainer(case, WorkerGroup(0, 1))
    values = case.config().model
    assert isinstance(values, ForeignConfig)
    twin = transformers.AutoModelForCausalLM.from_config(
        transformers.CONFIG_MAPPING[family].from_dict(values.values), dtype=torch.float32
    )
    start = {
        name: weight.detach().clone() for name, weight in trainer.state.model.named_parameters()
    }
    twin.load_state_dict(start, strict=False)

    parameters = list(twin.parameters())
    groups = [
        {
            "params": [one for one in parameters if one.ndim >= 2],
            "weight_decay": train.weight_decay,
        },
        {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(train.beta1, train.beta2), eps=1e-8)
    losses = []
    for step in range(10):
        inputs, targets = MadeRows().samples(range(6 * step, 6 * step + 6))
        logits = twin(input_ids=inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.grad_clip)
        optimizer.step()
        losses.append(loss.item())

    assert trainer.steps(range(1, 11)) == pytest.approx(losses, rel=1e-4)
    expected = dict(twin.named_parameters())
    for name, weight in trainer.state.model.named_parameters():
        moved = (expected[name] - start[name]).norm()
        # AdamW moves a value as far for a gradient of nearly zero, whose sign rounding decides
        assert (weight - expected[name]).norm() <= 4e-2 * moved, name


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in FAMILIES
        if name not in UNROUNDED
    ],
)
def test_matrices_that_are_rounded_before__have_the_bits_of_autocast(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        "bf16", num_lanes=3, compute="plain", family=family, micro_batches=2, recompute=True
    )
    trainer = Trainer(case, WorkerGroup(0, 1))
    assert trainer.state.matrix_type == torch.bfloat16, "as which matrices travel"
    trainer.steps(range(1, 4))

    class Unrounded(ForeignModel):
        def __init__(self, config: ForeignConfig) -> None:
            super().__init__(config)
            self.rounds_matrices = False

    monkeypatch.setattr("model.decoders.foreign.ForeignModel", Unrounded)
    other = Trainer(case, WorkerGroup(0, 1))
    assert other.state.matrix_type == torch.float32
    other.steps(range(1, 4))
    assert trainer.hash == other.hash


def test_matrices__that_something_else_than_a_linear_module_reads__stay_as_they_are() -> None:
    for family in UNROUNDED:
        assert not ForeignModel(small(family)).rounds_matrices, family


def test_self_test__of_a_matrix_that_is_read_beside_its_product__refuses_bf16() -> None:
    config = config_of("qwen3", precision="bf16")
    check_foreign(config, CPU)
    with pytest.MonkeyPatch.context() as patch:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

        forward = Qwen3MLP.forward

        def beside(self: Any, x: Any) -> Any:
            return forward(self, x) * self.up_proj.weight.norm()

        patch.setattr(Qwen3MLP, "forward", beside)
        with pytest.raises(UserError, match="otherwise than in products"):
            check_foreign(config, CPU)


def config_of(
    family: str, *, document_mask: bool = False, precision: Any = "fp32", **changes: Any
) -> RunConfig:
    config = Case(precision, compute="plain", family=family, documents=document_mask).config()
    return config.model_copy(update={"model": small(family, **changes)})


def test_self_test__of_a_foreign_model__passes() -> None:
    self_test(config_of("qwen3", document_mask=True), CPU)


@pytest.mark.slow
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("family", [*FAMILIES, *ON_CPUS_ALONE])
def test_self_test__of_each_family__passes(family: str, precision: Precision) -> None:
    has_documents = family not in WITHOUT_DOCUMENTS
    self_test(config_of(family, document_mask=has_documents, precision=precision), CPU)


def test_self_test__of_a_model_that_sees_what_follows__refuses_it() -> None:
    with pytest.raises(UserError, match="sees the tokens that follow"):
        check_foreign(config_of("qwen3", is_causal=False), CPU)


def test_self_test__of_documents_for_a_model_without_positions__refuses_them() -> None:
    with pytest.raises(UserError, match="not told where documents begin"):
        check_foreign(config_of("bloom", document_mask=True), CPU)


def test_self_test__of_a_parameter_without_gradient__names_it() -> None:
    # It only chooses experts, and its bias is moved by other rules than gradients
    config = config_of("qwen3", document_mask=False)
    with pytest.MonkeyPatch.context() as patch:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

        forward = Qwen3MLP.forward

        def without_gradient(self: Any, x: Any) -> Any:
            with torch.no_grad():
                return forward(self, x)

        patch.setattr(Qwen3MLP, "forward", without_gradient)
        with pytest.raises(
            UserError, match=r"model\.layers\.0\.mlp\.\w+\.weight .*gets no gradient"
        ):
            check_foreign(config, CPU)


def test_self_test__of_a_gradient_that_is_another_one_each_time__refuses_it() -> None:
    with pytest.MonkeyPatch.context() as patch:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

        forward, calls = Qwen3MLP.forward, []

        def drifting(self: Any, x: Any) -> Any:
            calls.append(1)
            return forward(self, x) * (1 + 1e-6 * len(calls))

        patch.setattr(Qwen3MLP, "forward", drifting)
        with pytest.raises(UserError, match="another one each time"):
            check_foreign(config_of("qwen3"), CPU)
