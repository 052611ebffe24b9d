"""One place decides which documents are dropped, and the numbers of its reasons never change."""

import re

import pytest

from cluster.settings.data import DataConfig
from jobs.cleaning.selection import HELD_OUT
from jobs.cleaning.why_dropped import DROP_CODES, reason_of, why_dropped
from jobs.corpus.documents import Document, Drop
from jobs.corpus.listing import CorpusError
from tests.repository import REPOSITORY


def test_each_reason_has_a_number_of_its_own() -> None:
    assert set(DROP_CODES) == {None, *Drop}
    assert len({*DROP_CODES.values()}) == len(DROP_CODES)
    assert max(DROP_CODES.values()) < HELD_OUT


def test_numbers_that_indexes_have_stay_as_they_are() -> None:
    """A reason between two others is given the next free number: add it here too."""
    names = [
        "kept",
        "empty",
        "binary",
        "invalid_utf8",
        "invalid_json",
        "invalid_csv",
        "missing_text",
        "too_long",
        "word_count",
        "word_length",
        "symbol_ratio",
        "line_marks",
        "alphabetic_words",
        "stop_words",
        "duplicate",
        "near_duplicate",
        "contaminated",
        "no_messages",
        "unknown_role",
        "no_answer",
        "template_refused",
    ]
    assert {str(reason or "kept"): code for reason, code in DROP_CODES.items()} == {
        name: code for code, name in enumerate(names)
    }


def test_a_number_that_this_version_does_not_know_is_refused_by_name() -> None:
    assert reason_of(DROP_CODES[Drop.DUPLICATE]) == "duplicate"
    with pytest.raises(CorpusError, match=r"a later version of raymill.*\(code 99\)"):
        reason_of(99)


def test_a_document_is_dropped_for_what_it_is_before_what_it_says() -> None:
    data = DataConfig(source="x", quality_rules=("word_count",))
    document = Document(0, "too few words", size=13)
    assert why_dropped(document, data) is Drop.WORD_COUNT
    assert why_dropped(document._replace(drop=Drop.BINARY), data) is Drop.BINARY
    assert why_dropped(document, DataConfig(source="x")) is None


def test_nobody_else_decides() -> None:
    """Another filter belongs into `why_dropped`: a copy of it elsewhere would disagree."""
    askers = [
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "jobs").rglob("*.py")
        if re.search(r"\bfailed_rule\(", path.read_text(encoding="utf-8"))
    ]
    assert sorted(askers) == ["jobs/cleaning/quality_rules.py", "jobs/cleaning/why_dropped.py"]
