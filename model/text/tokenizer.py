"""Text to token ids and back, by any tokenizer.json, and training a vocabulary of byte-level BPE.

Of a byte-level tokenizer any text has ids, without loss; of others, what they know. The end-of-text
token ends documents; the text `<|endoftext|>` that a user or a document wrote is not special and is
encoded as its letters.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from model.text.chat_format import ChatFormat
from model.text.places import TextPlace, content_at, steps_of
from model.text.token_bytes import TokenBytes, TokenizerError

END_OF_TEXT = "<|endoftext|>"
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>")
"""Ours and GPT-2's, and what other tokenizers call it."""

_NAME_OF_END = re.compile(
    r"[<\[][|｜]?(eos|eot|end[ _▁]?of[ _▁]?(text|sentence|document|sequence))(_token)?[|｜]?[>\]]",
    re.IGNORECASE,
)
"""A special token that says so by its name: Gemma's `<eos>`, DeepSeek's, Cohere's."""

NORMALIZERS: dict[str, normalizers.Normalizer] = {
    "nfc": normalizers.NFC(),
    "lowercase": normalizers.Lowercase(),
    "collapse_spaces": normalizers.Replace(tokenizers.Regex(r"[ \t]+"), " "),
}
"""The steps that `data.normalize` names; they run in the given order and are recorded in
tokenizer.json."""


@dataclass(frozen=True)
class PromptEncoding:
    """How the text of a prompt becomes ids."""

    add_special_tokens: bool = True  # it begins with BOS, where the tokenizer has one
    parse_special: bool = False  # a special token's text is that token, and not its letters


PLAIN_ENCODING = PromptEncoding()
"""After BOS, and special tokens are the letters of their names."""


class Tokenizer:
    """Encodes and decodes with the content of a tokenizer.json, which is its identity: in canonical
    form for byte-level BPE, as it was stored for others."""

    def __init__(
        self,
        content: dict[str, Any],
        chat: ChatFormat | None = None,
        *,
        stored: bytes | None = None,
    ) -> None:
        """`stored` is the file that has the content. Raises `TokenizerError`."""
        self.backend = _backend(content)  # to be read only
        kinds = [(content.get(part) or {}).get("type") for part in ("model", "decoder")]
        self._stored = None if kinds == ["BPE", "ByteLevel"] else stored
        self._token_bytes = TokenBytes(self.backend, content)
        self._require_way_back(content)
        self.end_of_text, self.eot_id = _end_of_text(self.backend, content)
        self._content, self.chat = content, chat
        self._backends = {TextPlace.START: self.backend}

    @classmethod
    def from_json(cls, content: bytes, chat: ChatFormat | None = None) -> Self:
        try:
            return cls(json.loads(content), chat, stored=content)
        except ValueError as error:
            raise TokenizerError(f"tokenizer.json is not JSON: {error}") from error

    def to_json(self) -> bytes:
        """Returns the tokenizer.json: canonical (keys sorted, no spaces, UTF-8) for byte-level BPE,
        else the bytes that it was read from."""
        if self._stored is not None:
            return self._stored
        return json.dumps(
            self._content, sort_keys=True, separators=(",", ":"), ensure_ascii=False
        ).encode()

    @property
    def is_byte_level(self) -> bool:
        """Whether its tokens are bytes, so that any text has ids without loss."""
        return self._token_bytes.is_byte_level

    @cached_property
    def hash(self) -> str:
        """The SHA-256, in hex, of `to_json`."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._token_bytes.num_ids

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token."""
        special = {added["content"]: added["id"] for added in self._special_tokens}
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
        front = whole[: whole.index(text[0])] if text else []
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

    def encode(self, text: str, place: TextPlace = TextPlace.START) -> list[int]:
        """Returns the ids of a text, or of a piece of one that stands at `place`."""
        return self._encoded([text], place)[0]

    def segments(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yields the texts between the names of special tokens, each with the token that follows
        it, the last with None. Some tokens take the blanks beside them."""
        start, takes_blanks = 0, False
        for match in self.special_pattern.finditer(text):
            piece = text[start : match.start()]
            piece = piece.lstrip() if takes_blanks else piece
            yield (
                piece.rstrip() if match[0] in self._takes_left else piece,
                self.special_ids[match[0]],
            )
            start, takes_blanks = match.end(), match[0] in self._takes_right
        yield text[start:].lstrip() if takes_blanks else text[start:], None

    def place_after(self, text: str) -> TextPlace:
        """Returns where that stands which follows a text."""
        if not text:
            return TextPlace.START
        *_, (rest, _) = self.segments(text)
        return TextPlace.INSIDE if rest else TextPlace.AFTER_SPECIAL

    def _parsed(self, text: str) -> list[int]:
        """Returns the ids of a text in which the text of a special token stands for the token."""
        segments = [*self.segments(text)]
        texts = [piece for piece, _ in segments]
        encoded = self._encoded(texts[:1], TextPlace.START)
        encoded += self._encoded(texts[1:], TextPlace.AFTER_SPECIAL)
        ids: list[int] = []
        for text_ids, (_, special_id) in zip(encoded, segments, strict=True):
            ids += text_ids
            if special_id is not None:
                ids.append(special_id)
        return ids

    def _encoded(self, texts: Sequence[str], place: TextPlace) -> list[list[int]]:
        try:  # as a batch, which computes no offsets
            encodings = self._backend_at(place).encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:
            raise TokenizerError(
                "the text holds a lone surrogate, which no UTF-8 text can; remove it"
            ) from error
        if self.is_byte_level:
            return [encoding.ids for encoding in encodings]
        return [
            encoding.ids
            if self._control_ids.isdisjoint(encoding.ids)
            else self._in_letters(text, place)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _in_letters(self, text: str, place: TextPlace) -> list[int]:
        """Returns the ids of a text that has the name of a special token, which a vocabulary with
        scores would take as a word of it: cut within each name."""
        cuts = [match.start() + 1 for match in self.special_pattern.finditer(text)]
        ids: list[int] = []
        for start, end in pairwise([0, *cuts, len(text)]):
            backend = self._backend_at(TextPlace.INSIDE if start else place)
            ids += backend.encode(text[start:end], add_special_tokens=False).ids
        return ids

    @cached_property
    def _control_ids(self) -> set[int]:
        """The special tokens that no text may become: all but the one for what is not known."""
        model = self._content["model"]
        unknown = self.backend.token_to_id(model.get("unk_token") or "")
        return {*self.special_ids.values()} - {unknown, model.get("unk_id")}

    def _backend_at(self, place: TextPlace) -> tokenizers.Tokenizer:
        if place not in self._backends:
            content = content_at(place, self._content)
            is_same = content == self._content
            self._backends[place] = self.backend if is_same else _backend(content)
        return self._backends[place]

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """Inverts `encode` up to the tokenizer's normalization; bytes that are not UTF-8 become
        U+FFFD. With `continues` a text is before it, whose blank the first token may bring."""
        pieces = [self.token_bytes(token_id) for token_id in ids]
        if pieces and not continues:
            pieces[0] = self.first_bytes(ids[0])
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns what a token adds to a text that has begun: perhaps a part of a character."""
        return self._token_bytes.of(token_id)

    def first_bytes(self, token_id: int) -> bytes:
        """Returns what a token adds where no text is before it."""
        return self._token_bytes.of_first(token_id)

    @cached_property
    def _special_tokens(self) -> list[dict[str, Any]]:
        return [added for added in self._content.get("added_tokens") or [] if added["special"]]

    @cached_property
    def _takes_left(self) -> set[str]:
        """The special tokens that take the blanks before them."""
        return {added["content"] for added in self._special_tokens if added.get("lstrip")}

    @cached_property
    def _takes_right(self) -> set[str]:
        return {added["content"] for added in self._special_tokens if added.get("rstrip")}

    def _require_way_back(self, content: dict[str, Any]) -> None:
        """Raises `TokenizerError` where bytes are written as characters that nothing reads."""
        steps = steps_of(content.get("pre_tokenizer"), "pretokenizers")
        steps += steps_of(content.get("normalizer"), "normalizers")
        if not self.is_byte_level and any(step["type"] == "ByteLevel" for step in steps):
            raise TokenizerError(
                "the tokenizer writes bytes as ByteLevel's characters, but its decoder does not read them; expected "
                'the decoder {"type": "ByteLevel"} in tokenizer.json'
            )


def _backend(content: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library's parser raises no narrower class
        raise TokenizerError(f"tokenizer.json does not load: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # as the text that they are
    return backend


def _end_of_text(backend: tokenizers.Tokenizer, content: dict[str, Any]) -> tuple[str, int]:
    """Returns the token that ends a document, and its id."""
    added = [token["content"] for token in content.get("added_tokens") or [] if token["special"]]
    named = [name for name in added if _NAME_OF_END.fullmatch(name)]
    for name in (*_ENDS_OF_TEXT, *named):
        if (token_id := backend.token_to_id(name)) is not None:
            return name, token_id
    raise TokenizerError(
        f"the tokenizer has no {END_OF_TEXT} token, which ends each document, nor a special one of such a name, as "
        "</s> or <eos>; add it"
    )


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
