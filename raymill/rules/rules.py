"""Says which weights a rule updates as matrices, and what it keeps for each."""

from collections.abc import Mapping
from typing import assert_never

from raymill.rules.hidden_matrix import HiddenMatrix
from raymill.rules.update_rule import Unit, UpdateRule


def matrices_of(rule: UpdateRule, hidden: Mapping[str, HiddenMatrix]) -> Mapping[str, HiddenMatrix]:
    """Returns the hidden matrices of a model, by name, of which a rank must own all or nothing."""
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
    """Returns the names of the vectors that the rule keeps for a parameter."""
    return rule.vectors if matrix is None else rule.matrix_vectors


def all_vectors(rule: UpdateRule) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.vectors + rule.matrix_vectors))
