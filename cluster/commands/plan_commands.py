"""`raymill plan`, and `raymill inspect --shapes`: the shape and bytes of a batch at each stage of the model."""

import argparse
from collections.abc import Sequence
from typing import Any

from cluster.settings.flags import config_from_arguments, settings_from_flags, validate_config
from cluster.settings.plan import PlanConfig
from cluster.settings.run import RunConfig, planned_vocabulary, seq_len, with_precision
from model.config import num_parameters
from model.numerics import BF16
from model.processor import fast_precision
from model.shapes import Stage, stages, weights

_SHAPES_ROW = "  {:<28}{:<15}{:<24}{:>14}{:>7}  {}"


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures, to be printed as a table."""
    from jobs.plan.make_plan import planned
    from jobs.plan.scale_simulation import scale_table, scales

    options = validate_config(settings_from_flags(arguments, PlanConfig), PlanConfig)
    config = config_from_arguments(arguments, RunConfig, needs_source=False)
    if arguments.simulate:
        rows = scales(planned_vocabulary(config), options)
        found: dict[str, Any] = {"scales": rows, "table": scale_table(rows)}
    else:
        found = planned(config, options)
    arguments.text = f"{found.pop('table')}\n"
    return found


def inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Shows the shapes of one lane: train.micro_batch_size sequences of train.seq_len tokens."""
    config = planned_vocabulary(config_from_arguments(arguments, RunConfig, needs_source=False))
    config = with_precision(config, BF16.name if config.scaling.use_gpu else fast_precision("cpu"))
    batch_size, tokens = config.train.micro_batch_size, seq_len(config)
    small = config.train.numerics.product_bytes
    passed = stages(config.model, batch_size=batch_size, seq_len=tokens, bytes_per_value=small)
    held = weights(config.model)
    size = num_parameters(config.model)
    title = f"A lane of {batch_size} x {tokens:,} tokens, {config.train.precision}"
    arguments.text = _text(title, passed) + _text(f"\n{size:,} parameters", held)
    return {"parameters": size, "stages": _values(passed), "weights": _values(held)}


def _values(found: Sequence[Stage]) -> list[dict[str, Any]]:
    return [vars(stage) | {"shape": list(stage.shape), "num_bytes": stage.num_bytes} for stage in found]


def _text(title: str, found: Sequence[Stage]) -> str:
    rows = [("stage", "dimensions", "shape", "bytes", "times", "")]
    for stage in found:
        shape = " x ".join(f"{length:,}" for length in stage.shape)
        num_bytes = f"{stage.num_bytes / 1e6:,.3f} MB"
        rows.append((stage.name, stage.dims, shape, num_bytes, f"{stage.times}", stage.note))
    lines = [_SHAPES_ROW.format(*row).rstrip() for row in rows]
    return "\n".join([title, *lines]) + "\n"
