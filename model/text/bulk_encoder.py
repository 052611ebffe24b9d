"""Text to token ids for whole corpora by tiktoken's core: the same ids as `tokenizers`, several
times as fast.

tiktoken has no merges, only ranks: it joins the two neighbors whose joint bytes have the lowest
rank, and takes a piece that is itself a token as it is. That equals BPE by merges for the tokens
that BPE makes from their own bytes: whatever surrounds a token's bytes, they are merged as they
would be alone until the token is made. Any other token is never made and is left out.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from tokenizers import models

from model.text.places import TextPlace
from model.text.token_bytes import byte_of_character
from model.text.tokenizer import END_OF_TEXT, Tokenizer
from raymill.errors import UserError

_PIECES = {
    "gpt-2": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+""",
    "gpt-4": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
    ),
    "qwen": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
    ),
    "gpt-4o": (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"""
    ),
}
"""The known patterns of pieces, which no merge crosses, without the alternatives with which all of
them end.

Each matches every character, and means the same to Oniguruma, which `tokenizers` runs, and to
fancy-regex, which tiktoken runs. On others the two may differ: in \\w, \\b, ^, $, {1,3}+, in sets
of classes, and, ignoring case, in pairs such as ss.
"""
_BLANK_PIECES = r"|\s+(?!\S)|\s+"
"""The alternatives with which all known patterns end."""
_MIXTURE = [
    "The", " quick", "fox", " I", "'m", "'LL", "'ſ", "’s", "don't", "it's", "ß", "ﬁ", "İstanbul", "K", "é",
    "e\u0301", " Γειά", " σου", "Привет", " мир", "سلام", "\u064e", "שלום", "\u05b8", "नमस्ते", "ไทย",
    "한국어", "ㅎ", "東京", "日本語", "、", "0", "7", "42", "2024", "1234567", "²", "½", "Ⅷ", "٣", "३", "0x1f", "{",
    "}", "();", "==", "->", "#", "_", "://", "...", "<endoftext>", "<", " ", " ", "  ", "    ", "\t", "\n",
    "\n\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\u0085", "\u000b", "\u0000", "\u001b", "🙂",
    "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "🇩🇪", "\u200d", "\ufeff", "�", "\U0010ffff",
]  # fmt: skip
"""Pieces of text that are joined in random order, to compare the two."""


class NotExpressibleError(UserError):
    """tiktoken cannot reproduce the ids of this tokenizer; the text is the reason, a phrase."""


class PlainEncoder:
    """`Tokenizer.encode` as an array: correct by definition, and slow."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, place: TextPlace = TextPlace.START) -> npt.NDArray[np.uint32]:
        """Returns ids (N,). Raises `TokenizerError` for a lone surrogate."""
        return np.array(self._tokenizer.encode(text, place), dtype=np.uint32)

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[npt.NDArray[np.uint32]]:
        """Yields the ids of the pieces of one text, in order."""
        for number, piece in enumerate(pieces):
            yield self.encode(piece, TextPlace.INSIDE if number else TextPlace.START)


class BulkEncoder(PlainEncoder):
    """The same ids from tiktoken's core. A document takes a few times its size in memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `NotExpressibleError`."""
        super().__init__(tokenizer)
        if not tokenizer.is_byte_level:
            raise NotExpressibleError("its tokens are not byte-level BPE's")
        content = json.loads(tokenizer.backend.to_str())  # with the defaults filled in
        if any(not added["special"] for added in content["added_tokens"]):
            raise NotExpressibleError("it has added tokens that are not special")
        tokens = _made_tokens(content["model"])
        byte_of = byte_of_character()
        self.encoding = tiktoken.Encoding(
            "bulk",
            pat_str=_pattern(content["pre_tokenizer"]),
            mergeable_ranks={
                bytes(map(byte_of.__getitem__, token)): rank for rank, token in enumerate(tokens)
            },
            # Never allowed, so its text stays text. Without any, tiktoken's search for special
            # tokens stops at every character: 19 MB/s of English instead of 34.
            special_tokens={END_OF_TEXT: len(tokens)},
        )
        self._normalizer = tokenizer.backend.normalizer
        ids = [content["model"]["vocab"][token] for token in tokens]
        self._ids = None if ids == list(range(len(ids))) else np.array(ids, dtype=np.uint32)

    def encode(self, text: str, place: TextPlace = TextPlace.START) -> npt.NDArray[np.uint32]:
        try:
            normal = text if self._normalizer is None else self._normalizer.normalize_str(text)
            ranks = self.encoding.encode_to_numpy(normal, disallowed_special=())
        except ValueError:  # a lone surrogate, or about a million blanks in a row: more than fancy-regex's stack holds
            return super().encode(text, place)
        return ranks if self._ids is None else self._ids[ranks]


def bulk_encoder(
    tokenizer: Tokenizer, *, sample: Sequence[str] = ()
) -> tuple[PlainEncoder, str | None]:
    """Returns a `BulkEncoder` if it gives the ids of `tokenizer` for texts in many scripts, each of
    its tokens and the `sample`; otherwise a `PlainEncoder` and the reason, which the caller reports
    to the user. For 32k ids this takes 0.4 s, of which 0.15 s make the `BulkEncoder`."""
    plain = PlainEncoder(tokenizer)
    try:
        bulk = BulkEncoder(tokenizer)
    except NotExpressibleError as error:
        return plain, str(error)
    for text in (*_proof_texts(tokenizer), *sample):
        ours, theirs = bulk.encode(text), plain.encode(text)
        if not np.array_equal(ours, theirs):
            length = min(len(ours), len(theirs))
            place = int(np.argmax(np.append(ours[:length] != theirs[:length], True)))
            around = tokenizer.decode(theirs[max(place - 5, 0) : place + 5].tolist())
            return plain, f"tiktoken gave other ids than `tokenizers` around {around!r}"
    return bulk, None


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """Returns the regex whose matches are the pieces. Its alternatives without a look-ahead are
    faster as a group: 34 MB/s of English instead of 21."""
    name = known_pieces(pre_tokenizer)
    if name is None:
        raise NotExpressibleError(
            "its pre-tokenizer splits by another pattern than GPT-2's, GPT-4's, GPT-4o's or Qwen's"
        )
    return f"(?:{_PIECES[name]}){_BLANK_PIECES}"


def known_pieces(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Returns by which model's pattern a pre-tokenizer splits: gpt-2, gpt-4, gpt-4o or qwen; None
    for any other."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "gpt-2"
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            names = [name for name, pieces in _PIECES.items() if pattern == pieces + _BLANK_PIECES]
            return names[0] if names else None
    return None


def _made_tokens(model: dict[str, Any]) -> list[str]:
    """Returns the tokens that BPE can make, in ByteLevel's characters: the 256 bytes, then by
    priority."""
    if model["type"] != "BPE":
        raise NotExpressibleError(f"its model is {model['type']}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[option]:
            raise NotExpressibleError(f"its BPE has {option}={model[option]!r}")
    vocab, alphabet = model["vocab"], byte_of_character()
    if missing := [character for character in alphabet if character not in vocab]:
        raise NotExpressibleError(f"{len(missing)} of the 256 bytes are not in its vocabulary")
    bpe = models.BPE(vocab=vocab, merges=[(left, right) for left, right in model["merges"]])
    # Vocabularies converted from tiktoken list every way to split a token, one after the other.
    merged = [token for token, _ in groupby(left + right for left, right in model["merges"])]
    if len(set(merged)) < len(merged):
        raise NotExpressibleError("its merges make one token at two priorities")
    made = [token for token in merged if [part.value for part in bpe.tokenize(token)] == [token]]
    tokens = [*alphabet, *(token for token in made if alphabet.keys() >= set(token))]
    if model["ignore_merges"] and len(tokens) < len(vocab):
        raise NotExpressibleError("its BPE has ignore_merges and tokens that merges do not make")
    return tokens


def _proof_texts(tokenizer: Tokenizer) -> list[str]:
    """Returns every character up to U+33FF and every 16th up to U+1FFFF, each token as a line, and
    a mixture."""
    characters = [*range(0x3400), *range(0x3400, 0xD800, 16), *range(0xE000, 0x20000, 16)]
    ids = sorted(tokenizer.backend.get_vocab(with_added_tokens=False).values())
    tokens = (tokenizer.decode([token_id]) for token_id in ids)
    mixture = random.Random(0).choices(_MIXTURE, k=20_000)
    return ["".join(map(chr, characters)), "\n".join(tokens), "".join(mixture)]
