"""A tokenizer's tokens as `llguidance` needs them: the bytes that each adds to a text."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.files.stored_tokenizer import load_tokenizer
from model.tables import pip_line
from model.text.places import TextPlace
from model.text.token_bytes import TokenizerError
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from serving.structured.grammar import GrammarError
from serving.structured.number_mask import DigitTokens

_PRINTABLE = [bytes([code]) for code in range(ord(" "), ord("~") + 1)]
"""Every text of JSON can be written with these characters alone."""


class Vocabulary:
    """The tokens of one checkpoint, as a tree of their bytes: 40 ms for 50,000 of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `GrammarError` for a tokenizer that cannot write every text, token by token."""
        tokens = [_bytes_of(tokenizer, token_id) for token_id in range(tokenizer.vocab_size)]
        _require_all_characters(tokens)
        self.eos_id = tokenizer.eot_id
        self.digits = DigitTokens(tokens)
        self._words = _TokenWords(tokenizer, tokens)
        self.tree = library().LLTokenizer(self._words)
        self._words.tree = self.tree


class _TokenWords:
    """The interface that `llguidance` expects of a tokenizer in Python."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[bytes]) -> None:
        self.eos_token_id = tokenizer.eot_id
        self.tokens = tokens
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self.tree: Any = None
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns the tokens with which the model would write a text that its grammar leaves no
        choice about."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        ids = self._tokenizer.encode(text, TextPlace.INSIDE)
        if b"".join(self.tokens[token_id] for token_id in ids) == text.encode():
            return ids
        return list(self.tree.greedy_tokenize(text))  # its normalizer changes the text


def vocabulary_of(folder: Path) -> Vocabulary:
    """Returns the vocabulary of a checkpoint with a tokenizer. Raises `UserError`, and
    `GrammarError` as `Vocabulary`."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None, "the replica has read it too"
    return Vocabulary(tokenizer)


def library() -> Any:
    """Returns `llguidance`, which is optional. Raises `UserError`."""
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise UserError(
            f"{error}: `{pip_line('structured')}` brings what makes answers follow a schema"
        ) from None


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Returns what a token adds to a text that has begun; nothing for an id without a token."""
    try:
        return tokenizer.token_bytes(token_id)
    except TokenizerError:
        return b""


def _require_all_characters(tokens: Sequence[bytes]) -> None:
    """Raises `GrammarError` where a grammar could ask for a character that no token begins with."""
    known = set(tokens)
    missing = [character.decode() for character in _PRINTABLE if character not in known]
    if missing:
        example = "{" if "{" in missing else missing[0]
        raise GrammarError(
            f"this model's tokenizer has no token for {len(missing)} of the characters that JSON is written with "
            f"(such as {example!r}) where no blank is before it, so no answer can be made to follow a schema"
        )
