"""Previews a corpus from a sample and without a cluster: its documents and tokens, and what would
be dropped."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from cluster.output.progress import say
from cluster.settings.data import DataConfig
from cluster.settings.run import RunConfig
from cluster.storage.uris import split_uri
from jobs.corpus.chunks import CHUNK_PARTS, EXPANSION, Part, default_shard_bytes
from jobs.corpus.decompression import decompressed
from jobs.corpus.documents import named_damage
from jobs.corpus.empty_corpus import empty_corpus
from jobs.corpus.listing import (
    CorpusFile,
    Listing,
    endings_of,
    hidden_folders,
    linked_folders,
    list_corpus,
    most_is_skipped,
    said_skipped,
)
from jobs.corpus.sample_places import sample_places
from jobs.corpus.text_borders import cut_text
from jobs.tokens.token_store import token_dtype
from jobs.tokens.train_tokenizer import judged, load_tokenizer, sample_texts
from model.text.bulk_encoder import bulk_encoder
from model.text.tokenizer import Tokenizer, train_bpe

_SAMPLE_BYTES = 16 << 20  # of source text, from places all over the corpus
# Of a corpus that is not read whole: the rate of tokens is then right to a few percent
_TRAINING_BYTES = 4 << 20
_FRONT_BYTES = 2 << 20  # of an archive, of which decompression is some 64 KiB ahead
_EXAMPLES = 3
_SAMPLES = 5
_PREVIEW_CHARS = 160

# Of the stage's processes, as measured; a worker holds a document several times while it is cleaned
# and encoded.
_DRIVER_BYTES, _DRIVER_FILE_BYTES = 400 << 20, 1500
_WORKER_BYTES, _DOCUMENT_COPIES = 400 << 20, 8


@dataclass
class _Sample:
    data: DataConfig
    texts: list[str] = field(default_factory=list)
    # How many documents of the corpus each text stands for
    scales: list[float] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)  # the first few texts
    dropped: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)
    replaced_utf8: int = 0  # kept texts with U+FFFD for bytes that were not UTF-8
    is_whole: bool = True  # nothing was left unread

    def read(self, files: Sequence[CorpusFile], *, share_bytes: int) -> None:
        """Takes a share from the files; where a place holds no document, the next one makes up for
        it."""
        left, read_bytes, before = 0, 0.0, len(self.texts)
        for wanted, parts in sample_places(files, self.data, share_bytes=share_bytes):
            left += wanted
            for part in parts:
                if left <= 0:
                    break
                text_bytes, file_bytes = self._read_part(part, most_bytes=left)
                left, read_bytes = left - text_bytes, read_bytes + file_bytes
        is_all = left > 0  # had there been more, it would have been read
        self.is_whole = self.is_whole and is_all
        scale = 1.0 if is_all else sum(file.size for file in files) / max(1, round(read_bytes))
        self.scales += [max(1.0, scale)] * (len(self.texts) - before)

    def _read_part(self, part: Part, *, most_bytes: int) -> tuple[int, float]:
        """Takes the documents of a part, or as many from its front; returns the bytes read, of text
        and of the file."""
        begin, count, text_bytes = -1, 0, 0
        for document, drop in judged(part, self.data, self.seen):
            begin = document.offset if begin < 0 else begin
            units = document.offset - begin  # bytes of lines with all their fields; rows of Parquet
            if max(text_bytes, units) >= most_bytes:
                return most_bytes, units * _bytes_per_unit(part.file, self.data)
            count, text_bytes = count + 1, text_bytes + document.size
            if drop is None:
                self.texts.append(document.text)
                self.replaced_utf8 += document.replaced
                if len(self.examples) < _EXAMPLES:
                    self.examples.append(
                        {"file": part.file.uri, "text": document.text[:_PREVIEW_CHARS]}
                    )
                continue
            self.dropped[drop] += 1
            found = self.samples.setdefault(drop, [])
            if len(found) < _SAMPLES:
                preview = (document.preview or document.text)[:_PREVIEW_CHARS]
                found.append({"file": part.file.uri, "preview": preview})
        if part.file.kind == "parquet":  # whose row groups reach beyond the part that they begin in
            return text_bytes, count * _bytes_per_unit(part.file, self.data)
        return text_bytes, part.end - part.start


def _bytes_per_unit(file: CorpusFile, data: DataConfig) -> float:
    """Returns how many of the file's bytes hold what its documents' offsets count: a row of
    Parquet, or a byte of text, judged by the front of an archive."""
    if not file.compression and file.kind != "parquet":
        return 1.0
    storage, name = split_uri(file.uri)
    with storage.open(name) as raw, named_damage(file.uri):
        if file.kind == "parquet":
            return file.size / max(1, pq.ParquetFile(raw).metadata.num_rows)
        text = decompressed(raw, file, max_ratio=data.max_compression_ratio)
        num_bytes = 0
        while raw.tell() < _FRONT_BYTES and (piece := text.read(1 << 20)):
            num_bytes += len(piece)
        return raw.tell() / num_bytes


def _text_bytes(files: Sequence[CorpusFile]) -> int:
    """Returns about how many bytes of text the files hold."""
    return sum(file.size * EXPANSION[file.compression] for file in files)


def _sampled(files: Sequence[CorpusFile], data: DataConfig) -> _Sample:
    """Reads a small corpus whole and in its order, as the job does; of a larger one a share of each
    kind of file."""
    if _text_bytes(files) <= _SAMPLE_BYTES:
        whole = _Sample(data)
        whole.read(files, share_bytes=_SAMPLE_BYTES)
        if whole.is_whole:
            return whole
    # Whose bytes stand for about as much text each
    kinds: dict[tuple[str, str], list[CorpusFile]] = {}
    for file in files:
        kinds.setdefault((file.kind, file.compression), []).append(file)
    sample = _Sample(data)
    for alike in kinds.values():
        share = _SAMPLE_BYTES * _text_bytes(alike) // max(1, _text_bytes(files))
        sample.read(alike, share_bytes=max(1, share))
    return sample


def _tokenizer(files: Sequence[CorpusFile], data: DataConfig, *, is_whole: bool) -> Tokenizer:
    """Returns the tokenizer that is named, or one trained as the job trains it: on as much text
    where the sample is the whole corpus, else on less."""
    if data.tokenizer:
        return load_tokenizer(data.tokenizer)[0]
    training = (
        data if is_whole else data.model_copy(update={"tokenizer_sample_bytes": _TRAINING_BYTES})
    )
    return train_bpe(
        sample_texts(files, training), vocab_size=data.vocab_size, normalize=data.normalize
    )


def _token_counts(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Returns each document's tokens in the store, with those that begin and end it."""
    encoder = bulk_encoder(tokenizer)[0]
    num_added = len(tokenizer.encode_whole("")) + 1
    return [num_added + sum(map(len, encoder.encode_pieces(cut_text(text)))) for text in texts]


def _is_exact(sample: _Sample, listing: Listing, data: DataConfig) -> bool:
    """Says whether the job will count the same: it reads nothing else, and drops nothing more."""
    drops_more = data.near_dedup_threshold is not None or data.decontaminate_ngram is not None
    return sample.is_whole and data.format == "text" and not drops_more and not listing.token_stores


def preview(config: RunConfig) -> dict[str, Any]:
    """Returns the sample's figures, and estimates for the whole corpus, by the share of its bytes
    that was read. Of a small corpus, which is read whole, they are the job's own figures.

    Duplicates are found within the sample only, near-duplicates and contamination not at all: the
    job may drop more. Raises `CorpusError` when the sample holds no document to keep.
    """
    data = config.data
    listing = list_corpus(data.source, text_endings=data.text_endings)
    files = listing.files
    if listing.skipped:
        say(f"skipped {said_skipped(listing)}: these are not counted below")
    if warning := most_is_skipped(listing):
        say(warning)
    start_s = time.process_time()
    sample = _sampled(files, data)
    if not sample.texts:
        raise empty_corpus(files, sample.dropped)
    read_s = time.process_time() - start_s
    tokenizer = _tokenizer(files, data, is_whole=sample.is_whole)
    start_s = time.process_time()
    tokens = _token_counts(sample.texts, tokenizer)
    encode_s = time.process_time() - start_s
    num_documents = len(tokens) + sample.dropped.total()
    num_tokens = round(
        sum(count * scale for count, scale in zip(tokens, sample.scales, strict=True))
    )
    shard_bytes = data.shard_bytes or default_shard_bytes(files)
    return {
        "files": len(files),
        "skipped_files": endings_of(listing),
        "skipped_bytes": dict(listing.skipped_bytes.most_common()),
        "hidden_folders": hidden_folders(listing.skipped),
        "linked_folders": linked_folders(listing.skipped),
        "special_files": listing.special,
        "source_bytes": sum(file.size for file in files),
        "sampled_documents": num_documents,
        "dropped": dict(sample.dropped),
        "drop_rate": round(sample.dropped.total() / num_documents, 4),
        "drop_samples": sample.samples,
        "documents": round(sum(sample.scales)),
        "tokens": num_tokens,
        "bytes_per_token": round(sum(len(text.encode()) for text in sample.texts) / sum(tokens), 3),
        "replaced_utf8": sample.replaced_utf8,
        "is_estimate": not _is_exact(sample, listing, data),
        "stage": {
            "chunks": max(len(files) // CHUNK_PARTS, _text_bytes(files) // shard_bytes) + 1,
            # Every text is read twice, by the index and for the shards; both passes use all
            # workers.
            "worker_seconds": round((2 * read_s + encode_s) * num_tokens / sum(tokens), 2),
            "store_bytes": num_tokens * token_dtype(tokenizer.vocab_size).itemsize,
            "driver_memory_bytes": _DRIVER_BYTES + _DRIVER_FILE_BYTES * len(files),
            "worker_memory_bytes": _WORKER_BYTES + _DOCUMENT_COPIES * data.max_document_bytes,
        },
        "examples": sample.examples,
    }
