"""Makes shards of a run's token store again from its corpus, and says whether the store holds the
same bytes.

    settings, tokenizer, files of the corpus ── compared with what the store says of itself
    duplicates, quality rules, contamination ── decided again for all documents, as the stage does
    shards drawn by hash(lot, name) ── written again, and compared, with their document tables

Who made the store cannot know which shards are drawn, if the lot comes later. The passes over all
documents decide which of them are kept, so none is left out: what they find is compared for the
whole store. All of it happens in this process, without a cluster.
"""

import hashlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil

from cluster.output.progress import say
from cluster.output.result_text import counted
from cluster.settings.data import TOKENS
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig
from cluster.storage.hub import HubStorage
from cluster.storage.uris import HF, Storage, absolute_uri, open_storage
from jobs.corpus.chunks import is_divisible
from jobs.corpus.listing import Listing, list_corpus
from jobs.corpus.ray_data_tasks import Result
from jobs.run.find_run import data_identity, find_tokens, stores_with
from jobs.run.history import recorded_config
from jobs.run.ledger import Ledger
from jobs.tokens.build_store import StoreBuilder, store_builder
from jobs.tokens.document_map import DOCUMENTS, DocumentMap, NoDocumentMapError
from jobs.tokens.shard_writer import ChunkResult
from jobs.tokens.store_comparison import (
    StoreComparison,
    chunk_of,
    listing_problems,
    manifest_problems,
    newer_files,
    read_sources,
    selection_problems,
)
from jobs.tokens.token_store import TOKENIZER, Manifest, Shard, canonical_json, read_manifest
from jobs.tokens.train_tokenizer import ensure_tokenizer, load_tokenizer
from model.text.chat import format_to_train
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError

_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass
class Outcome:
    """The result of making shards again."""

    store: str = ""
    shards: int = 0  # of the store
    drawn: list[str] = field(default_factory=list)
    made_again: int = 0  # the drawn ones, and those of the other split that come with them
    equal: int = 0
    read_bytes: int = 0  # of the corpus, about
    problems: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
    seconds: float = 0.0


def tokenized_again(run: Storage, *, num_shards: int, lot: str) -> Outcome:
    """Returns which of the store's shards were drawn, how many were
    made again and are equal, the `problems`, and what stays `uncovered`.

    A corpus or a store that cannot be read is a problem, too. Scratch files lie in the system's
    folder for them: the index of the documents, the text of large archives, copied shards and one
    chunk. Raises `ConfigError` for less than one shard.
    """
    if num_shards < 1:
        raise ConfigError(f"--tokenize {num_shards}: expected at least 1 shard")
    outcome = Outcome()
    start_s = time.monotonic()
    try:
        config = recorded_config(run)
        store = _store_of(run, config)
        manifest = read_manifest(store)
        numbers = {shard.file: chunk_of(shard) for shard in manifest.shards}
        drawn = drawn_by_lot(manifest.shards, num_shards, lot=lot)
        outcome.store, outcome.shards = store.uri, len(manifest.shards)
        outcome.drawn = [shard.file for shard in drawn]
        to_make = {numbers[file] for file in outcome.drawn}
        with tempfile.TemporaryDirectory(prefix="raymill-again-") as folder:
            scratch = open_storage(folder)
            again = _Again(config, store, manifest, to_make, scratch, outcome)
            try:
                again.compare()
            finally:
                again.say_uncovered()
    except UserError as error:
        outcome.problems.append(str(error))
    outcome.seconds = round(time.monotonic() - start_s, 3)
    return outcome


def drawn_by_lot(shards: Sequence[Shard], num_shards: int, *, lot: str) -> list[Shard]:
    """Returns different shards of either split, all of them where there are no more: those with the
    smallest hashes. So a larger sample begins with the smaller one."""

    def place(shard: Shard) -> bytes:
        return hashlib.sha256(f"{lot} {shard.file}".encode()).digest()

    return sorted(shards, key=place)[:num_shards]


def _store_of(run: Storage, config: RunConfig) -> Storage:
    """Returns the store that the run was trained on: of several with the same tokens, that of the
    settings' sources. Raises `TokenStoreError`."""
    identity = data_identity(Ledger.read(run))
    locations = [
        f"{TOKENS}{absolute_uri(name.removeprefix(TOKENS))}"
        if name.startswith(TOKENS)
        else absolute_uri(name)
        for name in config.data.source
    ]
    for store in stores_with(run, identity):
        recorded = read_sources(store)
        if recorded and recorded.sources == locations:
            return store
    return find_tokens(run, identity)


def _at_commit(source: str, commit: str) -> str:
    """Returns a dataset of the Hub at a commit, unless it names one itself; other sources as they
    are."""
    if not commit or not source.startswith(HF):
        return source
    dataset = HubStorage.at(source)
    is_pinned = _COMMIT.fullmatch(dataset.revision)
    return source if is_pinned else replace(dataset, revision=commit).uri


def _run_here(items: Sequence[Any], work: Callable[[Any], bytes]) -> Iterator[Result[Any]]:
    """Does the tasks in this process, one after the other."""
    for item in items:
        yield Result(item, work(item), psutil.Process().memory_info().rss)


@dataclass(frozen=True)
class _Again:
    """A store that is compared, a scratch folder, and what has come of it so far."""

    config: RunConfig
    store: Storage
    manifest: Manifest
    numbers: set[int]  # of the chunks that are made again
    scratch: Storage
    outcome: Outcome

    @property
    def corpus(self) -> str:
        return f"the corpus {', '.join(self.config.data.source)}"

    @property
    def is_whole(self) -> bool:
        """Whether all shards were drawn."""
        return len(self.outcome.drawn) == len(self.manifest.shards)

    def compare(self) -> None:
        """Makes the shards again, unless the files of the corpus or the tokenizer are others: then
        all shards would differ."""
        problems = self.outcome.problems
        try:
            listing = self._listed()
        except UserError as error:
            problems.append(f"{self.corpus} cannot be read here: {error}")
            return
        problems += listing_problems(read_sources(self.store), listing)
        tokenizer = self._stored_tokenizer()
        if tokenizer.hash != self.manifest.tokenizer_hash:
            problems.append(
                f"{TOKENIZER} has the hash {tokenizer.hash[:12]}…, the manifest says "
                f"{self.manifest.tokenizer_hash[:12]}…: it was exchanged"
            )
        is_pointless = bool(problems)
        storage = self.config.storage.model_copy(update={"uri": self.scratch.uri})
        config = self.config.model_copy(update={"storage": storage})
        try:
            builder = store_builder(config, listing, tokenizer, run=_run_here)
            if builder.config_hash != self.manifest.config_hash:
                problems.append(
                    f"the recorded settings have the hash {builder.config_hash[:12]}…, the manifest says "
                    f"{self.manifest.config_hash[:12]}…: the store was made with other settings"
                )
            if not is_pointless:
                self._say_cost(listing)
                problems += self._tokenizer_problems(config, listing)
                self._make(builder)
        except (UserError, OSError) as error:
            problems.append(f"{self.corpus} cannot be tokenized again here: {error}")

    def _listed(self) -> Listing:
        """Lists the corpus as it is now; a dataset of the Hub at the commit that the manifest
        names."""
        names = self.config.data.source
        locations = [_at_commit(name, self.manifest.revisions.get(name, "")) for name in names]
        listing = list_corpus(locations, text_endings=self.config.data.text_endings)
        commits = {
            name: listing.revisions[location]
            for name, location in zip(names, locations, strict=True)
            if location in listing.revisions
        }
        return replace(listing, revisions=commits)

    def _stored_tokenizer(self) -> Tokenizer:
        """Loads the store's tokenizer, with the format of its conversations, as a stranger's."""
        folder = self.scratch.child("stored")
        folder.write_bytes(TOKENIZER, self.store.read_bytes(TOKENIZER))
        if self.manifest.chat:
            folder.write_bytes("tokenizer_config.json", canonical_json(asdict(self.manifest.chat)))
        return load_tokenizer(folder.uri)[0]

    def _say_cost(self, listing: Listing) -> None:
        """Says what will be read before it is."""
        data = self.config.data
        corpus_bytes = sum(file.size for file in listing.files)
        num_passes = 1 if data.decontaminate_ngram is None else 3
        cut_bytes = sum(file.size for file in listing.files if not is_divisible(file))
        sample_bytes = 0 if data.tokenizer else min(corpus_bytes, data.tokenizer_sample_bytes)
        drawn = [shard for shard in self.manifest.shards if chunk_of(shard) in self.numbers]
        text_bytes = sum(shard.bytes for shard in drawn)
        read_bytes = num_passes * corpus_bytes + cut_bytes + sample_bytes + text_bytes
        self.outcome.read_bytes = read_bytes
        say(
            f"{counted(len(drawn), 'shard')} of {self.outcome.shards:,} will be made again: the corpus of "
            f"{counted(len(listing.files), 'file')}, {corpus_bytes / 1e6:,.2f} MB, is read "
            f"{'once' if num_passes == 1 else '3 times'} to select its documents; about {read_bytes / 1e6:,.2f} MB "
            "are read in all, by this one process"
        )

    def _tokenizer_problems(self, config: RunConfig, listing: Listing) -> list[str]:
        """Loads the tokenizer that the settings name, or trains it again, and compares it."""
        named = self.config.data.tokenizer
        name = named or ("of the first store" if listing.token_stores else "trained on the corpus")
        try:
            tokenizer, _ = ensure_tokenizer(config, listing, run=_run_here)
        except UserError as error:
            return [f"the tokenizer {name} cannot be compared here: {error}"]
        if tokenizer.hash != self.manifest.tokenizer_hash:
            return [
                f"the tokenizer {name} has the hash {tokenizer.hash[:12]}…, the store was made with "
                f"{self.manifest.tokenizer_hash[:12]}…"
            ]
        is_chat = self.config.data.format == "chat"
        if is_chat and format_to_train(tokenizer) != self.manifest.chat:
            return [f"the store's conversations have another format than the tokenizer {name} has"]
        return []

    def _make(self, builder: StoreBuilder) -> None:
        """Selects the documents of the whole corpus, makes the chunks of the drawn shards, and
        compares both."""
        problems, numbers = self.outcome.problems, self.numbers
        chunks = builder.planned()
        summary = builder.select(chunks)
        if builder.chat is None:  # of conversations the template may refuse some
            problems += selection_problems(builder.work, chunks, self.manifest)
        files = builder.listing.identity()
        results = builder.copied(chunks, files, only=None if self.is_whole else numbers)
        compared = StoreComparison(self.store, self.manifest, self._map(), builder.store, files)
        problems += compared.file_problems()
        for number, result in results.items():
            self._count(compared, number, result)
        wanted = [chunk for chunk in chunks if self.is_whole or chunk.number in numbers]
        is_bulk = builder.is_bulk_proven()
        for number, result in builder.written(wanted, summary, is_bulk=is_bulk):
            results[number] = result
            self._count(compared, number, result)
        for number in sorted(numbers - results.keys()):
            self._count(compared, number, ChunkResult())
        made = builder.manifest(summary, results)
        problems += manifest_problems(made, self.manifest, is_whole=self.is_whole)
        if made.source_hash != self.manifest.source_hash:
            problems += newer_files(read_sources(self.store), builder.listing)

    def _count(self, compared: StoreComparison, number: int, result: ChunkResult) -> None:
        """Compares a chunk, and deletes what was made of it."""
        for shard in compared.chunk(number, result):
            self.outcome.made_again += shard.is_made
            self.outcome.equal += not shard.problems
            self.outcome.problems += shard.problems
        for made in result.shards:
            compared.made.delete(made.file)

    def _map(self) -> DocumentMap | None:
        """Opens the store's document map; one that is of no use is a problem."""
        try:
            return DocumentMap(self.store, self.manifest)
        except NoDocumentMapError as error:
            if self.store.exists(DOCUMENTS):
                self.outcome.problems.append(str(error))
            return None

    def say_uncovered(self) -> None:
        """Adds what nothing was compared with."""
        uncovered, outcome = self.outcome.uncovered, self.outcome
        if num_left := outcome.shards - outcome.made_again:
            uncovered.append(
                f"the bytes of {num_left:,} of {counted(outcome.shards, 'shard')}, which were not made again"
            )
        if not self.is_whole:
            refused = " and of refused conversations" if self.manifest.chat else ""
            uncovered.append(
                f"what the manifest says of examples, of replaced bytes{refused}: only all shards together tell"
            )
        if not self.store.exists(DOCUMENTS):
            uncovered.append("from which files the documents are: the store has no document map")
        stores = [name for name in self.config.data.source if name.startswith(TOKENS)]
        if stores:
            uncovered.append(f"how the shards of {', '.join(stores)} were made of text")
        if sets := self.config.data.validation:
            uncovered.append(f"the token stores of the validation sets {', '.join(sets)}")
