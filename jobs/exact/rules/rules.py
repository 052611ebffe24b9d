"""Chooses the rule that updates a run's weights, and says which of these it updates as matrices."""

from collections.abc import Mapping
from typing import assert_never

from cluster.settings.train import TrainConfig
from jobs.exact.rules.adamw import AdamW
from jobs.exact.rules.muon import Muon
from jobs.exact.rules.update_rule import Unit, UpdateRule
from model.numerics import FP32
from model.shapes import HiddenMatrix


def update_rule(train: TrainConfig) -> UpdateRule:
    adamw = AdamW(beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay)
    match train.optimizer:
        case "adamw":
            return adamw
        case "muon":
            # A plan may ask before the precision is settled, for what does not depend on it
            numerics = FP32 if train.precision == "auto" else train.numerics
            return Muon(train.momentum, train.weight_decay, others=adamw, numerics=numerics)
        case _:
            assert_never(train.optimizer)


def matrices_of(rule: UpdateRule, hidden: Mapping[str, HiddenMatrix]) -> Mapping[str, HiddenMatrix]:
    """Returns those of a model's hidden matrices, by name, of which a rank must own all or
    nothing."""
    match rule.unit:
        case Unit.VALUE:
            return {}
        case Unit.MATRIX:
            return hidden
        case _:
            assert_never(rule.unit)


def matrix_costs(rule: UpdateRule, hidden: Mapping[str, HiddenMatrix]) -> dict[str, float]:
    """Returns the operations by which these are divided evenly among ranks (`FlatLayout.of`)."""
    costs: dict[str, float] = {}
    for name, matrix in matrices_of(rule, hidden).items():
        costs[name] = rule.flops(matrix.shape, matrix)
    return costs


def vectors_of(rule: UpdateRule, matrix: HiddenMatrix | None) -> tuple[str, ...]:
    """Returns the names of what the rule keeps for the values of a parameter."""
    return rule.vectors if matrix is None else rule.matrix_vectors


def all_vectors(rule: UpdateRule) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.vectors + rule.matrix_vectors))
