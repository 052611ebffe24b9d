"""What a GPU would refuse of a run in exact mode, told on a CPU: of raymill's own models and of
transformers', in training, in evaluation and for a save; and what the page of models says of it."""

import re
from collections.abc import Callable
from difflib import unified_diff
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.exact.compute import autocast
from jobs.exact.foreign_test import test_foreign as check_foreign
from jobs.exact.run_state import decoder_of
from jobs.exact.stored_state import hashes_of_state, words_of_share
from model.files.checkpoint import check_finite
from model.foreign_config import ForeignModelError
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from raymill.state.host_copies import HostCopies
from raymill.state.state_shares import StateShares
from raymill.state.train_state import ALONE
from tests.cuda_alerts import (
    ALERTS,
    DETERMINISTIC,
    TABLE_OF_VERSION,
    CudaAlerts,
    documented_sentences,
)
from tests.foreign_models import FAMILIES, ON_CPUS_ALONE, QUICK, WITHOUT_DOCUMENTS
from tests.jobs.train_worlds import CPU, EOT, Case, MadeRows, Trainer
from tests.repository import REPOSITORY

PAGE = REPOSITORY / "docs/how-to/models.md"

OWN = {
    "gpt2, bf16": Case("bf16", compute="plain", documents=True, recompute=True, micro_batches=2),
    "gpt2, untied, muon": Case(compute="plain", is_tied=False, optimizer="muon", chat=True),
    "llama": Case("bf16", compute="plain", llama=True, documents=True, optimizer="muon"),
    "llama, fp32": Case(compute="plain", llama=True, recompute=True),
}
"""Runs of raymill's own models, with the operations that a GPU has too."""


def case_of(family: str) -> Case:
    return Case(
        compute="plain",
        family=family,
        num_lanes=2,
        documents=family not in WITHOUT_DOCUMENTS,
        chat=True,
        recompute=family in QUICK,
    )


def alerts_of_run(case: Case) -> set[str]:
    """Returns what a GPU would refuse of two steps, of a loss and a text of the trained model, and
    of what is computed for a save."""
    with CudaAlerts() as watch:
        trainer = Trainer(case, ALONE)
        trainer.steps(range(1, 3))
        config, state = case.config(), trainer.state
        model = decoder_of(state).eval()
        inputs, targets = MadeRows(chat=case.chat).samples(range(2))
        params = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=7)
        with torch.no_grad(), state.weights_in_use(), autocast(config, CPU):
            model.loss(inputs, targets)
            generate(model, [3, 1, EOT, 4], max_tokens=3, params=params)
        own_views = StateShares(state).own_views()
        for views in own_views.values():
            torch.cat(views).cpu()
        copies = HostCopies(CPU)
        copies.start("checkpoint", [state.values], list)
        words_of_share(state, state.parts)
        hashes_of_state(state, ALONE, step=2)
        check_finite(dict(model.named_parameters()), step=2)
        assert state.is_finite()
        trainer.gradient.close()
        torch.use_deterministic_algorithms(False)
    return watch.found


@pytest.mark.parametrize("name", OWN)
def test_a_run_of_an_own_model_needs_nothing_that_a_gpu_refuses(name: str) -> None:
    assert alerts_of_run(OWN[name]) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_for_gpus__needs_nothing_that_they_refuse(family: str) -> None:
    assert alerts_of_run(case_of(family)) == set()


@pytest.mark.parametrize("family", ON_CPUS_ALONE)
def test_a_family_for_cpus_alone__needs_what_the_page_says(family: str) -> None:
    assert alerts_of_run(case_of(family)) == {"cumsum"}
    assert rows_of_page()[family] == "no: `cumsum`"


def rows_of_page() -> dict[str, str]:
    """Returns the last column of the page's tables by model_type."""
    columns: dict[str, str] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            _, families, *_, on_gpus, _ = [cell.strip() for cell in line.split("|")]
            columns |= dict.fromkeys(re.findall(r"`(\w+)`", families), on_gpus)
    return columns


def test_the_page__has_each_tested_family_and_whether_gpus_train_it() -> None:
    rows = rows_of_page()
    assert rows.keys() == FAMILIES.keys() | ON_CPUS_ALONE.keys()
    assert {rows[family] for family in FAMILIES} == {"yes"}


def test_the_table_of_what_gpus_refuse__is_pytorchs_documentation() -> None:
    """Fails where another version says something else, with what it says."""
    found = [*documented_sentences()]
    expected = [[*DETERMINISTIC], [alert.documented for alert in ALERTS]]
    for ours, theirs in zip(expected, found, strict=True):
        lines = unified_diff(ours, theirs, TABLE_OF_VERSION, torch.__version__, lineterm="", n=0)
        assert not [*lines], (
            "enter these sentences in tests/cuda_alerts.toml, with their operations"
        )
    assert min(len(sentences) for sentences in found) > 20


def test_a_sentence_that_is_new_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(torch.use_deterministic_algorithms.__doc__)
    point = "        * :func:`torch.histc` when called on a CUDA tensor"
    changed = text.replace(
        point, f"{point}\n        * :func:`torch.bmm` when it is new\n          here"
    )
    monkeypatch.setattr(torch.use_deterministic_algorithms, "__doc__", changed)
    _, refused = documented_sentences()
    new = {*refused} - {alert.documented for alert in ALERTS}
    assert new == {":func:`torch.bmm` when it is new here"}


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, requires_grad=True)


def back(values: Tensor) -> None:
    values.sum().backward()


def unpooled(pool: Any, unpool: Any, x: Tensor) -> None:
    unpool(*pool(x, 2, return_indices=True), 2)


ZERO = torch.zeros(1, dtype=torch.int64)
SAMPLES: dict[str, Callable[[], object]] = {
    "AvgPool3d": lambda: back(F.avg_pool3d(drawn(1, 1, 4, 4, 4), 2)),
    "AdaptiveAvgPool2d": lambda: back(F.adaptive_avg_pool2d(drawn(1, 1, 5, 5), 2)),
    "AdaptiveAvgPool3d": lambda: back(F.adaptive_avg_pool3d(drawn(1, 1, 5, 5, 5), 2)),
    "AdaptiveMaxPool2d": lambda: back(F.adaptive_max_pool2d(drawn(1, 1, 5, 5), 2)),
    "FractionalMaxPool2d": lambda: back(F.fractional_max_pool2d(drawn(1, 1, 5, 5), 2, 2)),
    "FractionalMaxPool3d": lambda: back(F.fractional_max_pool3d(drawn(1, 1, 5, 5, 5), 2, 2)),
    "MaxUnpool1d": lambda: unpooled(F.max_pool1d, F.max_unpool1d, torch.rand(1, 1, 4)),
    "MaxUnpool2d": lambda: unpooled(F.max_pool2d, F.max_unpool2d, torch.rand(1, 1, 4, 4)),
    "MaxUnpool3d": lambda: unpooled(F.max_pool3d, F.max_unpool3d, torch.rand(1, 1, 4, 4, 4)),
    "interpolate": lambda: back(F.interpolate(drawn(1, 1, 4), scale_factor=2, mode="linear")),
    "ReflectionPad1d": lambda: back(nn.ReflectionPad1d(1)(drawn(1, 1, 4))),
    "ReflectionPad2d": lambda: back(nn.ReflectionPad2d(1)(drawn(1, 1, 4, 4))),
    "ReflectionPad3d": lambda: back(nn.ReflectionPad3d(1)(drawn(1, 1, 4, 4, 4))),
    "NLLLoss": lambda: F.nll_loss(torch.rand(1, 3, 2, 2), torch.zeros(1, 2, 2).long()),
    "CTCLoss": lambda: back(F.ctc_loss(drawn(5, 1, 3), ZERO[None] + 1, ZERO + 5, ZERO + 1)),
    "EmbeddingBag": lambda: back(nn.EmbeddingBag(4, 3, mode="max")(ZERO[None])),
    "put_": lambda: torch.zeros(3).put_(ZERO, torch.ones(1), accumulate=True),
    "histc": lambda: torch.rand(4).histc(),
    "bincount": lambda: ZERO.bincount(weights=torch.rand(1)),
    "median": lambda: torch.rand(2, 3).median(dim=1),
    "grid_sample": lambda: back(
        F.grid_sample(drawn(1, 1, 4, 4), torch.zeros(1, 2, 2, 2), align_corners=False)
    ),
    "cumsum": lambda: torch.rand(3).cumsum(0),
    "scatter_reduce": lambda: torch.rand(3).scatter_reduce(0, ZERO, torch.ones(1), "prod"),
    "resize_": lambda: torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8).resize_(2),
}
"""By the name in the documentation: what a GPU would refuse."""
ALLOWED: dict[str, Callable[[], object]] = {
    "a mean in an embedding bag": lambda: back(nn.EmbeddingBag(4, 3, mode="mean")(ZERO[None])),
    "a count without weights": ZERO.bincount,
    "a median without an index": lambda: torch.rand(3).median(),
    "a cumulative sum of integers": lambda: ZERO.cumsum(0),
    "a sum that is scattered": lambda: torch.rand(3).scatter_reduce(0, ZERO, torch.ones(1), "sum"),
    "scatter_add_": lambda: torch.zeros(3).scatter_add_(0, ZERO, torch.ones(1)),
    "index_add": lambda: torch.zeros(3).index_add(0, ZERO, torch.ones(1)),
    "a loss of a row": lambda: F.nll_loss(torch.rand(1, 3), ZERO),
    "resize_": lambda: torch.rand(4).resize_(2),
}


@pytest.mark.parametrize("name", [alert.name for alert in ALERTS])
def test_what_a_gpu_refuses_is_found(name: str) -> None:
    with CudaAlerts() as watch:
        SAMPLES[name]()
    assert name in watch.found


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_like_it_and_deterministic_is_not(name: str) -> None:
    with CudaAlerts() as watch:
        ALLOWED[name]()
    assert watch.found == set()


def test_what_is_refused_of_a_backward_pass_has_its_name() -> None:
    for alert in ALERTS:
        is_named = ["backward" in operation for operation in alert.operations]
        assert {*is_named} == {alert.is_backward}, alert.documented


@pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])
def test_an_operation_without_a_deterministic_form__is_refused_with_the_models_type(
    is_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In PyTorch's own words, which only a GPU has."""
    cumsum = torch.cumsum

    def refused(*values: Any, **named: Any) -> Any:
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism"
        )

    def watched(*values: Any, **named: Any) -> Any:
        sums = cumsum(*values, **named)
        if sums.requires_grad:
            sums.register_hook(refused)
        return sums

    monkeypatch.setattr(torch, "cumsum", watched if is_backward else refused)
    monkeypatch.setattr(torch.Tensor, "cumsum", watched if is_backward else refused)
    config = Case(compute="plain", family="mamba2").config()
    with pytest.raises(ForeignModelError) as refusal:
        check_foreign(config, CPU)
    assert str(refusal.value).startswith(
        "a model of type 'mamba2' needs cumsum_cuda_kernel, which has no deterministic form on a GPU: "
        "nothing was trained. Train it on CPUs (--scaling.use-gpu false)"
    )
