"""Says why a token store has no document where a user expects one: an unknown file, a file that is
gone or changed, or a document that was dropped."""

import difflib

from cluster.output.result_text import counted
from cluster.settings.data import DataConfig
from cluster.storage.uris import Entry, StorageError, split_uri
from jobs.cleaning.why_dropped import why_dropped
from jobs.corpus.chunks import Part, whole_file
from jobs.corpus.documents import Document, Drop, read_documents
from jobs.corpus.listing import CorpusError, corpus_file
from jobs.tokens.document_map import DocumentMap, ShardDocuments
from jobs.tokens.token_store import DropSample
from raymill.errors import UserError

_SHOWN_FILES = 3
_AMONG_OTHERS = (
    Drop.DUPLICATE,
    Drop.NEAR_DUPLICATE,
    Drop.CONTAMINATED,
    Drop.TEMPLATE_REFUSED,
)
"""Reasons that a document's own text does not show."""


def unknown_file(mapped: DocumentMap, name: str) -> UserError:
    known = [file[0] for file in mapped.files]
    alike = difflib.get_close_matches(name, known[:10_000], _SHOWN_FILES, cutoff=0.3)
    shown = ", ".join(alike or known[:_SHOWN_FILES])
    unmapped = len(mapped.unmapped)
    copied = (
        f"; {counted(unmapped, 'shard')} came from a store without a document map, whose files are not known"
        if unmapped
        else ""
    )
    return UserError(
        f"{name} is no file that {mapped.store.uri} was made of: it has {counted(len(known), 'file')}, such as "
        f"{shown or 'none'}{copied}"
    )


def nothing_of_file(mapped: DocumentMap, file: int) -> UserError:
    reasons = sorted({reason for reason, sample in _samples(mapped) if sample.file == file})
    said = f", among others as {', '.join(reasons)}" if reasons else ""
    return UserError(
        f"{mapped.files[file][0]} gave no document to {mapped.store.uri}: all that it holds were dropped{said}; "
        "`raymill data report` has the counts"
    )


def nothing_there(mapped: DocumentMap, file: int, place: int, data: DataConfig) -> UserError:
    """Returns why no document begins at a place in a file, as far as it can be known."""
    uri = mapped.files[file][0]
    note = file_note(mapped, file)
    reasons = [
        reason
        for reason, sample in _samples(mapped)
        if (sample.file, sample.document) == (file, place)
    ]
    if reasons:
        return UserError(f"the document at {uri}:{place} was dropped: {reasons[0]}")
    if note:
        why = f"; whether one was dropped there cannot be known: {note}"
        return UserError(
            f"no document of {uri} begins at {place}{why}{_neighbors(mapped, file, place)}"
        )
    try:
        document = _read(mapped, file, place, data)
    except (CorpusError, StorageError) as error:
        return UserError(
            f"no document of {uri} begins at {place}, and it cannot be read now: {error}"
        )
    if document is None:
        kind = "row" if uri.endswith(".parquet") else "byte"
        return UserError(
            f"no document begins at {kind} {place} of {uri}; PLACE is the first {kind} of one, of the uncompressed "
            f"text{_neighbors(mapped, file, place)}"
        )
    reason = why_dropped(document, data)
    if reason is not None:
        return UserError(f"the document at {uri}:{place} was dropped: {reason}")
    dropped = mapped.manifest.dropped
    likely = " or ".join(str(reason) for reason in _AMONG_OTHERS if dropped.get(reason))
    return UserError(
        f"the document at {uri}:{place} was dropped: {likely or 'the reason is not known'}, which its text alone does "
        "not show"
    )


def file_note(mapped: DocumentMap, file: int) -> str:
    """Says that a file of the corpus is gone or changed since it was tokenized; empty where it is
    as it was."""
    uri, size, version = mapped.files[file]
    try:
        storage, name = split_uri(uri)
        entry = storage.stat(name)
    except StorageError as error:
        return f"{uri} cannot be looked at now ({error})"
    if entry is None:
        return f"{uri} is gone"
    if entry.size != size:
        return f"{uri} has changed since it was tokenized, from {size:,} to {entry.size:,} bytes"
    if entry.version != version:
        return f"{uri} was written again since it was tokenized, with as many bytes"
    return ""


def _samples(mapped: DocumentMap) -> list[tuple[str, DropSample]]:
    """Returns the dropped documents of which the manifest has samples, with their reasons. Their
    files are those of the listing, which stand first in the map."""
    samples: list[tuple[str, DropSample]] = []
    for reason, dropped in mapped.manifest.drop_samples.items():
        samples += [(reason, sample) for sample in dropped]
    return samples


def _read(mapped: DocumentMap, file: int, place: int, data: DataConfig) -> Document | None:
    """Reads the document that begins at a place of a file."""
    entry = Entry(*mapped.files[file])
    listed = corpus_file(entry, file, source=0, text_endings=data.text_endings)
    is_line = listed is not None and listed.kind == "jsonl" and not listed.compression
    if listed is None or (is_line and place >= listed.size):
        return None
    part = Part(listed, place, place + 1) if is_line else whole_file(listed)
    for document in read_documents(part, data):
        if document.offset >= place:
            return document if document.offset == place else None
    return None


def _neighbors(mapped: DocumentMap, file: int, place: int) -> str:
    """Names the kept documents of the file before and behind a place."""
    before: list[int] = []
    behind: list[int] = []
    for documents in mapped.holding(file):
        number = documents.number_from(file, place)
        before += _place(documents, number - 1, file)
        behind += _place(documents, number, file)
    words = [f"before it at {max(before)}"] if before else []
    words += [f"behind it at {min(behind)}"] if behind else []
    return f"; the next documents that were kept begin {' and '.join(words)}" if words else ""


def _place(documents: ShardDocuments, number: int, file: int) -> list[int]:
    """Returns the place of a document, in a list that is empty where it is another file's or
    none."""
    if not 0 <= number < len(documents):
        return []
    document = documents.document(number)
    return [document.place] if document.file == file else []
