"""Why a document is not in the token store, as far as it tells by itself, and the numbers by which
indexes store that.

Everybody who has to know asks here: the index, the tokenizer's training, and whoever looks for a
document that is missing.
"""

from cluster.settings.data import DataConfig
from jobs.cleaning.quality_rules import failed_rule
from jobs.corpus.documents import Document, Drop
from jobs.corpus.listing import CorpusError


def why_dropped(document: Document, data: DataConfig) -> Drop | None:
    """Returns the reason to drop a document, which depends on no other document; None if there is
    none."""
    return document.drop or failed_rule(document.text, data.quality_rules)


DROP_CODES: dict[Drop | None, int] = {
    None: 0,  # it is kept
    Drop.EMPTY: 1,
    Drop.BINARY: 2,
    Drop.INVALID_UTF8: 3,
    Drop.INVALID_JSON: 4,
    Drop.INVALID_CSV: 5,
    Drop.MISSING_TEXT: 6,
    Drop.TOO_LONG: 7,
    Drop.WORD_COUNT: 8,
    Drop.WORD_LENGTH: 9,
    Drop.SYMBOL_RATIO: 10,
    Drop.LINE_MARKS: 11,
    Drop.ALPHABETIC_WORDS: 12,
    Drop.STOP_WORDS: 13,
    Drop.DUPLICATE: 14,
    Drop.NEAR_DUPLICATE: 15,
    Drop.CONTAMINATED: 16,
    Drop.NO_MESSAGES: 17,
    Drop.UNKNOWN_ROLE: 18,
    Drop.NO_ANSWER: 19,
    Drop.TEMPLATE_REFUSED: 20,
}
"""The byte of each reason in an index. They never change, as a store that one version began is
continued by another: a new reason gets the next number."""

_REASONS = {code: reason for reason, code in DROP_CODES.items()}


def reason_of(code: int) -> str:
    """Returns the reason that an index has by its number. Raises `CorpusError` for one that this
    version does not know."""
    if code not in _REASONS:
        raise CorpusError(
            "the store was begun by a later version of raymill, which drops documents for a reason that this one does "
            f"not know (code {code}): go on with that version, or tokenize into another store"
        )
    return str(_REASONS[code])
