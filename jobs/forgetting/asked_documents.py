"""Finds the documents that a run is to forget, and the first step that read any of them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.output.progress import progress, say
from cluster.output.result_text import counted
from cluster.settings.parser import ConfigError
from jobs.proof.opened_run import Learning
from jobs.proof.recorded.certificate import first_step_reading
from jobs.proof.stored_documents import Found, find_by_place, tokens_between
from jobs.proof.training_order import Stretch
from jobs.proof.where_run import MappedRun
from jobs.tokens.document_map import DocumentMap, MappedDocument
from raymill.errors import UserError

_READ_TOKENS = 1 << 20  # at once, of a shard that is searched
_SHOWN = 3


@dataclass(frozen=True)
class AskedDocuments:
    """Documents that the run has read, in the order of the store."""

    documents: tuple[MappedDocument, ...]
    first_step: int  # that read a token of one
    held_out_tokens: int  # of them, which only validate the run


def asked_documents(
    opened: MappedRun, references: Sequence[str], *, pattern: str | None
) -> AskedDocuments:
    """Finds `FILE[:PLACE]` references, and all documents whose text a pattern is found in. Raises
    `UserError` where nothing of a reference was read by a step; such matches of the pattern are
    passed over."""
    named: list[MappedDocument] = []
    for reference in references:
        for asked in find_by_place(opened.mapped, reference, opened.learning.opened.config.data):
            for found in asked.found:
                named += _each(opened.mapped, found)
    first_steps = _first_steps(opened.learning, named)
    problems = [
        _name(opened.mapped, document) + problem
        for document, step in zip(named, first_steps, strict=True)
        if (problem := _why_not_forgotten(opened.learning, document, step))
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"{'; '.join(problems[:_SHOWN])}{more}: leave it out")
    chosen = {*zip(named, first_steps, strict=True)}
    if pattern is not None:
        chosen |= {*_matching(opened, pattern)}
    documents = sorted({document for document, _ in chosen}, key=_place)
    in_training = 0
    for document in documents:
        stretches = _stretches(opened.learning, document)
        in_training += sum(stretch.end - stretch.start for stretch in stretches)
    return AskedDocuments(
        tuple(documents),
        min(step for _, step in chosen),
        sum(document.tokens for document in documents) - in_training,
    )


def _matching(opened: MappedRun, pattern: str) -> Iterator[tuple[MappedDocument, int]]:
    """Yields the documents in whose text the pattern is found, each with the first step that read
    it. Raises `UserError` where there are none."""
    matches = [*_with_text(opened, _compiled(pattern))]
    first_steps = _first_steps(opened.learning, matches)
    num_read = 0
    for document, step in zip(matches, first_steps, strict=True):
        if not _why_not_forgotten(opened.learning, document, step):
            num_read += 1
            yield document, step
    if not num_read:
        raise UserError(
            f"--pattern {pattern}: {counted(len(matches), 'document')} of {opened.mapped.store.uri} matched, and no "
            "step read one; nothing is to be forgotten"
        )
    if num_read < len(matches):
        say(f"{len(matches) - num_read} of {len(matches)} matches were read by no step")


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--pattern {pattern} is no regular expression: {error}") from None


def _with_text(opened: MappedRun, wanted: re.Pattern[str]) -> Iterator[MappedDocument]:
    """Yields the documents whose text matches; reads every shard that has a table."""
    mapped = opened.mapped
    with progress("looking for the pattern", total=len(mapped.tables), unit="shards") as advance:
        for table in mapped.tables:
            for group in _groups(mapped, table.shard):
                first, last = group[0], group[-1]
                tokens = tokens_between(mapped, first.shard, first.start, last.end)
                for document in group:
                    part = tokens[document.start - first.start : document.end - first.start]
                    if wanted.search(_text(opened, part.astype(np.int64))):
                        yield document
            advance(1)


def _groups(mapped: DocumentMap, shard: str) -> Iterator[list[MappedDocument]]:
    """Yields the documents of a shard, as many together as are read at once."""
    documents = mapped.documents_of(shard)
    assert documents is not None, "it has a table"
    group: list[MappedDocument] = []
    for number in range(len(documents)):
        group.append(documents.document(number))
        if group[-1].end - group[0].start >= _READ_TOKENS or number + 1 == len(documents):
            yield group
            group = []


def _text(opened: MappedRun, tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    manifest = opened.mapped.manifest
    left_out = {manifest.eot_id, manifest.bos_id}
    ids = [token for token in np.maximum(tokens, ~tokens).tolist() if token not in left_out]
    return opened.tokenizer.decode(ids)


def _each(mapped: DocumentMap, found: Found) -> Iterator[MappedDocument]:
    documents = mapped.documents_of(found.shard.file)
    assert documents is not None, "it came from the map"
    first = documents.number_at(found.first.start)
    for number in range(first, first + found.documents):
        yield documents.document(number)


def _first_steps(learning: Learning, documents: Sequence[MappedDocument]) -> list[int]:
    """Returns the first step that reads each document, taken or to come; 0 where none does."""
    return [
        first_step_reading(learning, document.shard, document.start, document.end)
        for document in documents
    ]


def _stretches(learning: Learning, document: MappedDocument) -> list[Stretch]:
    return [*learning.order.stretches(document.shard, document.start, document.end)]


def _why_not_forgotten(learning: Learning, document: MappedDocument, first_step: int) -> str:
    """Says why there is nothing to forget of a document; nothing where there is."""
    stretches = _stretches(learning, document)
    if not stretches:
        return " is held out to validate the run, and no step learned it"
    if all(map(learning.is_forgotten, stretches)):
        return " is forgotten already"
    if not first_step:
        return " was learned by no step: the run ends before it would read it"
    if first_step > learning.last_step:
        return f" was learned by no step yet: step {first_step} is to come, the run is at step {learning.last_step}"
    return ""


def _name(mapped: DocumentMap, document: MappedDocument) -> str:
    return f"{mapped.files[document.file][0]}:{document.place}"


def _place(document: MappedDocument) -> tuple[str, int]:
    return document.shard.file, document.start
