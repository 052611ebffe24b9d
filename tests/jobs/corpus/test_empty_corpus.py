"""A corpus of which nothing is left: the error names what its first line has."""

import gzip
import json
from pathlib import Path

import pytest

from jobs.corpus.empty_corpus import empty_corpus
from jobs.corpus.listing import list_corpus


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_corpus_without_the_field_names_those_that_it_has(name: str, tmp_path: Path) -> None:
    line = json.dumps({"id": 1, "title": "a", "body": "b"}).encode() + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    files = list_corpus(str(tmp_path)).files
    said = str(empty_corpus(files, {"missing_text": 1}))
    assert said.startswith("the corpus is empty: 1 file, 1 document dropped (1 missing_text); ")
    assert said.endswith("check data.source and data.text_field, which may be one of title, body")
    assert "which may be" not in str(empty_corpus(files, {"empty": 1}))


def test_a_corpus_without_messages_names_the_forms_and_the_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    said = str(empty_corpus(list_corpus(str(tmp_path)).files, {"no_messages": 1}))
    assert "reads lines with `messages`, `conversations`, or `prompt` with `completion`" in said
    assert said.endswith("and the first line has question, answer")


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b"{" + b" " * (1 << 17) + b"}\n"])
def test_a_first_line_that_tells_nothing_is_left_out(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    said = str(empty_corpus(list_corpus(str(tmp_path)).files, {"missing_text": 1}))
    assert said.endswith("check data.source and data.text_field")
