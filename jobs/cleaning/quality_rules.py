"""The quality rules of Gopher (Rae et al., 2021, appendix A.1), each with its published bounds."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import islice

from cluster.settings.data import QualityRule
from jobs.corpus.documents import Drop

_ELLIPSES = ("...", "…")
_BULLETS = ("•", "‣", "◦", "●", "▪", "-", "*")
_LETTER = re.compile(r"[^\W\d_]")
_STOP_WORDS = re.compile(r"\b(?:the|be|to|of|and|that|have|with)\b", re.IGNORECASE)

_WORDS = range(50, 100_001)
_LEAST_WORD_LENGTH, _MOST_WORD_LENGTH = 3, 10  # mean, characters
_MOST_SYMBOLS_A_WORD = 0.1
_MOST_BULLET_LINES, _MOST_ELLIPSIS_LINES = 0.9, 0.3
_LEAST_ALPHABETIC = 0.8
_LEAST_STOP_WORDS = 2


def failed_rule(text: str, rules: Sequence[QualityRule]) -> Drop | None:
    """Returns the first of the rules that the text fails, as the reason to drop it.

    `word_count` and `stop_words` are for English: the first counts the words between blanks, which
    Chinese, Japanese and Thai do not use; the second looks for English words.
    """
    words = text.split() if rules else []
    return next((Drop(rule) for rule in rules if not _PASSES[rule](text, words)), None)


def _word_count(text: str, words: list[str]) -> bool:
    return len(words) in _WORDS


def _word_length(text: str, words: list[str]) -> bool:
    letters = sum(map(len, words))
    return _LEAST_WORD_LENGTH * len(words) <= letters <= _MOST_WORD_LENGTH * len(words)


def _symbol_ratio(text: str, words: list[str]) -> bool:
    """Hash signs and ellipses are counted separately."""
    most = _MOST_SYMBOLS_A_WORD * len(words)
    return text.count("#") <= most and sum(map(text.count, _ELLIPSES)) <= most


def _line_marks(text: str, words: list[str]) -> bool:
    """Empty lines do not count."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    bullets = sum(line.startswith(_BULLETS) for line in lines)
    ellipses = sum(line.endswith(_ELLIPSES) for line in lines)
    few_bullets = bullets <= _MOST_BULLET_LINES * len(lines)
    few_ellipses = ellipses <= _MOST_ELLIPSIS_LINES * len(lines)
    return few_bullets and few_ellipses


def _alphabetic_words(text: str, words: list[str]) -> bool:
    missing = math.ceil(_LEAST_ALPHABETIC * len(words)) - sum(map(str.isalpha, words))
    mixed = (word for word in words if not word.isalpha() and _LETTER.search(word))
    # Looks no further than necessary
    return missing <= sum(1 for _ in islice(mixed, max(0, missing)))


def _stop_words(text: str, words: list[str]) -> bool:
    different = set()  # in either case
    for match in _STOP_WORDS.finditer(text):
        different.add(match[0].lower())
        if len(different) == _LEAST_STOP_WORDS:
            return True
    return False


_PASSES: dict[QualityRule, Callable[[str, list[str]], bool]] = {
    "word_count": _word_count,
    "word_length": _word_length,
    "symbol_ratio": _symbol_ratio,
    "line_marks": _line_marks,
    "alphabetic_words": _alphabetic_words,
    "stop_words": _stop_words,
}
