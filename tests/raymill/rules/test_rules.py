"""Every word of the setting `optimizer` makes a rule of its own, and no other word makes one."""

from typing import get_args

import pytest

from cluster.settings.train import Optimizer, TrainConfig
from jobs.exact.run_values import update_rule
from model.numerics import NUMERICS
from raymill.rules.muon import Muon


def test_update_rule__for_each_word_of_the_setting__is_of_a_class_of_its_own() -> None:
    words = get_args(Optimizer)
    classes = {type(update_rule(TrainConfig(optimizer=word))) for word in words}
    assert len(classes) == len(words)


def test_update_rule__for_another_word__is_refused() -> None:
    """The type checker finds a word that the setting has and `rules` has not; this is what happens
    without it."""
    with pytest.raises(AssertionError, match="lion"):
        update_rule(TrainConfig().model_copy(update={"optimizer": "lion"}))


def test_muons_products__are_computed_in_the_precision_of_the_run() -> None:
    for precision, numerics in NUMERICS.items():
        rule = update_rule(TrainConfig(optimizer="muon", precision=numerics.name))
        assert isinstance(rule, Muon) and rule.products == numerics.torch_type, precision
