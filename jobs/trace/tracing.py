"""From a text to the steps that learned it: its maximal spans, the places of the store where each
stands, and the steps that took tokens there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from jobs.proof.opened_run import Learning, Taken, learned_steps
from jobs.tokens.division import whole
from jobs.tokens.document_map import MappedDocument
from jobs.tokens.shard_reader import Piece
from jobs.trace.indexed_store import IndexedStore
from jobs.trace.spans import SearchedStore, Span, find_spans, num_covered
from jobs.trace.windows import Ids


@dataclass(frozen=True)
class Place:
    """A place of the store where a span stands."""

    piece: Piece
    document: MappedDocument | None  # None where the store has no map of it
    taken: Sequence[Taken]  # by the steps of the run; none where these are unknown

    @property
    def steps(self) -> list[int]:
        """The steps that learned tokens of it."""
        return learned_steps(self.taken)


@dataclass(frozen=True)
class Trace:
    """The maximal spans of a text."""

    ids: Ids  # (N,), of the text
    spans: Sequence[Span]

    @property
    def num_covered(self) -> int:
        """Tokens of the text that stand in a span."""
        return num_covered(self.spans)


@dataclass(frozen=True)
class Tracing:
    """A store in which texts are traced, and what a run learned of it; for one thread."""

    indexed: IndexedStore
    learning: Learning | None  # None where the run is unknown

    @cached_property
    def searched(self) -> SearchedStore:
        """The texts that the run trains on, without what it forgets; all that is not held out in the store, where it
        is unknown."""
        store, manifest = self.indexed.store, self.indexed.manifest
        if self.learning is not None:
            pieces = chain.from_iterable(text.text for text in self.learning.order.texts)
            return SearchedStore(store, manifest, self.learning.holes.outside(pieces))
        trained = [shard for shard in manifest.shards if shard.split == "train"]
        return SearchedStore(store, manifest, whole(trained))

    def trace(self, ids: Ids, *, min_tokens: int) -> Trace:
        """Finds the maximal spans of a text's ids (N,), of at least `min_tokens`. Raises what
        `find_spans` does."""
        spans = find_spans(ids, self.indexed.index, self.searched, min_tokens=min_tokens)
        return Trace(ids, spans)

    def text(self, trace: Trace, span: Span) -> str:
        return self.indexed.tokenizer.decode(trace.ids[span.start : span.end].tolist())

    def place(self, piece: Piece) -> Place:
        """Returns the document of a place where a span stands, and the steps that took it."""
        document, learning = self.indexed.document(piece), self.learning
        taken = learning.taken(learning.order.stretches(*piece)) if learning else ()
        return Place(piece, document, taken)
