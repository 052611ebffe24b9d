"""Counts the cost of the update of all weights: its operations, the bytes that it moves, and the
bytes of the rule's vectors."""

from math import prod

from cluster.settings.run import RunConfig
from jobs.exact.run_values import update_rule
from jobs.plan.formulas import FP32_BYTES
from model.shapes import hidden_matrices, parameter_shapes
from raymill.rules.rules import matrices_of, vectors_of
from raymill.state.flat_layout import FlatLayout
from raymill.state.span import PackedSpans


def update_flops(config: RunConfig) -> float:
    """Returns the operations of one update of all weights, which does not depend on the batch."""
    rule = update_rule(config.train)
    matrices = matrices_of(rule, hidden_matrices(config.model))
    flops = 0.0
    for name, shape in parameter_shapes(config.model).items():
        flops += rule.flops(shape, matrices.get(name))
    return flops


def update_bytes(config: RunConfig) -> float:
    """Returns the bytes that one update of all weights reads and writes."""
    rule = update_rule(config.train)
    matrices = matrices_of(rule, hidden_matrices(config.model))
    num_bytes = 0.0
    for name, shape in parameter_shapes(config.model).items():
        num_bytes += rule.bytes_moved(shape, matrices.get(name))
    return num_bytes


def stored_bytes(config: RunConfig) -> float:
    """Returns the bytes of a checkpoint: of the weights and of the update rule's vectors."""
    rule = update_rule(config.train)
    matrices = matrices_of(rule, hidden_matrices(config.model))
    num_values = 0
    for name, shape in parameter_shapes(config.model).items():
        num_values += prod(shape) * (1 + len(vectors_of(rule, matrices.get(name))))
    return float(FP32_BYTES * num_values)


def state_bytes(config: RunConfig, layout: FlatLayout) -> float:
    """Returns the bytes of the same in flat buffers, as snapshots and copies have it."""
    return FP32_BYTES * layout.size + _vector_bytes(config, layout, layout.whole)


def most_optimizer_bytes(config: RunConfig, layout: FlatLayout, *, num_holders: int) -> float:
    """Returns the bytes of the update rule's vectors on the rank that has most, among the ranks
    that hold one copy together."""
    if not layout.matrices:
        return _vector_bytes(config, layout, layout.whole) / num_holders
    most = 0.0
    for rank in range(num_holders):
        parts = layout.parts(rank, world_size=num_holders)
        most = max(most, _vector_bytes(config, layout, parts))
    return most


def most_values(layout: FlatLayout, *, num_holders: int) -> float:
    """Returns how many values the rank owns that owns most."""
    if not layout.matrices:
        return layout.size / num_holders
    ranks = range(num_holders)
    return max(layout.parts(rank, world_size=num_holders).num_values for rank in ranks)


def _vector_bytes(config: RunConfig, layout: FlatLayout, parts: PackedSpans) -> float:
    rule = update_rule(config.train)
    in_matrices = (parts & layout.in_matrices).num_values
    num_values = len(rule.vectors) * (parts.num_values - in_matrices)
    num_values += len(rule.matrix_vectors) * in_matrices
    return float(FP32_BYTES * num_values)
