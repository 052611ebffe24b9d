"""Writes the shards of one chunk in one task: reads the chunk, encodes its kept documents, and
stores the shards, each with the table of its documents.

A chunk's sidecar (`shard-00000.json`) records what its shards were made of and the hashes of their
bytes. A chunk whose sidecar matches the task and the bytes is not written again; so a killed job
continues where it was.
"""

import hashlib
import json
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import TypeAdapter

from cluster.settings.data import DataConfig
from cluster.storage.uris import NotFoundError, Storage
from jobs.cleaning.document_index import read_chunk
from jobs.cleaning.selection import HELD_OUT, stored_codes
from jobs.cleaning.why_dropped import DROP_CODES, reason_of
from jobs.corpus.chunks import Chunk, Part
from jobs.corpus.documents import Document, Drop
from jobs.corpus.listing import CorpusError
from jobs.corpus.text_borders import cut_text
from jobs.tokens.document_map import DocumentTable, TableWriter, table_file
from jobs.tokens.token_store import (
    SPLITS,
    DropSample,
    Shard,
    Split,
    canonical_json,
    shard_file,
    token_dtype,
)
from model.text.bulk_encoder import BulkEncoder, PlainEncoder
from model.text.chat import Chat, ChatError
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer

_MAX_SAMPLES = 5
_PREVIEW_CHARS = 200


@dataclass
class ChunkResult:
    """The shards and the counts of a chunk."""

    shards: list[Shard] = field(default_factory=list)
    tables: list[DocumentTable] = field(default_factory=list)  # of the shards
    documents: int = 0
    replaced: int = 0
    refused: int = 0  # by the chat template
    long: int = 0  # conversations of more than train.seq_len tokens
    samples: dict[str, list[DropSample]] = field(default_factory=dict)

    def sample(self, reason: str, part: Part, document: Document) -> None:
        found = self.samples.setdefault(reason, [])
        if len(found) < _MAX_SAMPLES:
            preview = document.preview or document.text[:_PREVIEW_CHARS]
            found.append(DropSample(part.file.number, document.offset, document.size, preview))


RESULT = TypeAdapter(ChunkResult)


@dataclass(frozen=True)
class ChunkWriter:
    """The settings that the writers of all chunks share, and the writing of one chunk."""

    store: Storage  # of the shards
    work: Storage  # of the decisions and the sidecars; the same unless only tables are missing
    tokenizer_json: bytes
    data: DataConfig
    is_bulk: bool  # whether the driver has proven that tiktoken gives the tokenizer's ids
    chat: ChatFormat | None = None  # of conversations
    seq_len: int = 0  # of the run
    stores_shards: bool = True  # or the tables alone, beside shards that are there

    def __call__(self, chunk: Chunk) -> bytes:
        """Returns the `ChunkResult` as JSON once the shards and then their sidecar are stored."""
        tokenizer, encoder = _encoder(self.tokenizer_json, is_bulk=self.is_bulk)
        digest, codes = stored_codes(self.work, chunk.number)
        made_of = {
            "digest": digest,
            "codes": hashlib.sha256(codes).hexdigest(),
            "tokenizer": tokenizer.hash,
        }
        made_of |= {"chat": repr((self.chat, self.seq_len))} if self.chat else {}
        sidecar = f"shard-{chunk.number:05d}.json"
        result = self._finished(sidecar, made_of)
        if result is None:
            result = self._write(chunk, digest, codes, tokenizer, encoder)
            self.work.write_bytes(
                sidecar, canonical_json({"made_of": made_of, "result": asdict(result)})
            )
        return RESULT.dump_json(result)

    def _finished(self, sidecar: str, made_of: dict[str, str]) -> ChunkResult | None:
        # Or the sidecar was cut off on a disk that lost power
        with suppress(NotFoundError, ValueError):
            values = json.loads(self.work.read_bytes(sidecar))
            result = RESULT.validate_python(values["result"])
            hashes = {shard.file: shard.sha256 for shard in result.shards}
            hashes |= {table.file: table.sha256 for table in result.tables}
            are_whole = (file_sha256(self.store, file) == sha for file, sha in hashes.items())
            is_mapped = len(result.tables) == len(result.shards)  # not by an earlier version
            if values["made_of"] == made_of and is_mapped and all(are_whole):
                return result
        return None

    def _write(
        self, chunk: Chunk, digest: str, codes: bytes, tokenizer: Tokenizer, encoder: PlainEncoder
    ) -> ChunkResult:
        found = hashlib.sha256()
        result = ChunkResult(documents=len(codes))
        names = {split: shard_file(split, chunk.number) for split in SPLITS}
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raymill-shard-")))
            chat = Chat(tokenizer, self.chat, encode=encoder.encode) if self.chat else None
            writers = {
                split: _ShardFile(
                    stack.enter_context((folder / name).open("w+b")),
                    stack.enter_context((folder / table_file(name)).open("w+b")),
                    tokenizer,
                    encoder,
                    chat,
                )
                for split, name in names.items()
            }
            for number, (part, document) in enumerate(read_chunk(chunk, self.data, found)):
                code = codes[number] if number < len(codes) else None
                if code is None or (document.drop and code != DROP_CODES[document.drop]):
                    raise _changed(chunk)
                if code not in (0, HELD_OUT):
                    result.sample(reason_of(code), part, document)
                else:
                    try:
                        writer = writers["val" if code == HELD_OUT else "train"]
                        num_tokens = writer.add(document, part)
                    except ChatError as error:
                        result.refused += 1
                        result.sample(
                            Drop.TEMPLATE_REFUSED, part, document._replace(preview=str(error))
                        )
                        continue
                    result.replaced += document.replaced
                    result.long += chat is not None and num_tokens > self.seq_len
            if found.hexdigest() != digest:
                raise _changed(chunk)
            for split, writer in writers.items():
                if writer.documents:
                    self._store(split, chunk, writer, result, folder)
        return result

    def _store(
        self, split: Split, chunk: Chunk, writer: "_ShardFile", result: ChunkResult, folder: Path
    ) -> None:
        """Stores a shard that is written, and its table."""
        name = shard_file(split, chunk.number)
        table = writer.table.finished(name)
        result.shards.append(Shard(name, split, chunk.source, **writer.finished()))
        result.tables.append(table)
        for file in (name, table.file) if self.stores_shards else (table.file,):
            self.store.upload_file(folder / file, file)


def _changed(chunk: Chunk) -> CorpusError:
    names = ", ".join(dict.fromkeys(part.piece_of or part.file.uri for part in chunk.parts[:3]))
    return CorpusError(f"the corpus changed while it was tokenized (one of {names}); run again")


class _ShardFile:
    """A shard being written, in a local file because it may be larger than memory allows."""

    def __init__(
        self,
        file: BinaryIO,
        table: BinaryIO,
        tokenizer: Tokenizer,
        encoder: PlainEncoder,
        chat: Chat | None,
    ) -> None:
        self._file, self._encoder, self._chat = file, encoder, chat
        self.table = TableWriter(table)
        self._dtype = token_dtype(tokenizer.vocab_size, signed=chat is not None)
        self._front, self._end = (
            np.array(ids, self._dtype) for ids in (tokenizer.encode_whole(""), [tokenizer.eot_id])
        )
        self._bytes = self._tokens = self.documents = 0

    def add(self, document: Document, part: Part) -> int:
        """Returns the number of tokens. Raises `ChatError` for a conversation, of which nothing is
        then written."""
        if self._chat is None:
            texts = self._encoder.encode_pieces(cut_text(document.text))
            ids_of_texts = (ids.astype(self._dtype) for ids in texts)
            pieces, num_bytes = [self._front, *ids_of_texts, self._end], document.size
        else:
            ids, counted = self._chat.conversation(document.messages)
            pieces = [np.where(counted, ids, ~np.array(ids)).astype(self._dtype)]
            answers = [
                message["content"]
                for message in document.messages
                if message["role"] == "assistant"
            ]
            num_bytes = sum(len(answer.encode()) for answer in answers)
        tokens = np.concatenate(pieces)
        self.table.add(
            tokens.data, start=self._tokens, file=part.file.number, place=document.offset
        )
        self._file.write(tokens.data)
        self.documents += 1
        self._tokens += len(tokens)
        self._bytes += num_bytes
        return len(tokens)

    def finished(self) -> dict[str, Any]:
        """Returns the figures of the `Shard`, whose bytes are in the file."""
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]
        return {
            "tokens": self._tokens,
            "documents": self.documents,
            "bytes": self._bytes,
            "sha256": sha256,
        }


@cache
def _encoder(content: bytes, *, is_bulk: bool) -> tuple[Tokenizer, PlainEncoder]:
    tokenizer = Tokenizer.from_json(content)
    return tokenizer, BulkEncoder(tokenizer) if is_bulk else PlainEncoder(tokenizer)


def file_sha256(store: Storage, key: str) -> str:
    with store.open(key) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
