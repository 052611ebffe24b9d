"""Packs many text files, each a document, into a few Parquet files, in canonical order."""

import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.output.progress import say
from cluster.settings.data import DataConfig
from cluster.storage.uris import Entry, absolute_uri, glob_uris, open_storage, pinned, split_uri
from jobs.corpus.chunks import EXPANSION
from jobs.corpus.decompression import decompressed
from jobs.corpus.documents import named_damage, stretches
from jobs.corpus.listing import CorpusError, CorpusFile, corpus_file
from jobs.corpus.text_borders import BYTE_ORDER_MARK

# An empty file, at which every reader stops and gives its name
_UNFINISHED = "PACKING-IS-NOT-FINISHED.parquet"
_BATCH_BYTES, _BATCH_FILES = 16 << 20, 1024  # read at once, and written as a row group
_FILE_BYTES = 256 << 20
_READERS = 32  # threads: from S3, a small file is little but waiting


def pack(source: str, destination: str, data: DataConfig) -> dict[str, Any]:
    """Writes the documents of the .txt files at `source` (also .gz and .zst) as column
    `data.text_field` of Parquet files, bytes as they are, and returns counts. They make the same
    documents as `source`, in the same order.

    Raises `CorpusError` for a source with no .txt file or with other corpus files, and for a
    destination that is in it or not empty; `NotFoundError` for a source where nothing is.
    """
    source, _ = pinned(source)
    target = open_storage(destination)
    counts = dict.fromkeys(("files", "documents", "bytes", "packed_files"), 0)
    if any(True for _ in target.entries()):
        raise CorpusError(f"{target.uri} is not empty; name a new folder, or delete what is there")
    if f"{target.uri}/".startswith(f"{absolute_uri(source)}/"):
        raise CorpusError(
            f"{target.uri} is in {source}, whose files are packed; name a folder elsewhere"
        )
    files = (file for entry in glob_uris(source) if (file := corpus_file(entry, 0, source=0)))
    if (first_file := next(files, None)) is None:
        raise CorpusError(f"{source} has no .txt files, and only those are packed")
    batches = _batches(chain([first_file], files), counts)
    target.write_bytes(_UNFINISHED, b"")
    schema = pa.schema([(data.text_field, pa.large_binary())])
    with (
        ThreadPoolExecutor(_READERS) as pool,
        tempfile.TemporaryDirectory(prefix="raymill-pack-") as folder,
    ):
        path = Path(folder, "packed.parquet")
        groups = (group for batch in batches for group in _groups(batch, pool, data))
        for first in groups:
            num_bytes = 0
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                for group in chain([first], groups):
                    writer.write_table(
                        pa.table([pa.array(group, pa.large_binary())], schema=schema)
                    )
                    counts["documents"] += len(group)
                    if (num_bytes := num_bytes + sum(map(len, group))) >= _FILE_BYTES:
                        break
            target.upload_file(path, f"part-{counts['packed_files']:05d}.parquet")
            counts["packed_files"] += 1
            counts["bytes"] += num_bytes
            say(f"packed {counts['files']:,} files, {counts['bytes'] / 1e6:,.0f} MB")
    target.delete(_UNFINISHED)
    return {"packed": target.uri} | counts


def _batches(files: Iterable[CorpusFile], counts: dict[str, int]) -> Iterator[list[CorpusFile]]:
    batch, num_bytes = list[CorpusFile](), 0
    for file in files:
        if file.kind != "txt":
            raise CorpusError(
                f"{file.uri} is no .txt file; only those are packed, join .jsonl and .csv by lines"
            )
        counts["files"] += 1
        size = file.size * EXPANSION[file.compression]
        if batch and (num_bytes + size > _BATCH_BYTES or len(batch) == _BATCH_FILES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(file)
        num_bytes += size
    if batch:
        yield batch


def _groups(
    batch: list[CorpusFile], pool: ThreadPoolExecutor, data: DataConfig
) -> Iterator[list[bytes]]:
    """Yields the texts of a batch as row groups: in one, or one by one from a file that may be
    large."""
    if len(batch) == 1:
        yield from ([text] for text in _texts(batch[0], data))
    else:
        yield [*chain.from_iterable(pool.map(lambda file: [*_texts(file, data)], batch))]


def _texts(file: CorpusFile, data: DataConfig) -> Iterator[bytes]:
    storage, name = split_uri(file.uri)
    with (
        storage.open(name, listed=Entry(name, file.size, file.version)) as raw,
        named_damage(file.uri),
    ):
        content = decompressed(raw, file, max_ratio=data.max_compression_ratio)
        for offset, text in stretches(content, data.max_document_bytes):
            yield text if offset else text.removeprefix(BYTE_ORDER_MARK)
