"""The settings of the way from text to token shards."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.functional_validators import BeforeValidator, model_validator

from cluster.settings.setting import Shapes, ShapingSettings, shaping

TOKENS = "tokens://"
"""Prefix in `data.source` of a finished token store's location, whose shards are used as they
are."""

QualityRule = Literal[
    "word_count", "word_length", "symbol_ratio", "line_marks", "alphabetic_words", "stop_words"
]
"""Names of `data.quality_rules`."""

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
"""The name of a text in `data.validation`."""


READ_ENDINGS = (".txt", ".jsonl", ".csv", ".parquet", ".gz", ".zst")
"""Endings of files that are read by themselves."""

TextEnding = Annotated[str, Field(pattern=r"^\.[A-Za-z0-9_+.-]+$")]
"""The ending of files that are read as text."""

Sources = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]
"""Locations of text; a single one may stand without its list."""


class TextConfig(ShapingSettings):
    """The text to read."""

    source: Sources = shaping(
        [],
        "corpus: a path, file://, s3:// or hf://datasets/OWNER/NAME@REVISION URI, or a list of them; "
        "globs allowed; tokens://PATH is a finished token store. Endings: .txt .jsonl .csv .parquet, .gz "
        "and .zst of the first three",
        shapes=Shapes.BY_ITSELF,
    )
    format: Literal["text", "chat"] = shaping(
        "text",
        "text; or chat: conversations as lines of JSON, written by the tokenizer's chat template or a "
        'plain one. A line has messages (a list of {"role": …, "content": …}), ShareGPT\'s '
        "conversations, or a prompt and its completion. The loss counts only the assistant's answers",
        shapes=Shapes.BY_ITSELF,
    )
    text_field: str = shaping(
        "text",
        "field (jsonl) or column (csv, parquet) that holds the text",
        shapes=Shapes.STORE | Shapes.TOKENIZER,
    )
    text_endings: list[TextEnding] = shaping(
        [],
        "further endings of files that are read as text, such as .md .rst .py; also before .gz and .zst",
        shapes=Shapes.BY_ITSELF,
    )

    @model_validator(mode="after")
    def _endings_are_others(self) -> Self:
        if known := [
            ending for ending in self.text_endings if ending.lower().endswith(READ_ENDINGS)
        ]:
            raise ValueError(
                f"text_endings: {known[0]} is read already; name only endings of other files"
            )
        return self


class DataConfig(TextConfig):
    """The way from text to token shards."""

    weights: list[PositiveFloat] = shaping(
        [],
        "share of the training rows from each source, relative to each other; a source that is too small "
        "for its share repeats; by their sizes when empty",
        shapes=Shapes.STORE,
    )
    validation: dict[SetName, str] = shaping(
        {},
        "further texts to validate on, by name; as a flag NAME=SOURCE ...",
        shapes=Shapes.NOTHING,
    )
    tokenizer: str | None = shaping(
        None,
        "tokenizer.json's URI, or its folder's; trained on the corpus when unset",
        shapes=Shapes.BY_ITSELF,
    )
    vocab_size: int = shaping(
        4096, "ids of the trained vocabulary", ge=257, le=1_000_000, shapes=Shapes.TOKENIZER
    )
    normalize: list[Literal["nfc", "lowercase", "collapse_spaces"]] = shaping(
        [],
        "text normalization of a trained tokenizer, recorded in it; GPT-2 has none",
        shapes=Shapes.TOKENIZER,
    )
    tokenizer_sample_bytes: PositiveInt = shaping(
        256 << 20,
        "bytes of text, from places all over the corpus, that the tokenizer is trained on",
        shapes=Shapes.TOKENIZER,
    )
    invalid_utf8: Literal["replace", "skip", "fail"] = shaping(
        "replace",
        "what to do with a document that is not UTF-8: put U+FFFD, drop it, or stop",
        shapes=Shapes.STORE | Shapes.TOKENIZER,
    )
    max_document_bytes: PositiveInt = shaping(
        16 << 20,
        "bytes above which a document is dropped and counted; a longer txt file is cut",
        shapes=Shapes.STORE | Shapes.TOKENIZER,
    )
    max_compression_ratio: float = shaping(
        100.0,
        "a .gz or .zst that unpacks to more than this many times its size is refused",
        gt=1,
        shapes=Shapes.NOTHING,
    )
    max_unreadable_fraction: float = shaping(
        1.0,
        "stop when a larger share of the documents is binary, not UTF-8 or without the text field",
        ge=0,
        le=1,
        shapes=Shapes.NOTHING,
    )
    dedup: bool = shaping(
        True,
        "drop documents whose text occurred before, ignoring case, blanks and Unicode form",
        shapes=Shapes.STORE | Shapes.TOKENIZER,
    )
    near_dedup_threshold: float | None = shaping(
        None,
        "drop documents at least this similar (Jaccard, word 3-grams; from 0.1) to an earlier one, directly "
        "or through a chain",
        ge=0.1,
        le=1,
        shapes=Shapes.STORE,
    )
    quality_rules: list[QualityRule] = shaping(
        [],
        "rules for documents, with Gopher's bounds (Rae et al., 2021)",
        shapes=Shapes.STORE | Shapes.TOKENIZER,
    )
    decontaminate_ngram: int | None = shaping(
        None,
        "drop training documents that share this many words in a row with validation",
        ge=4,
        shapes=Shapes.STORE,
    )
    val_fraction: float = shaping(
        0.05,
        "share of documents held out, chosen by each document's own hash; where there are too few "
        "documents, the end of the text",
        ge=0,
        lt=1,
        shapes=Shapes.STORE,
    )
    val_max_documents: PositiveInt | None = shaping(
        None,
        "hold out a smaller share where val_fraction would hold out more documents than this",
        shapes=Shapes.BY_ITSELF,
    )
    shard_bytes: NonNegativeInt = shaping(
        0,
        "source bytes per shard: the unit of work and of resuming; 16 to 512 MiB, growing with the corpus, when 0",
        shapes=Shapes.STORE,
    )
    selection_task_bytes: PositiveInt = shaping(
        32 << 20,
        "record bytes per deduplication task, of 12 or 20 bytes a record (memory is a few times this); does "
        "not change the result",
        shapes=Shapes.NOTHING,
    )
    forgotten: str | None = shaping(
        None,
        "the run is trained without the documents of this list, as `raymill forget` makes it: the SHA-256 of a file in "
        "the storage's folder forgotten/. It reads the token store that the list is about, whatever became of "
        "data.source",
        pattern=r"^[0-9a-f]{64}$",
        shapes=Shapes.RUN,
    )
    map_documents: bool = shaping(
        False,
        "make the document map of a finished token store that has none: its corpus is read and encoded again, "
        "and has to make the same shards; a new store has one in any case",
        shapes=Shapes.NOTHING,
    )

    @model_validator(mode="after")
    def _one_weight_a_source(self) -> Self:
        if self.weights and len(self.weights) != len(self.source):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.source)} sources; give one a source, or none"
            )
        return self
