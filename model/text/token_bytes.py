"""The bytes that a token adds to a text, by the decoder of its tokenizer.

A text is the bytes of its tokens, one after the other, so that tokens become text as they arrive; a
character may be of several. A decoder for which that is not so is refused.
"""

import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from model.text.places import Step, steps_of
from raymill.errors import UserError

_BEFORE = "a"
"""A token before the one that is looked at."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_OF_ONE_TOKEN = frozenset(("Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip"))
"""Decoders that change each token by itself, the first one perhaps otherwise."""


class TokenizerError(UserError):
    """A tokenizer cannot be computed token by token, has no end-of-text token, or can't map a text
    or an id."""


class TokenBytes:
    """The bytes of each token of a tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, content: Mapping[str, Any]) -> None:
        """Raises `TokenizerError`, naming the decoder."""
        self._backend = backend
        steps = steps_of(content.get("decoder"), "decoders")
        kinds = [step["type"] for step in steps]
        self.is_byte_level = kinds == ["ByteLevel"]
        if not self.is_byte_level:
            _require_one_by_one(steps)
        self._has_byte_tokens = "ByteFallback" in kinds
        self._added: dict[int, bytes] = {}
        for added in content.get("added_tokens") or []:
            # Of others a decoder may change the text
            if added["special"] or self.is_byte_level:
                self._added[added["id"]] = added["content"].encode()
        self._known: dict[int, bytes] = {}
        self.num_ids = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def of(self, token_id: int) -> bytes:
        """Returns what a token adds to a text that has begun. Raises `TokenizerError`."""
        if (known := self._known.get(token_id)) is not None:
            return known
        token = self._token(token_id)
        if (added := self._added.get(token_id)) is not None:
            content = added
        elif self.is_byte_level:
            content = _of_byte_level(token)
        elif self._has_byte_tokens and (byte := _BYTE.fullmatch(token)):
            content = bytes.fromhex(byte[1])
        else:
            alone = self._decoded(_BEFORE)
            content = self._decoded(_BEFORE, token).removeprefix(alone).encode()
        self._known[token_id] = content
        return content

    def of_first(self, token_id: int) -> bytes:
        """Returns what a token adds where no text is before it: perhaps a blank less. Raises
        `TokenizerError`."""
        content = self.of(token_id)
        if self.is_byte_level or token_id in self._added:
            return content
        token = self._token(token_id)
        decoded = self._decoded(token)
        is_byte = self._has_byte_tokens and bool(_BYTE.fullmatch(token))
        return content if is_byte and decoded else decoded.encode()

    def _token(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise TokenizerError(
                f"token id {token_id} is not in the vocabulary, which has {self.num_ids} ids"
            )
        return token

    def _decoded(self, *tokens: str) -> str:
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode([*tokens])


def _require_one_by_one(steps: list[Step]) -> None:
    """Raises `TokenizerError` where the text of tokens is not the tokens' texts, one after the
    other."""
    is_joined = False
    for step in steps:
        kind = step["type"]
        is_short = kind == "Strip" and step.get("start", 0) <= 1 and not step.get("stop", 0)
        if kind == "Fuse":
            is_joined = True
        elif kind not in _OF_ONE_TOKEN or not (is_short or kind != "Strip"):
            raise _refused(kind, "which makes a token's text depend on other tokens")
        elif is_joined and kind != "Strip":
            raise _refused(kind, "which comes after Fuse, and so sees several tokens as one")


def _refused(kind: str, why: str) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer's decoder has {kind}, {why}: text could not be given out token by token; expected ByteLevel, "
        "or Replace, ByteFallback, Metaspace, WordPiece or Strip(start=1), and then Fuse"
    )


def _of_byte_level(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))
    except KeyError:
        return token.encode()


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


_BYTE_OF_CHARACTER = byte_of_character()
