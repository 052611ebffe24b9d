"""A prompt that no validation could continue is named before anything is tokenized or trained."""

from pathlib import Path

import pytest

from cluster.settings.parser import ConfigError
from jobs.pretrain import pretrain
from jobs.training.validation import check_prompts, samples
from model.text.tokenizer import Tokenizer
from tests.jobs.runs import tiny_plan
from tests.model.small_models import small_model


@pytest.mark.parametrize(
    ("prompt", "num_tokens"), [("", 0), ("\x00" * 48, 48), ("\x00" * 100, 100)]
)
def test_a_prompt_without_a_token_or_as_long_as_the_context(
    tmp_path: Path, prompt: str, num_tokens: int
) -> None:
    plan = tiny_plan(
        str(tmp_path),
        train={"sample_prompts": ["fine", prompt]},
        data={"source": f"{tmp_path}/none"},
    )
    data = plan.config.data.model_copy(update={"tokenizer": plan.tokens_uri})
    with pytest.raises(ConfigError, match=rf"{num_tokens} tokens, expected 1 to 47.*context of 48"):
        pretrain(plan.config.model_copy(update={"data": data}))


def test_the_longest_prompt_is_continued(tmp_path: Path) -> None:
    plan = tiny_plan(str(tmp_path), train={"sample_prompts": ["\x00" * 47, "\x00"]})
    tokenizer = Tokenizer.from_json(plan.tokenizer_json)
    check_prompts(plan.config, tokenizer)
    model = small_model(vocab_size=tokenizer.vocab_size, n_positions=48)
    assert [sample["prompt"] for sample in samples(model, tokenizer, plan.config.train)] == [
        "\x00" * 47,
        "\x00",
    ]
