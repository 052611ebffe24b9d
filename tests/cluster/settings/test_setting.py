"""What a setting shapes: said of each one of the data and of the training, by itself, and by no
list elsewhere."""

import pytest

from cluster.settings.data import DataConfig, TextConfig
from cluster.settings.setting import Shapes, ShapingSettings, names_shaping, setting, shaping
from cluster.settings.train import TrainConfig

STORE = {
    "weights", "text_field", "invalid_utf8", "max_document_bytes", "dedup", "near_dedup_threshold", "quality_rules",
    "decontaminate_ngram", "val_fraction", "shard_bytes",
}  # fmt: skip
TOKENIZER = {
    "text_field", "vocab_size", "normalize", "tokenizer_sample_bytes", "invalid_utf8", "max_document_bytes", "dedup",
    "quality_rules",
}  # fmt: skip


def test_a_setting_that_does_not_say_what_it_shapes_is_refused() -> None:
    with pytest.raises(TypeError, match="Forgetful: width must say what it shapes"):

        class Forgetful(ShapingSettings):
            depth: int = shaping(3, "layers", shapes=Shapes.RUN)
            width: int = setting(4, "units")

    with pytest.raises(TypeError, match="Bare: width must say"):

        class Bare(ShapingSettings):
            width: int = 4

    with pytest.raises(TypeError, match="shapes"):
        shaping(3, "layers")  # type: ignore[call-arg]


def test_a_branch_inherits_what_its_settings_shape() -> None:
    class Deeper(TextConfig):
        depth: int = shaping(3, "layers", shapes=Shapes.NOTHING)

    assert names_shaping(Deeper, Shapes.STORE) == {"text_field"}


def test_keys_of_stores_and_tokenizers_have_the_settings_that_they_had() -> None:
    """Another name in one of these would move every store that there is."""
    assert names_shaping(DataConfig, Shapes.STORE) == STORE
    assert names_shaping(DataConfig, Shapes.TOKENIZER) == TOKENIZER


def test_a_run_is_resumed_with_the_training_settings_that_it_began_with() -> None:
    free = {"audit_every_steps"}  # no bit depends on it, and an interval may fit other workers
    assert names_shaping(TrainConfig, Shapes.RUN) == TrainConfig.model_fields.keys() - free
