"""Finds documents of a token store with a map: by file and place, or by their exact text."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.output.progress import progress
from cluster.settings.data import DataConfig
from cluster.storage.uris import absolute_uri
from jobs.corpus.text_borders import cut_text
from jobs.proof.missing_documents import nothing_of_file, nothing_there, unknown_file
from jobs.tokens.document_map import DocumentMap, MappedDocument, check_of
from jobs.tokens.shard_reader import Piece, read_piece
from jobs.tokens.token_store import Shard
from model.text.bulk_encoder import PlainEncoder
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError

_FIRST_TOKENS = 32  # of a document, to be shown
_FIRST_CHARS = 60
_WITH_PLACE = re.compile(r"(.+):(\d{1,18})", re.DOTALL)


class Found(NamedTuple):
    """Documents of one file that follow one another in a shard."""

    first: MappedDocument
    end: int  # behind the last token of the last one
    documents: int

    @property
    def shard(self) -> Shard:
        return self.first.shard


class Asked(NamedTuple):
    """The meaning of a user's reference: a file, or a place in it."""

    file: int
    place: int | None
    found: list[Found]


def find_by_place(mapped: DocumentMap, reference: str, data: DataConfig) -> list[Asked]:
    """Finds `FILE` or `FILE:PLACE`, where a file is a URI or the end of one. `data` are the
    settings that the corpus was read with. Raises `UserError`, which says what is known."""
    numbers, place = _parsed(mapped, reference)
    asked = [Asked(number, place, _found(mapped, number, place)) for number in numbers]
    asked = [each for each in asked if each.found]
    if not asked and place is None:
        raise nothing_of_file(mapped, numbers[0])
    if not asked:
        assert place is not None, "the other case was met above"
        raise nothing_there(mapped, numbers[0], place, data)
    return asked


def find_by_text(mapped: DocumentMap, tokenizer: Tokenizer, text: str) -> list[Asked]:
    """Finds the documents whose text this is. Reads all tables of the map. Raises `UserError`
    where there are none."""
    if mapped.manifest.chat is not None:
        raise UserError(
            "--text finds documents of plain text, and this store holds conversations; name one by "
            "--document FILE:PLACE"
        )
    pieces = PlainEncoder(tokenizer).encode_pieces(cut_text(text))
    ids = [*tokenizer.encode_whole(""), *chain.from_iterable(pieces), tokenizer.eot_id]
    tokens = np.array(ids, mapped.manifest.dtype)
    check = check_of(tokens.tobytes())
    asked: list[Asked] = []
    with progress("looking for the text", total=len(mapped.tables), unit="tables") as advance:
        for table in mapped.tables:
            documents = mapped.documents_of(table.shard)
            assert documents is not None, "it has a table"
            for document in documents.with_check(check, tokens=len(tokens)):
                if np.array_equal(tokens_of(mapped, document), tokens):
                    found = Found(document, document.end, 1)
                    asked.append(Asked(document.file, document.place, [found]))
            advance(1)
    if not asked:
        raise UserError(
            f"no document of {mapped.store.uri} has exactly this text, of {len(tokens):,} tokens; a document is "
            "matched whole, with its blanks and its last line end: name it by --document FILE:PLACE"
        )
    return asked


def tokens_of(mapped: DocumentMap, document: MappedDocument) -> npt.NDArray[Any]:
    """Returns the tokens of a document, as its shard has them."""
    return tokens_between(mapped, document.shard, document.start, document.end)


def tokens_between(mapped: DocumentMap, shard: Shard, start: int, end: int) -> npt.NDArray[Any]:
    """Returns tokens [start, end) of a shard. Where a conversation's loss does not count an id, it
    is negative."""
    dtype = mapped.manifest.dtype
    return np.frombuffer(read_piece(mapped.store, Piece(shard, start, end), dtype), dtype)


def first_words(mapped: DocumentMap, tokenizer: Tokenizer, document: MappedDocument) -> str:
    """Returns the front of a document's text in one line."""
    end = min(document.end, document.start + _FIRST_TOKENS)
    tokens = tokens_between(mapped, document.shard, document.start, end).astype(np.int64)
    left_out = {mapped.manifest.eot_id, mapped.manifest.bos_id}
    ids = [token for token in np.maximum(tokens, ~tokens).tolist() if token not in left_out]
    text = " ".join(tokenizer.decode(ids).removesuffix("\ufffd").split())
    return f"{text[:_FIRST_CHARS]}…" if len(text) > _FIRST_CHARS else text


def _parsed(mapped: DocumentMap, reference: str) -> tuple[Sequence[int], int | None]:
    """Returns the numbers of the file that is meant, more than one where several sources have it,
    and the place."""
    with_place = _WITH_PLACE.fullmatch(reference)
    for name, place in ((reference, None), with_place.groups() if with_place else ("", None)):
        numbers = _named(mapped, name) if name else []
        uris = {mapped.files[number][0] for number in numbers}
        if len(uris) > 1:
            raise UserError(
                f"{name} may be one of {len(uris)} files: {', '.join(sorted(uris)[:4])}; name more of its path"
            )
        if numbers:
            return numbers, None if place is None else int(place)
    raise unknown_file(mapped, with_place[1] if with_place else reference)


def _named(mapped: DocumentMap, name: str) -> list[int]:
    whole, ending = absolute_uri(name), f"/{name.lstrip('/')}"
    exact = [number for number, file in enumerate(mapped.files) if file[0] == whole]
    if exact:
        return exact
    return [number for number, file in enumerate(mapped.files) if file[0].endswith(ending)]


def _found(mapped: DocumentMap, file: int, place: int | None) -> list[Found]:
    found: list[Found] = []
    for documents in mapped.holding(file):
        start = documents.number_from(file, place or 0)
        end = documents.number_from(*((file + 1, 0) if place is None else (file, place + 1)))
        if start < end:
            last = documents.document(end - 1)
            found.append(Found(documents.document(start), last.end, end - start))
    return found
