"""Builds the token store of a corpus, with the same bytes for any number of workers, kills and
restarts.

Two passes go over the chunks of the corpus. The first indexes the documents; from the indexes
further tasks decide, in canonical order, which documents are kept. The second writes the shards.
Each task leaves its result in the store, so a job that was killed continues where it was. The
manifest comes last: without one there is no store.

The second pass also writes the document map. A finished store that has none gets it by the same two
passes, which then leave the shards as they are and prove that they would be made again.
"""

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.data import DataConfig
from cluster.settings.run import RunConfig, seq_len
from cluster.settings.setting import Shapes, names_shaping
from cluster.storage.lease import Lease
from cluster.storage.uris import Storage, join_uri, open_storage
from jobs.cleaning.decontamination import decontaminate
from jobs.cleaning.document_index import INDEX, index_corpus
from jobs.cleaning.selection import Summary, select
from jobs.corpus.chunks import Chunk, default_shard_bytes, plan_chunks
from jobs.corpus.documents import CHAT_DROPS, UNREADABLE, Drop
from jobs.corpus.empty_corpus import empty_corpus
from jobs.corpus.file_pieces import PIECES, cut_files
from jobs.corpus.listing import CorpusError, Listing, list_corpus, most_is_skipped, said_skipped
from jobs.corpus.progress import DataProgress
from jobs.corpus.ray_data_tasks import Runner, run_tasks
from jobs.tokens import token_store as stored
from jobs.tokens.document_map import (
    DOCUMENTS,
    TABLE_ENDING,
    DocumentList,
    FileOfCorpus,
    is_whole,
    read_map,
)
from jobs.tokens.ready_shards import copy_shards
from jobs.tokens.shard_writer import RESULT, ChunkResult, ChunkWriter
from jobs.tokens.train_tokenizer import ensure_tokenizer, text_sample
from model.text.bulk_encoder import bulk_encoder
from model.text.chat import format_to_train
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer

_DELETING_THREADS = 8
_MAPPING = "mapping"  # the folder of what leads to the map of a finished store


def tokenize(config: RunConfig, listing: Listing | None = None) -> dict[str, Any]:
    """Makes the token store of `config.data` under `config.storage`, or finds it there. Needs Ray.
    Lists the corpus if no listing of it is given.

    Raises `UserError`, also when no document is left to tokenize, and `LeaseHeldError` while
    another run writes it.
    """
    listing = listing or list_corpus(config.data.source, text_endings=config.data.text_endings)
    builder = store_builder(config, listing, ensure_tokenizer(config, listing)[0])
    if builder.listing.skipped:
        say(f"skipped {said_skipped(builder.listing)}; sources.json names them all")
    if warning := most_is_skipped(builder.listing):
        say(warning)
    manifest = _finished(builder.store)
    if manifest is None:
        with Lease(builder.store) as lease:
            manifest = builder.build(lease)
    elif config.data.map_documents and not _is_all_mapped(builder.store, manifest):
        with Lease(builder.store) as lease:
            replace(builder, work=builder.store.child(_MAPPING)).add_map(lease, manifest)
    _check_readable(manifest.total("documents"), manifest.dropped, config.data)
    return {
        "manifest": join_uri(builder.store.uri, stored.MANIFEST),
        "manifest_hash": manifest.hash,
        "documents": manifest.total("documents"),
        "tokens": manifest.total("tokens"),
        "bytes": manifest.total("bytes"),
        "dropped": manifest.dropped,
        "shards": {shard.file: shard.sha256 for shard in manifest.with_lists()[0].shards},
        "train_tokens": manifest.total("tokens", "train"),
        "val_tokens": manifest.total("tokens", "val"),
        "val_bytes": manifest.total("bytes", "val"),
        "document_map": builder.store.exists(DOCUMENTS),
    }


def store_builder(
    config: RunConfig, listing: Listing, tokenizer: Tokenizer, *, run: Runner = run_tasks
) -> "StoreBuilder":
    """Returns what builds the store, whose place the settings, the corpus and the tokenizer
    determine."""
    shard_bytes = config.data.shard_bytes or default_shard_bytes(listing.files)
    data = config.data.model_copy(update={"shard_bytes": shard_bytes})
    chat = format_to_train(tokenizer) if data.format == "chat" else None
    shape = data.model_dump(mode="json", include=names_shaping(DataConfig, Shapes.STORE))
    shape |= {} if tokenizer.bos_id is None else {"bos_id": tokenizer.bos_id}
    # Of a pair, before
    shape |= {} if data.near_dedup_threshold is None else {"near_duplicates": "of a family"}
    shape |= config.data.model_dump(include={"val_max_documents"}, exclude_none=True)
    shape |= {} if chat is None else {"chat": asdict(chat)}
    ready = [
        (n, uri, stored.read_manifest(open_storage(uri)).hash)
        for n, uri in sorted(listing.token_stores.items())
    ]
    shaping = [shape, listing.identity(), ready, tokenizer.hash]
    key = hashlib.sha256(stored.canonical_json(shaping)).hexdigest()[:12]
    store = open_storage(config.storage.uri).child(f"tokens/{key}")
    return StoreBuilder(data, listing, tokenizer, store, store, shape, chat, seq_len(config), run)


def _finished(store: Storage) -> stored.Manifest | None:
    if not store.exists(stored.MANIFEST):
        return None
    try:
        return stored.read_manifest(store)
    except stored.TokenStoreError as error:
        say(f"repairing the token store: {error}")
        return None


def _check_readable(documents: int, dropped: Mapping[str, int], data: DataConfig) -> None:
    unreadable = {reason: dropped[reason] for reason in UNREADABLE if dropped.get(reason)}
    total = documents + sum(dropped.values())
    if sum(unreadable.values()) > data.max_unreadable_fraction * total:
        counts = ", ".join(f"{count} {reason}" for reason, count in unreadable.items())
        raise CorpusError(
            f"{sum(unreadable.values())} of {total} documents cannot be read ({counts}), more than the share of "
            f"data.max_unreadable_fraction={data.max_unreadable_fraction}; `raymill data preview` shows some"
        )


def _is_all_mapped(store: Storage, manifest: stored.Manifest) -> bool:
    """Reports whether each shard has its table. One that was copied may have none so far."""
    mapped = read_map(store, manifest)
    return mapped is not None and not mapped.unmapped and is_whole(store, mapped)


@dataclass(frozen=True)
class StoreBuilder:
    """Builds one store, or the parts of it that are asked for."""

    data: DataConfig
    listing: Listing
    tokenizer: Tokenizer
    store: Storage
    work: Storage  # of what leads to the shards: the store itself, unless it is finished
    shape: dict[str, Any]  # the settings that shape the shards
    chat: ChatFormat | None
    seq_len: int
    run: Runner  # does the tasks

    def build(self, lease: Lease) -> stored.Manifest:
        """Writes the missing parts of the store and returns its manifest."""
        store, listing, tokenizer = self.store, self.listing, self.tokenizer
        # A kill within the last sweep left some of the results, not all
        if store.exists(stored.MANIFEST):
            self._sweep()
            store.delete(stored.MANIFEST)
        is_bulk = self.is_bulk_proven()
        store.write_bytes(stored.TOKENIZER, tokenizer.to_json())
        store.write_bytes(stored.SOURCES, stored.canonical_json(listing.record()))
        summary, results, files = self._results(lease, is_bulk=is_bulk, stores_shards=True)
        manifest = self.manifest(summary, results)
        for refused in manifest.drop_samples.get(Drop.TEMPLATE_REFUSED, [])[:1]:
            num_refused = manifest.dropped[Drop.TEMPLATE_REFUSED]
            verb = "is" if num_refused == 1 else "are"
            say(
                f"{counted(num_refused, 'conversation')} {verb} left out; the first: {refused.preview}"
            )
        if not manifest.shards:
            raise empty_corpus(listing.files, manifest.dropped)
        if num_long := sum(result.long for result in results.values()):
            say(
                f"{num_long:,} of {manifest.total('documents'):,} conversations have more than train.seq_len="
                f"{self.seq_len} tokens: what is beyond is trained on without its beginning; raise it, or shorten them"
            )
        lease.check()
        for name, content in manifest.with_lists()[1].items():
            store.write_bytes(name, content)
        self._list_documents(manifest, results, files)
        store.write_bytes(stored.MANIFEST, manifest.to_json())
        self._sweep()
        return manifest

    def add_map(self, lease: Lease, manifest: stored.Manifest) -> None:
        """Makes the document map of the finished store. Raises `TokenStoreError` where the corpus
        does not make its shards again."""
        say(f"mapping the documents of {self.store.uri}: its corpus is read and encoded again")
        is_bulk = self.is_bulk_proven()
        _, results, files = self._results(lease, is_bulk=is_bulk, stores_shards=False)
        made = _shards_of(results)
        if made != manifest.shards:
            self._sweep()  # else what was found in these files would count for others
            raise _other_shards(self.store, made, manifest.shards)
        lease.check()
        self._list_documents(manifest, results, files)
        self._sweep()

    def _results(
        self, lease: Lease, *, is_bulk: bool, stores_shards: bool
    ) -> tuple[Summary, dict[int, ChunkResult], list[FileOfCorpus]]:
        """Makes what is missing of the shards and their tables. Returns which documents are kept,
        the results of all chunks, and the files of the map."""
        chunks = self.planned()
        summary = self.select(chunks)
        files = self.listing.identity()
        results = self.copied(chunks, files)
        for chunk, result in self.written(
            chunks, summary, is_bulk=is_bulk, stores_shards=stores_shards
        ):
            results[chunk] = result
            lease.check()
        return summary, results, files

    @property
    def config_hash(self) -> str:
        """The SHA-256, in hex, of the settings that shape the shards."""
        return hashlib.sha256(stored.canonical_json(self.shape)).hexdigest()

    def planned(self) -> list[Chunk]:
        """Returns the chunks of the text, once its large archives are cut."""
        pieces = cut_files(self.work, self.listing.files, self.data, run=self.run)
        return plan_chunks(self.listing.files, pieces, self.data)

    def copied(
        self,
        chunks: Sequence[Chunk],
        files: list[FileOfCorpus],
        *,
        only: Container[int] | None = None,
    ) -> dict[int, ChunkResult]:
        """Copies the shards of finished stores, as `copy_shards` does."""
        return copy_shards(
            self.store,
            self.listing.token_stores,
            self.tokenizer,
            self.chat,
            first_chunk=len(chunks),
            files=files,
            only=only,
        )

    def written(
        self,
        chunks: Sequence[Chunk],
        summary: Summary,
        *,
        is_bulk: bool,
        stores_shards: bool = True,
    ) -> Iterator[tuple[int, ChunkResult]]:
        """Writes what is missing of some chunks, once their documents are selected, and yields the
        result of each."""
        writer = ChunkWriter(
            self.store,
            self.work,
            self.tokenizer.to_json(),
            self.data,
            is_bulk,
            self.chat,
            self.seq_len,
            stores_shards,
        )
        return _written(chunks, writer, summary.dropped, self.run)

    def _list_documents(
        self,
        manifest: stored.Manifest,
        results: Mapping[int, ChunkResult],
        files: list[FileOfCorpus],
    ) -> None:
        """Stores the list of the tables, without which there is no map."""
        made = chain.from_iterable(results[number].tables for number in sorted(results))
        tables = {table.shard: table for table in made}
        ordered = [tables[shard.file] for shard in manifest.shards if shard.file in tables]
        listed = DocumentList(manifest.hash, files, ordered)
        self.store.write_bytes(DOCUMENTS, listed.to_json())

    def _sweep(self) -> None:
        """Deletes what led to the shards, with their sidecars."""
        superseded: list[str] = []
        for prefix in (f"{INDEX}/", f"{PIECES}/", "shard-"):
            keys = (entry.key for entry in self.work.list(prefix))
            superseded += (key for key in keys if not key.endswith((".bin", TABLE_ENDING)))
        with ThreadPoolExecutor(_DELETING_THREADS) as pool:
            list(pool.map(self.work.delete, superseded))
        self.work.abort_uploads()

    def is_bulk_proven(self) -> bool:
        """Reports whether tiktoken gives the tokenizer's ids, also for the front of the corpus, and
        prints why not."""
        _, reason = bulk_encoder(self.tokenizer, sample=text_sample(self.listing, self.data))
        if reason:
            say(
                f"encoding with `tokenizers`, about eight times slower than with tiktoken's core: {reason}"
            )
        return reason is None

    def select(self, chunks: Sequence[Chunk]) -> Summary:
        """Decides which documents are kept, and stores that."""
        indexed = index_corpus(self.work, chunks, self.data, run=self.run)
        summary = select(self.work, indexed, self.data, run=self.run)
        if not summary.documents and not self.listing.token_stores:
            raise empty_corpus(self.listing.files, summary.dropped)
        _check_readable(summary.documents, summary.dropped, self.data)
        if self.data.decontaminate_ngram:
            contaminated = decontaminate(self.work, chunks, self.data, run=self.run)
            summary = replace(
                summary, dropped=summary.dropped | {Drop.CONTAMINATED.value: contaminated}
            )
        return summary

    def manifest(self, summary: Summary, results: dict[int, ChunkResult]) -> stored.Manifest:
        """Returns the manifest of the results, in canonical order."""
        ordered = [results[number] for number in sorted(results)]
        samples: dict[str, list[Any]] = {}
        dropped = summary.dropped | {
            Drop.TEMPLATE_REFUSED.value: sum(result.refused for result in ordered)
        }
        for result in ordered:
            for reason, found in result.samples.items():
                samples[reason] = [*samples.get(reason, []), *found][:5]
        return stored.Manifest(
            tokenizer_hash=self.tokenizer.hash,
            vocab_size=self.tokenizer.vocab_size,
            eot_id=self.tokenizer.eot_id,
            source_hash=summary.source_hash,
            config_hash=self.config_hash,
            weights=tuple(weight / sum(self.data.weights) for weight in self.data.weights),
            revisions=self.listing.revisions,
            dropped={r: n for r, n in dropped.items() if self.chat or r not in CHAT_DROPS},
            drop_samples=samples,
            replaced_utf8=sum(result.replaced for result in ordered),
            shards=_shards_of(results),
            bos_id=self.tokenizer.bos_id,
            chat=self.chat,
        )


def _other_shards(
    store: Storage, made: Sequence[stored.Shard], expected: Sequence[stored.Shard]
) -> stored.TokenStoreError:
    pairs = zip_longest(made, expected)
    first = next(before or now for now, before in pairs if now != before)
    assert first is not None, "of a pair that differs one is there"
    return stored.TokenStoreError(
        f"the corpus does not make the shards of {store.uri} again, the first that differs is {first.file}: its files "
        "have changed since; put them back as they were, or tokenize the text as it is now in another storage"
    )


def _shards_of(results: Mapping[int, ChunkResult]) -> tuple[stored.Shard, ...]:
    """Returns the shards of all chunks, in canonical order."""
    ordered = [results[number] for number in sorted(results)]
    return stored.in_order(chain.from_iterable(result.shards for result in ordered))


def _written(
    chunks: Sequence[Chunk], writer: ChunkWriter, dropped: Mapping[str, int], run: Runner
) -> Iterator[tuple[int, ChunkResult]]:
    """Yields the result of each chunk as it is written."""
    total_bytes = sum(chunk.bytes for chunk in chunks)
    with DataProgress("tokenizing", total_bytes=total_bytes, num_tasks=len(chunks)) as progress:
        progress.drop(dropped)
        for answer in run(chunks, writer):
            chunk, result = answer.item, RESULT.validate_json(answer.content)
            tokens = sum(shard.tokens for shard in result.shards)
            progress.advance(
                chunk.bytes,
                documents=result.documents,
                tokens=tokens,
                rss_bytes=answer.rss_bytes,
            )
            yield chunk.number, result
