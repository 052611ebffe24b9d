"""One dial sets the shape and the training by published rules, and whatever is set by itself
stays."""

from typing import Any

import pytest

from cluster.settings import recipe
from cluster.settings.flags import validate_config
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, batch_schedule, seq_len, to_yaml, warmup_tokens


def run(model: dict[str, Any], **branches: Any) -> RunConfig:
    return validate_config({"model": model} | branches, RunConfig)


@pytest.mark.parametrize("depth", [1, 2, 4, 12, 24, 48])
def test_depth__sets_a_run_that_fits_together(depth: int) -> None:
    config = run({"depth": depth})
    shape, train = config.model, config.train
    assert (shape.n_layer, shape.n_head, shape.n_embd) == (depth, depth, 64 * depth)
    assert train.optimizer == "muon"
    assert train.max_tokens == 20 * shape.num_parameters
    assert train.warmup_tokens == warmup_tokens(config) == min(375_000_000, train.max_tokens // 50)
    flops = recipe.run_flops(shape, seq_len(config), train.max_tokens)
    assert train.learning_rate == pytest.approx(0.3118 * flops**-0.125, rel=0.01)
    schedule = batch_schedule(config)
    step_tokens = schedule.step_tokens(schedule.max_steps)
    least = config.scaling.max_workers * train.lane_size * seq_len(config)
    assert step_tokens == least or 0.7 < step_tokens / recipe.batch_tokens(flops) < 1.42
    assert schedule.max_steps > 50


def test_rules__are_those_of_their_sources() -> None:
    """DeepSeek LLM gives its formulas for a budget in FLOPs; at 1e20 they give 0.000986 and 1.03M
    tokens."""
    assert recipe.learning_rate(1e20) == pytest.approx(0.3118 * 10**-2.5, rel=1e-3)
    assert recipe.batch_tokens(1e20) == pytest.approx(0.2920 * 10**6.542, rel=1e-9)
    config = run({"depth": 12})
    assert recipe.run_flops(config.model, 1024, 1) == 72 * 12 * 768**2 + 12 * 12 * 768 * 1024


def test_what_is_set_by_itself__stays_and_the_rest_follows_it() -> None:
    usual = run({"depth": 8})
    train = {"max_tokens": "10M", "optimizer": "adamw"}
    config = run({"depth": "8", "n_embd": 256, "n_positions": 128}, train=train)
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (8, 4, 256)
    assert config.train.max_tokens == 10_000_000
    assert config.train.optimizer == "adamw"
    assert config.train.learning_rate > usual.train.learning_rate, "a smaller budget"
    assert config.train.global_batch_size * 128 < usual.train.global_batch_size * 1024
    fixed = run({"depth": 8}, train={"learning_rate": 1e-4, "global_batch_size": 24})
    assert (fixed.train.learning_rate, fixed.train.global_batch_size) == (1e-4, 24)


def test_the_vocabulary__is_that_of_the_tokenizer_to_train() -> None:
    data = {"source": ["a.txt"], "vocab_size": 1024}
    small, usual = run({"depth": 4}, data=data), run({"depth": 4})
    fewer = (50257 - 1024) * 256
    assert usual.train.max_tokens - small.train.max_tokens == 20 * fewer


def test_the_batch__has_a_lane_for_each_worker() -> None:
    config = run({"depth": 1}, scaling={"max_workers": 6})
    assert batch_schedule(config).full_lanes >= 6


def test_a_run_has_the_numbers_and_no_dial(tmp_path: Any) -> None:
    """So a resume compares what was trained with, and rules may change."""
    text = to_yaml(run({"depth": 3}))
    assert "depth" not in text
    assert "n_layer: 3" in text


@pytest.mark.parametrize("depth", [0, -3, "deep", 1.5, True, 10_001])
def test_no_depth__is_refused_in_words(depth: object) -> None:
    with pytest.raises(ConfigError, match=r"model\.depth is .*, expected a number of layers"):
        run({"depth": depth})


def test_a_preset_beside_it__is_refused() -> None:
    with pytest.raises(ConfigError, match="both say what the shape is"):
        run({"depth": 4, "preset": "tiny"})


def test_a_shape_that_does_not_fit__is_refused_as_without_a_depth() -> None:
    with pytest.raises(ConfigError, match="n_head"):
        run({"depth": 4, "n_head": 7})
