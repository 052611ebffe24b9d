"""Previews a corpus from a sample and without a cluster: its documents and tokens, and what would be dropped."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.settings.run import DataConfig, RunConfig
from jobs.cleaning.quality_rules import failed_rule
from jobs.corpus.chunks import Part, plan_chunks
from jobs.corpus.documents import Document, Drop, read_documents
from jobs.corpus.listing import empty_corpus, list_corpus
from jobs.corpus.text_borders import cut_text
from jobs.corpus.text_hashes import document_hash, normalized
from jobs.tokens.train_tokenizer import TRAINING_PIECE_CHARS, load_tokenizer
from model.bulk_encoder import bulk_encoder
from model.tokenizer import Tokenizer, train_bpe

_SAMPLE_BYTES = 16 << 20  # of source text, from places all over the corpus
_PLACES = 64
_TRAINING_BYTES = 4 << 20  # enough for the rate of tokens to be right to a few percent
_EXAMPLES = 3
_SAMPLES = 5
_PREVIEW_CHARS = 160


@dataclass
class _Sample:
    source_bytes: int = 0
    texts: list[str] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)  # the first few texts
    dropped: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)

    def add(self, part: Part, document: Document, data: DataConfig) -> None:
        drop = document.drop or failed_rule(document.text, data.quality_rules)
        if drop is None and data.dedup:
            digest = document_hash(normalized(document.text))
            drop = Drop.DUPLICATE if digest in self.seen else None
            self.seen.add(digest)
        if drop is None:
            self.texts.append(document.text)
            if len(self.examples) < _EXAMPLES:
                self.examples.append({"file": part.uri, "text": document.text[:_PREVIEW_CHARS]})
            return
        self.dropped[drop] += 1
        found = self.samples.setdefault(str(drop), [])
        if len(found) < _SAMPLES:
            preview = (document.preview or document.text)[:_PREVIEW_CHARS]
            found.append({"file": part.uri, "preview": preview})


def preview(config: RunConfig) -> dict[str, Any]:
    """Returns the sample's figures, and estimates for the whole corpus by its size in bytes.

    Duplicates are found within the sample only, near-duplicates and contamination not at all: the job may drop more.
    Raises `CorpusError` when the sample holds no document to keep.
    """
    data = config.data
    listing = list_corpus(data.source)
    total_bytes = sum(file.size for file in listing.files)
    sample = _Sample()
    for part in _spread(_parts(listing.files, data)):
        for document in _front(part, data):
            sample.add(part, document, data)
        sample.source_bytes += min(part.end - part.start, _SAMPLE_BYTES // _PLACES)
    if not sample.texts:
        raise empty_corpus(len(listing.files), sample.dropped)
    tokenizer = load_tokenizer(data.tokenizer)[0] if data.tokenizer else _trained(sample.texts, data)
    encode = bulk_encoder(tokenizer)[0].encode
    tokens = sum(len(encode(text)) + 1 for text in sample.texts)
    scale = max(1.0, total_bytes / max(1, sample.source_bytes))
    num_dropped = sum(sample.dropped.values())
    return {
        "files": len(listing.files),
        "skipped_files": listing.skipped,
        "source_bytes": total_bytes,
        "sampled_documents": len(sample.texts) + num_dropped,
        "dropped": dict(sample.dropped),
        "drop_rate": round(num_dropped / (len(sample.texts) + num_dropped), 4),
        "drop_samples": sample.samples,
        "documents": round(len(sample.texts) * scale),
        "tokens": round(tokens * scale),
        "bytes_per_token": round(sum(len(text.encode()) for text in sample.texts) / tokens, 3),
        "is_estimate": scale > 1,
        "examples": sample.examples,
    }


def _parts(files: Sequence[Any], data: DataConfig) -> list[Part]:
    chunks = plan_chunks(
        files, {}, shard_bytes=min(data.shard_bytes, 1 << 20), max_document_bytes=data.max_document_bytes
    )
    return [part for chunk in chunks for part in chunk.parts]


def _spread(parts: Sequence[Part]) -> Sequence[Part]:
    """Returns at most `_PLACES` parts from all over the corpus; all of them if their bytes fit the sample."""
    if sum(part.end - part.start for part in parts) <= _SAMPLE_BYTES or len(parts) <= _PLACES:
        return parts
    return [parts[place * len(parts) // _PLACES] for place in range(_PLACES)]


def _front(part: Part, data: DataConfig) -> Iterator[Document]:
    """Yields the documents of a part up to its share of the sample."""
    budget = _SAMPLE_BYTES // _PLACES if part.end - part.start > _SAMPLE_BYTES // _PLACES else math.inf
    used = 0
    for document in read_documents(part, data):
        if used >= budget:
            return
        used += document.size
        yield document


def _trained(texts: Sequence[str], data: DataConfig) -> Tokenizer:
    """Returns a tokenizer of some of the texts, chosen by their hashes."""
    used = 0
    chosen: list[str] = []
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        chosen += cut_text(text, piece_chars=TRAINING_PIECE_CHARS)
        used += len(text)
        if used >= _TRAINING_BYTES:
            break
    return train_bpe(chosen, vocab_size=data.vocab_size, normalize=data.normalize)
