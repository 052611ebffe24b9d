"""Byte-level BPE: text to token ids and back without loss, and training a vocabulary.

Any text has ids and any id has bytes. The end-of-text token ends documents; the text
`<|endoftext|>` that a user or a document wrote is not special and is encoded as its letters.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from model.errors import UserError
from model.text.chat_format import ChatFormat

END_OF_TEXT = "<|endoftext|>"
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>")
"""Ours and GPT-2's, and what other byte-level tokenizers call it."""

NORMALIZERS: dict[str, normalizers.Normalizer] = {
    "nfc": normalizers.NFC(),
    "lowercase": normalizers.Lowercase(),
    "collapse_spaces": normalizers.Replace(tokenizers.Regex(r"[ \t]+"), " "),
}
"""The steps that `data.normalize` names; they run in the given order and are recorded in
tokenizer.json."""


class TokenizerError(UserError):
    """A tokenizer is not byte-level BPE with an end-of-text token, or can't map a text or an id."""


@dataclass(frozen=True)
class PromptEncoding:
    """How the text of a prompt becomes ids."""

    add_special_tokens: bool = True  # it begins with BOS, where the tokenizer has one
    parse_special: bool = False  # a special token's text is that token, and not its letters


PLAIN_ENCODING = PromptEncoding()
"""After BOS, and special tokens are the letters of their names."""


class Tokenizer:
    """Encodes and decodes with the content of a tokenizer.json. That content, in canonical form, is
    its identity."""

    def __init__(self, content: dict[str, Any], chat: ChatFormat | None = None) -> None:
        try:
            self.backend = tokenizers.Tokenizer.from_str(json.dumps(content))  # to be read only
        except Exception as error:  # the library's parser raises no narrower class
            raise TokenizerError(f"tokenizer.json does not load: {error}") from error
        pieces = [(content.get(part) or {}).get("type") for part in ("model", "decoder")]
        if pieces != ["BPE", "ByteLevel"]:
            raise TokenizerError(
                f"the tokenizer's model and decoder are {pieces[0]} and {pieces[1]}, expected BPE and ByteLevel as in "
                "GPT-2's: others can't represent every text"
            )
        ends = [
            (end, token_id)
            for end in _ENDS_OF_TEXT
            if (token_id := self.backend.token_to_id(end)) is not None
        ]
        if not ends:
            raise TokenizerError(
                f"the tokenizer has no {END_OF_TEXT} token, which ends each document; add it"
            )
        self.end_of_text, self.eot_id = ends[0]
        self._content, self.chat = content, chat
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # as the text that they are

    @classmethod
    def from_json(cls, content: bytes, chat: ChatFormat | None = None) -> Self:
        try:
            return cls(json.loads(content), chat)
        except ValueError as error:
            raise TokenizerError(f"tokenizer.json is not JSON: {error}") from error

    def to_json(self) -> bytes:
        """Returns the canonical tokenizer.json: keys sorted, no spaces, UTF-8."""
        return json.dumps(
            self._content, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()

    @cached_property
    def hash(self) -> str:
        """The SHA-256, in hex, of the canonical tokenizer.json."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes_of_id) + 1

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token."""
        special = {
            added["content"]: added["id"]
            for added in self._content["added_tokens"]
            if added["special"]
        }
        return special | {self.end_of_text: self.eot_id}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Splits a text into texts and, between them, the names of special tokens."""
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    @cached_property
    def bos_id(self) -> int | None:
        """The token that the tokenizer's post-processor puts before a text, as Llama 3's does; most
        have none."""
        text, whole = (
            self.backend.encode("a", add_special_tokens=added).ids for added in (False, True)
        )
        front = whole[: whole.index(text[0])]
        if len(front) > 1:
            raise TokenizerError(
                f"tokenizer.json puts {len(front)} tokens before each text, expected one (BOS) or none"
            )
        return front[0] if front else None

    @property
    def start_id(self) -> int:
        """The token with which a document begins: BOS, or without one, the end-of-text token of the
        document before."""
        return self.eot_id if self.bos_id is None else self.bos_id

    def encode_whole(self, text: str) -> list[int]:
        """Returns the ids of a whole text, or of its front: after BOS, where the tokenizer has
        one."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def encode_prompt(self, text: str, how: PromptEncoding) -> list[int]:
        """Returns the ids of a prompt. One that writes BOS itself, as chat templates do, gets no
        second one."""
        ids = self._parsed(text) if how.parse_special else self.encode(text)
        if not how.add_special_tokens or self.bos_id is None:
            return ids
        writes_bos = how.parse_special and ids[:1] == [self.bos_id]
        return ids if writes_bos else [self.bos_id, *ids]

    def encode(self, text: str) -> list[int]:
        return self._encoded([text])[0]

    def _parsed(self, text: str) -> list[int]:
        """Returns the ids of a text in which the text of a special token stands for the token."""
        pieces = self.special_pattern.split(text)
        texts, names = pieces[::2], pieces[1::2]
        ids: list[int] = []
        for number, text_ids in enumerate(self._encoded(texts)):
            ids += text_ids
            if number < len(names):
                ids.append(self.special_ids[names[number]])
        return ids

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        try:  # as a batch, which computes no offsets
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:
            raise TokenizerError(
                "the text holds a lone surrogate, which no UTF-8 text can; remove it"
            ) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Inverts `encode` up to the tokenizer's normalization; bytes that are not UTF-8 become
        U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns a token's bytes, which may be only a part of a character."""
        if token_id not in self._bytes_of_id:
            raise TokenizerError(
                f"token id {token_id} is not in the vocabulary, which has {self.vocab_size} ids"
            )
        return self._bytes_of_id[token_id]

    @cached_property
    def _bytes_of_id(self) -> dict[int, bytes]:
        byte_of = byte_of_character()
        table = {
            token_id: bytes(byte_of[character] for character in token)
            for token, token_id in self.backend.get_vocab(with_added_tokens=False).items()
            if token != self.end_of_text
        }
        return table | {
            added["id"]: added["content"].encode() for added in self._content["added_tokens"]
        }


def byte_of_character() -> dict[str, int]:
    """Returns the inverse of GPT-2's code of bytes as printable characters (`bytes_to_unicode` in
    its release): a printable Latin-1 character stands for itself, the other 68 bytes are the
    characters from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def train_bpe(texts: Iterable[str], *, vocab_size: int, normalize: Sequence[str] = ()) -> Tokenizer:
    """Trains a tokenizer with ids as in GPT-2: 0 … 255 the bytes, then the merges in order,
    `<|endoftext|>` last.

    The same texts give the same tokenizer, in any order and on any number of threads. Texts with
    too few merges for `vocab_size` give a smaller vocabulary.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    if normalize:
        backend.normalizer = normalizers.Sequence([NORMALIZERS[name] for name in normalize])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(texts, trainer)
    return _byte_level(backend)


def from_gpt2_files(encoder: Path, merges: Path) -> Tokenizer:
    """Makes a tokenizer from GPT-2's `encoder.json` and `vocab.bpe`, Hugging Face's vocab.json and
    merges.txt."""
    return _byte_level(tokenizers.Tokenizer(models.BPE.from_file(str(encoder), str(merges))))


def chat_format(read: Callable[[str], bytes | None]) -> ChatFormat | None:
    """Returns the chat template beside a tokenizer.json, from what `read` gives of a file by its
    name, or None."""
    values = json.loads(read("tokenizer_config.json") or b"{}")
    template = (read("chat_template.jinja") or b"").decode() or values.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if not template:
        return None
    bos, eos = (values.get(name) or "" for name in ("bos_token", "eos_token"))
    return ChatFormat(
        template, *(token["content"] if isinstance(token, dict) else token for token in (bos, eos))
    )


def _byte_level(backend: tokenizers.Tokenizer) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])  # gets the id after the last one, or keeps its own
    return Tokenizer(json.loads(backend.to_str()))
