"""The settings that follow from one dial, `model.depth`: the shape, the optimizer and its rate, the
batch, the tokens and the warm-up.

Each rule has its source beside it. Whatever is set by itself stays as it is, and the other rules
take it as given.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cluster.settings.amounts import whole_number
from cluster.settings.data import DataConfig
from cluster.settings.train import TrainConfig
from model.config import GPTConfig, preset_fields

HEAD_WIDTH = 64
"""Of GPT-2 and GPT-3 at most sizes (Brown et al., 2020, table 2.1)."""

WIDTH_PER_LAYER = 64
"""nanochat's ratio, and that of GPT-2's 124M (768 / 12)."""

TOKENS_PER_PARAMETER = 20
"""Where a given compute ends with the lowest loss (Hoffmann et al., 2022, arXiv 2203.15556)."""

_MOST_DEPTH = 10_000
_SHAPE = TypeAdapter(GPTConfig)


def run_flops(shape: GPTConfig, seq_len: int, max_tokens: int) -> float:
    """Returns the operations as the next two rules count them, without embeddings and head
    (DeepSeek LLM, 2024, arXiv 2401.02954, section 3.2)."""
    width = shape.n_embd
    per_token = 72 * shape.n_layer * width**2 + 12 * shape.n_layer * width * seq_len
    return float(per_token) * max_tokens


def learning_rate(flops: float) -> float:
    """Returns the peak for a run of so many FLOPs (DeepSeek LLM, section 3.1), to three digits. It
    was fitted for AdamW. Muon's update has the same root mean square (Moonlight, arXiv 2502.16982),
    so it takes the same peak."""
    return float(f"{0.3118 * flops**-0.125:.3g}")


def batch_tokens(flops: float) -> float:
    """Returns the tokens of a step for a run of so many FLOPs (DeepSeek LLM, section 3.1)."""
    return 0.2920 * flops**0.3271


def warmup_tokens(max_tokens: int) -> int:
    """Returns GPT-3's 375M tokens, or 2% of a shorter run's."""
    return min(375_000_000, max_tokens // 50)


def with_depth(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a run with the ones that follow from `model.depth`, which is not one
    of them any more. Settings without it are returned as they are. Raises `ValueError` for no
    depth."""
    model = values.get("model")
    if not isinstance(model, dict) or model.get("depth") is None:
        return values
    shape = {name: value for name, value in model.items() if name != "depth"}
    if shape.get("preset") is not None:
        raise ValueError(
            f"model.depth={model['depth']} and model.preset={shape['preset']} both say what the shape is; "
            "leave one of them out"
        )
    depth = _depth(model["depth"])
    width = _count(shape.get("n_embd"), WIDTH_PER_LAYER * depth)
    num_heads = max(1, width // HEAD_WIDTH)
    shape = {"n_layer": depth, "n_head": num_heads, "n_embd": width} | shape
    train = values.get("train") or {}
    if not isinstance(train, dict):
        return values | {"model": shape}
    return values | {"model": shape, "train": _train(values, shape, train) | train}


def _depth(value: Any) -> int:
    depth = whole_number(value, is_bytes=False) if isinstance(value, str) else value
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= _MOST_DEPTH:
        raise ValueError(
            f"model.depth is {value!r}, expected a number of layers from 1 to {_MOST_DEPTH:,}"
        )
    return depth


def _train(
    values: Mapping[str, Any],
    shape: Mapping[str, Any],
    train: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what the shape says of the training; nothing for a shape that is refused."""
    try:
        config = _SHAPE.validate_python(preset_fields({"vocab_size": _vocabulary(values), **shape}))
    except (ValidationError, ValueError):
        return {}  # the settings as a whole are refused in words
    default = TrainConfig()
    usual_tokens = TOKENS_PER_PARAMETER * config.num_parameters
    max_tokens = _count(train.get("max_tokens"), usual_tokens)
    seq_len = _count(train.get("seq_len"), config.n_positions)
    micro_batch_size = _count(train.get("micro_batch_size"), default.micro_batch_size)
    lane_size = micro_batch_size * _count(train.get("micro_batches_per_lane"), 1)
    scaling = values.get("scaling") or {}
    most_workers = _count(scaling.get("max_workers"), 2) if isinstance(scaling, dict) else 2

    flops = run_flops(config, seq_len, max_tokens)
    lanes = batch_tokens(flops) / (lane_size * seq_len)
    num_lanes = max(2 ** round(math.log2(lanes)), most_workers) if lanes > 1 else most_workers
    return {
        "optimizer": "muon",
        "max_tokens": max_tokens,
        "global_batch_size": num_lanes * lane_size,
        "learning_rate": learning_rate(flops),
        "warmup_tokens": warmup_tokens(max_tokens),
    }


def _vocabulary(values: Mapping[str, Any]) -> int:
    """Returns the vocabulary that the run will have: that of the tokenizer that it trains, or
    GPT-2's."""
    data = values.get("data") or {}
    if not isinstance(data, dict) or not data.get("source") or data.get("tokenizer"):
        return GPTConfig().vocab_size
    return _count(data.get("vocab_size"), DataConfig().vocab_size)


def _count(value: Any, default: int) -> int:
    """Returns a setting's whole number, which may have a unit; the default where it has none, and
    where it is refused."""
    number = whole_number(value, is_bytes=False) if isinstance(value, str) else value
    if isinstance(number, int) and not isinstance(number, bool) and number > 0:
        return number
    return default
