"""What a GPU would refuse of transformers' models, told on a CPU, and what the page of models says
of it."""

import re
from typing import Any

import pytest
import torch

from jobs.exact.foreign_test import test_foreign as check_foreign
from model.decoders.foreign import ForeignModel
from model.foreign_config import ForeignModelError
from tests.cuda_alerts import ALERTS, cuda_alerts
from tests.foreign_models import FAMILIES, ON_CPUS_ALONE, VOCAB, small
from tests.jobs.train_worlds import CPU, Case
from tests.repository import REPOSITORY

PAGE = REPOSITORY / "docs/how-to/models.md"


def alerts_of(family: str) -> set[str]:
    model = ForeignModel(small(family))
    model.init_weights(3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (2, 32), generator=generator)
    with cuda_alerts() as found:
        model.train().loss(tokens, tokens.roll(-1)).backward()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_for_gpus__needs_nothing_that_they_refuse(family: str) -> None:
    assert alerts_of(family) == set()


@pytest.mark.parametrize("family", ON_CPUS_ALONE)
def test_a_family_for_cpus_alone__needs_what_the_page_says(family: str) -> None:
    assert alerts_of(family) == {"cumsum"}
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


def test_the_list_of_what_gpus_refuse__is_that_of_pytorchs_documentation() -> None:
    documentation = str(torch.use_deterministic_algorithms.__doc__)
    _, _, refused = documentation.partition("normally-nondeterministic operations will throw a")
    listed = re.findall(
        r"^\s+\* :\w+:`([\w.]+)`", refused.partition("In addition")[0], re.MULTILINE
    )
    assert {name.rpartition(".")[2] for name in listed} == ALERTS.keys()
    for operations in ALERTS.values():
        assert all(hasattr(torch.ops.aten, operation) for operation in operations)


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
