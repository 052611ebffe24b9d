"""Previews a corpus from a sample and without a cluster: its documents and tokens, and what would be dropped."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cluster.settings.run import DataConfig, RunConfig
from jobs.cleaning.quality_rules import failed_rule
from jobs.corpus.chunks import Part, plan_chunks
from jobs.corpus.documents import Drop, read_documents
from jobs.corpus.listing import empty_corpus, list_corpus
from jobs.corpus.text_hashes import document_hash, normalized
from jobs.tokens.train_tokenizer import load_tokenizer, sample_texts
from model.bulk_encoder import bulk_encoder
from model.tokenizer import train_bpe

_SAMPLE_BYTES = 16 << 20  # of source text, from places all over the corpus
_PLACES = 64
_TRAINING_BYTES = 4 << 20  # enough for the rate of tokens to be right to a few percent
_EXAMPLES = 3
_SAMPLES = 5
_PREVIEW_CHARS = 160


@dataclass
class _Sample:
    data: DataConfig
    source_bytes: int = 0
    texts: list[str] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)  # the first few texts
    dropped: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set)

    def read(self, part: Part, *, most_bytes: int) -> None:
        """Takes the documents of a part, or as many from its front."""
        used, self.source_bytes = 0, self.source_bytes + min(part.end - part.start, most_bytes)
        for document in read_documents(part, self.data):
            if used >= most_bytes < part.end - part.start:
                return
            used += document.size
            drop = document.drop or failed_rule(document.text, self.data.quality_rules)
            if drop is None and self.data.dedup:
                digest = document_hash(normalized(document.text))
                drop = Drop.DUPLICATE if digest in self.seen else None
                self.seen.add(digest)
            if drop is None:
                self.texts.append(document.text)
                if len(self.examples) < _EXAMPLES:
                    self.examples.append({"file": part.file.uri, "text": document.text[:_PREVIEW_CHARS]})
                continue
            self.dropped[drop] += 1
            found = self.samples.setdefault(str(drop), [])
            if len(found) < _SAMPLES:
                preview = (document.preview or document.text)[:_PREVIEW_CHARS]
                found.append({"file": part.file.uri, "preview": preview})


def preview(config: RunConfig) -> dict[str, Any]:
    """Returns the sample's figures, and estimates for the whole corpus by its size in bytes.

    Duplicates are found within the sample only, near-duplicates and contamination not at all: the job may drop more.
    Raises `CorpusError` when the sample holds no document to keep.
    """
    data = config.data
    files = (listing := list_corpus(data.source)).files
    total_bytes = sum(file.size for file in files)
    chunks = plan_chunks(
        files, {}, shard_bytes=min(data.shard_bytes, 1 << 20), max_document_bytes=data.max_document_bytes
    )
    parts = [part for chunk in chunks for part in chunk.parts]
    if total_bytes > _SAMPLE_BYTES and len(parts) > _PLACES:
        parts = [parts[place * len(parts) // _PLACES] for place in range(_PLACES)]
    sample = _Sample(data)
    for part in parts:
        sample.read(part, most_bytes=_SAMPLE_BYTES // _PLACES)
    if not sample.texts:
        raise empty_corpus(len(files), sample.dropped)
    if data.tokenizer:
        tokenizer, _ = load_tokenizer(data.tokenizer)
    else:
        texts = sample_texts(files, data.model_copy(update={"tokenizer_sample_bytes": _TRAINING_BYTES}))
        tokenizer = train_bpe(texts, vocab_size=data.vocab_size, normalize=data.normalize)
    encode = bulk_encoder(tokenizer)[0].encode
    tokens = sum(len(encode(text)) + 1 for text in sample.texts)
    scale = max(1.0, total_bytes / max(1, sample.source_bytes))
    num_dropped = sum(sample.dropped.values())
    return {
        "files": len(files),
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
