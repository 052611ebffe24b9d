"""Small tokenizers of each kind that models have, as the libraries that made those write them."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

_TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "A quick fox says: the dog is lazy, and it jumps!",
    "user assistant system question answer hello world",
    "Hello there, what is the answer? The answer is a word.",
] * 8
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_FROM_MARK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_FUSE, _BYTE_FALLBACK = {"type": "Fuse"}, {"type": "ByteFallback"}


def _sequence(members: str, *steps: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", members: [*steps]}


def _metaspace(scheme: str, *, split: bool) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": (
        "BPE",
        {
            "normalizer": _sequence("normalizers", _PREPEND, _TO_MARK),
            "pre_tokenizer": None,
            "decoder": _sequence("decoders", _FROM_MARK, _BYTE_FALLBACK, _FUSE, _STRIP),
        },
    ),
    "mistral": (
        "BPE",
        {
            "normalizer": None,
            "pre_tokenizer": _metaspace("first", split=False),
            "decoder": _sequence("decoders", _FROM_MARK, _BYTE_FALLBACK, _FUSE, _STRIP),
        },
    ),
    "gemma": (
        "BPE",
        {
            "normalizer": _TO_MARK,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            },
            "decoder": _sequence("decoders", _FROM_MARK, _BYTE_FALLBACK, _FUSE),
        },
    ),
    "unigram": (
        "Unigram",
        {
            "normalizer": None,
            "pre_tokenizer": _metaspace("always", split=True),
            "decoder": _metaspace("always", split=True),
        },
    ),
    "wordpiece": (
        "WordPiece",
        {
            "normalizer": None,
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        },
    ),
}
KINDS = tuple(_KINDS)
SPECIALS = ("<unk>", "<s>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n"
    "{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""As Phi-3's, whose special tokens take the blanks after them."""


@functools.cache  # some trainers are not deterministic
def tokenizer_json(kind: str) -> bytes:
    """Returns the tokenizer.json of a kind, indented as the library writes it. `<eos>` ends a text,
    and `<s>` begins it."""
    model, parts = _KINDS[kind]
    backend = _trained(model)
    content = json.loads(backend.to_str()) | parts
    content["added_tokens"] = [
        {**added, "rstrip": added["content"].startswith("<|")}
        for added in content["added_tokens"]
        if added["content"] not in _BYTES
    ]
    if model == "BPE":
        content["model"] |= {"byte_fallback": True, "fuse_unk": True}
    begin = content["model"]["vocab"]["<s>"] if model != "Unigram" else SPECIALS.index("<s>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}},
    }
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def _trained(model: str) -> Tokenizer:
    specials = [*SPECIALS]
    match model:
        case "BPE":
            backend = Tokenizer(models.BPE(unk_token="<unk>"))
            trainer: Any = trainers.BpeTrainer(
                vocab_size=480, special_tokens=specials + _BYTES, show_progress=False
            )
        case "Unigram":
            backend = Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(
                vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False
            )
        case _:
            backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
            trainer = trainers.WordPieceTrainer(
                vocab_size=160, special_tokens=specials, show_progress=False
            )
    is_words = model == "WordPiece"
    splits = pre_tokenizers.BertPreTokenizer() if is_words else pre_tokenizers.Metaspace()
    backend.pre_tokenizer = splits
    backend.train_from_iterator(_TEXTS, trainer)
    return backend
