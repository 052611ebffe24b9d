"""Builds the token store of a corpus, with the same bytes for any number of workers, kills and restarts.

Two passes over the chunks of the corpus. The first indexes the documents; from that the driver decides, in canonical
order, which are kept. The second writes the shards. Each task leaves its result in the store, so a job that was
killed goes on where it was. The manifest comes last: without one there is no store.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.output.progress import say
from cluster.settings.run import DataConfig, RunConfig
from cluster.storage.lease import Lease
from cluster.storage.uris import Storage, join_uri, open_storage
from jobs.cleaning.decontamination import store_validation_ngrams
from jobs.cleaning.document_index import INDEX, index_corpus
from jobs.cleaning.selection import Selection, Summary
from jobs.corpus.chunks import Chunk, interleaved, plan_chunks
from jobs.corpus.documents import UNREADABLE, Drop
from jobs.corpus.file_pieces import PIECES, cut_files
from jobs.corpus.listing import CorpusError, Listing, empty_corpus, list_corpus
from jobs.corpus.progress import DataProgress
from jobs.corpus.ray_data_tasks import run_tasks
from jobs.tokens.growing_store import SealedPrefix
from jobs.tokens.ready_shards import copy_shards
from jobs.tokens.shard_writer import ChunkResult, ChunkWriter
from jobs.tokens.token_store import (
    MANIFEST,
    SEALED,
    SOURCES,
    TOKENIZER,
    Manifest,
    Shard,
    TokenStoreError,
    canonical_json,
    read_manifest,
)
from jobs.tokens.train_tokenizer import ensure_tokenizer, text_sample
from model.bulk_encoder import bulk_encoder
from model.tokenizer import Tokenizer

_SHAPING = {
    "weights",
    "text_field",
    "invalid_utf8",
    "max_document_bytes",
    "dedup",
    "near_dedup_threshold",
    "quality_rules",
    "decontaminate_ngram",
    "val_fraction",
    "shard_bytes",
}
"""The settings that shape the store, beside the corpus and its tokenizer."""


@dataclass(frozen=True)
class Plan:
    """What is to be tokenized, with what, and where to."""

    listing: Listing
    tokenizer: Tokenizer
    store: Storage


def plan_store(config: RunConfig) -> Plan:
    """Lists the corpus and trains its tokenizer where there is none; the store's place follows from both. Needs Ray."""
    listing = list_corpus(config.data.source)
    tokenizer, _ = ensure_tokenizer(config, listing)
    shaping = [_shaping(config.data), listing.identity(), sorted(listing.token_stores.items()), tokenizer.hash]
    key = hashlib.sha256(canonical_json(shaping)).hexdigest()[:12]
    return Plan(listing, tokenizer, open_storage(config.storage.uri).child(f"tokens/{key}"))


def token_store(config: RunConfig) -> Storage:
    """The folder of the store of `config.data`, finished or not. Needs Ray."""
    return plan_store(config).store


def tokenize(config: RunConfig) -> dict[str, Any]:
    """Makes the token store of `config.data` under `config.storage`, or finds it there. Needs Ray.

    Raises `CorpusError`, also when no document is left to tokenize, and `LeaseHeldError` while another run writes it.
    """
    plan = plan_store(config)
    if skipped := plan.listing.skipped:
        say(f"skipped {len(skipped)} files of unknown ending, such as {skipped[0]!r}; sources.json names them all")
    manifest = _finished(plan.store)
    if manifest is not None:
        _check_readable(manifest.total("documents"), manifest.dropped, config.data)
    else:
        with Lease(plan.store) as lease:
            manifest = _Build(plan, config.data, lease).manifest()
    return {
        "manifest": join_uri(plan.store.uri, MANIFEST),
        "manifest_hash": manifest.hash,
        "documents": manifest.total("documents"),
        "tokens": manifest.total("tokens"),
        "bytes": manifest.total("bytes"),
        "dropped": manifest.dropped,
        "shards": {shard.file: shard.sha256 for shard in manifest.shards},
        "train_tokens": manifest.total("tokens", "train"),
        "val_tokens": manifest.total("tokens", "val"),
        "val_bytes": manifest.total("bytes", "val"),
    }


def _shaping(data: DataConfig) -> dict[str, Any]:
    return data.model_dump(mode="json", include=_SHAPING)


def _finished(store: Storage) -> Manifest | None:
    if not store.exists(MANIFEST):
        return None
    try:
        return read_manifest(store)
    except TokenStoreError as error:
        say(f"mending the token store: {error}")
        return None


def _check_readable(documents: int, dropped: Mapping[str, int], data: DataConfig) -> None:
    unreadable = {reason: dropped[reason] for reason in UNREADABLE if dropped[reason]}
    total = documents + sum(dropped.values())
    if sum(unreadable.values()) > data.max_unreadable_fraction * total:
        counts = ", ".join(f"{count} {reason}" for reason, count in unreadable.items())
        raise CorpusError(
            f"{sum(unreadable.values())} of {total} documents cannot be read ({counts}), more than the share of "
            f"data.max_unreadable_fraction={data.max_unreadable_fraction}; `raymill data preview` shows some"
        )


@dataclass(frozen=True)
class _Build:
    plan: Plan
    data: DataConfig
    lease: Lease

    def manifest(self) -> Manifest:
        """Writes what is missing of the store."""
        store, listing, tokenizer = self.plan.store, self.plan.listing, self.plan.tokenizer
        is_bulk = self._is_bulk_proven()
        store.write_bytes(TOKENIZER, tokenizer.to_json())
        store.write_bytes(SOURCES, canonical_json(listing.record()))
        chunks = plan_chunks(
            listing.files,
            cut_files(store, listing.files, self.data),
            shard_bytes=self.data.shard_bytes,
            max_document_bytes=self.data.max_document_bytes,
        )
        summary, tasks = self._select(chunks)
        results = copy_shards(store, listing.token_stores, tokenizer, first_chunk=len(chunks))
        with SealedPrefix(store, self._manifest(summary, {}), chunks, ready=results) as sealed:
            for chunk, result in self._write(chunks, tasks, is_bulk=is_bulk, dropped=summary.dropped):
                results[chunk] = result
                self.lease.check()
                sealed.add(chunk, result)
        manifest = self._manifest(summary, results)
        if not manifest.shards:
            raise empty_corpus(len(listing.files), manifest.dropped)
        self.lease.check()
        store.write_bytes(MANIFEST, manifest.to_json())
        for entry in [*store.list(f"{INDEX}/"), *store.list(f"{PIECES}/")]:
            store.delete(entry.key)
        store.delete(SEALED)
        return manifest

    def _is_bulk_proven(self) -> bool:
        """Whether tiktoken gives the tokenizer's ids, also for the front of the corpus; says so if not."""
        _, reason = bulk_encoder(self.plan.tokenizer, sample=text_sample(self.plan.listing, self.data))
        if reason:
            say(f"encoding with `tokenizers`, about eight times slower than with tiktoken's core: {reason}")
        return reason is None

    def _select(self, chunks: Sequence[Chunk]) -> tuple[Summary, list[dict[str, Any]]]:
        """Decides what is kept; the tasks of the writers, whose decisions are stored, in the order of the chunks."""
        store = self.plan.store
        with Selection(self.data, num_chunks=len(chunks)) as selection:
            for number, content in index_corpus(store, chunks, self.data):
                selection.add(number, content)
            summary = selection.decide()
            self._judge(summary)
            tasks = []
            for chunk in chunks:
                key = f"{INDEX}/{chunk.number:05d}.codes"
                store.write_bytes(key, selection.codes(chunk.number).tobytes())
                parts = [asdict(part) for part in chunk.parts]
                digest = selection.digest(chunk.number)
                tasks.append(
                    {"chunk": chunk.number, "source": chunk.source, "parts": parts, "codes": key, "digest": digest}
                )
        return summary, tasks

    def _judge(self, summary: Summary) -> None:
        if not summary.documents and not self.plan.listing.token_stores:
            raise empty_corpus(len(self.plan.listing.files), summary.dropped)
        _check_readable(summary.documents, summary.dropped, self.data)

    def _write(
        self, chunks: Sequence[Chunk], tasks: list[dict[str, Any]], *, is_bulk: bool, dropped: Mapping[str, int]
    ) -> Iterator[tuple[int, ChunkResult]]:
        store, data = self.plan.store, self.data
        codes_of = [task["codes"] for task in tasks]
        ngrams_hash = store_validation_ngrams(store, chunks, codes_of, data) if data.decontaminate_ngram else ""
        writer = ChunkWriter(store, self.plan.tokenizer.to_json(), data, is_bulk, ngrams_hash)
        ordered = interleaved(chunks)
        total_bytes = sum(chunk.bytes for chunk in chunks)
        with DataProgress("tokenizing", total_bytes=total_bytes, num_tasks=len(chunks)) as progress:
            progress.drop(dropped)
            for answer in run_tasks([tasks[chunk.number] for chunk in ordered], writer):
                chunk, result = ordered[answer.number], ChunkResult.from_bytes(answer.content)
                tokens = sum(shard.tokens for shard in result.shards)
                progress.advance(chunk.bytes, documents=result.documents, tokens=tokens, rss_bytes=answer.rss_bytes)
                progress.drop({Drop.CONTAMINATED.value: result.contaminated})
                yield chunk.number, result

    def _manifest(self, summary: Summary, results: dict[int, ChunkResult]) -> Manifest:
        """Of the results so far, in canonical order."""
        ordered = [results[number] for number in sorted(results)]
        samples: dict[str, list[Any]] = {}
        contaminated = sum(result.contaminated for result in ordered)
        for result in ordered:
            for reason, found in result.samples.items():
                samples[reason] = [*samples.get(reason, []), *found][:5]
        weights = [weight / sum(self.data.weights) for weight in self.data.weights]
        return Manifest(
            tokenizer_hash=self.plan.tokenizer.hash,
            vocab_size=self.plan.tokenizer.vocab_size,
            eot_id=self.plan.tokenizer.eot_id,
            source_hash=summary.source_hash,
            config_hash=hashlib.sha256(canonical_json(_shaping(self.data))).hexdigest(),
            weights=tuple(weights),
            revisions=self.plan.listing.revisions,
            dropped=summary.dropped | {Drop.CONTAMINATED.value: contaminated},
            drop_samples=samples,
            replaced_utf8=sum(result.replaced for result in ordered),
            shards=tuple(sorted((shard for result in ordered for shard in result.shards), key=_source)),
        )


def _source(shard: Shard) -> int:
    return shard.source
