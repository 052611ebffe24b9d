"""Answers `raymill trace find`: which spans of a text stand word for word in what a run trains on,
in which documents, and at which steps the run learned them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.output.json_result import JsonResult
from cluster.output.result_text import counted, lines, table
from cluster.storage.uris import Storage
from jobs.proof.opened_run import Learning, OpenedRun, Taken, learned_steps
from jobs.proof.step_outcomes import Outcome
from jobs.proof.stored_documents import first_words
from jobs.run.find_run import find_tokens, stores_with
from jobs.tokens.document_map import MappedDocument
from jobs.tokens.token_store import TokenStoreError
from jobs.trace.indexed_store import IndexedStore
from jobs.trace.spans import Span
from jobs.trace.trace_index import TraceIndexError
from jobs.trace.tracing import Place, Trace, Tracing
from raymill.errors import UserError

MOST_PLACES = 1000
"""Places of a span that are listed, each with its document and steps."""

_SHOWN_PLACES = 5  # to people; --json has all that are listed
_SHOWN_CHARS = 70
_READERS = 16  # threads: from S3, a document's front is little but waiting


@dataclass(frozen=True)
class TracedPlace(JsonResult):
    """Where a span stands, and what the run made of it."""

    file: str | None  # None without a document map
    place: int | None  # its first byte in the file
    text: str | None  # the document's first words
    shard: str
    token: int  # of the shard
    first_step: int | None
    last_step: int | None
    turns: list[dict[str, Any]]  # `Taken`, without the row

    def row(self) -> dict[str, Any]:
        """Returns a row of a table for people."""
        unknown = f"unknown, token {self.token} of {self.shard}"
        document = f"{self.file}:{self.place}" if self.file else unknown
        return self.json() | {"document": document}


@dataclass(frozen=True)
class TracedSpan(JsonResult):
    """A span of the text, in tokens, that stands in what a run trains on."""

    start: int
    end: int
    tokens: int
    text: str
    occurrences: int
    occurrences_at_most: int
    verdict: str
    steps: int
    first_step: int | None
    last_step: int | None
    places: list[TracedPlace]  # of the first `MOST_PLACES` occurrences

    def shown(self) -> str:
        """Returns it as people read it."""
        words = " ".join(self.text.split())
        at_least = "" if self.occurrences == self.occurrences_at_most else "at least "
        facts = {
            "span": f"{words[:_SHOWN_CHARS]}…" if len(words) > _SHOWN_CHARS else words,
            "tokens": f"{self.tokens:,}, from token {self.start:,} of the text",
            "occurrences": f"{at_least}{self.occurrences:,}",
            "verdict": self.verdict,
        }
        if self.occurrences > len(self.places):
            facts["verdict"] += f", of its first {len(self.places):,} occurrences"
        text = "".join(f"{line}\n" for line in lines(facts))
        rows = [place.row() for place in self.places[:_SHOWN_PLACES]]
        text += table(("first_step", "last_step", "document", "text"), rows)
        num_more = len(self.places) - len(rows)
        return f"{text}and {num_more:,} more, which --json has\n" if num_more else text


@dataclass(frozen=True)
class TracedText(JsonResult):
    """The spans of a text that stand in the texts of a run."""

    run: str
    store: str
    step: int  # the last that counts
    tokens: int
    traced_tokens: int
    document_map: bool  # whether the store has one
    spans: list[TracedSpan]

    def text(self) -> str:
        """Returns it as people read it."""
        head = (
            f"{self.traced_tokens:,} of {self.tokens:,} tokens stand in "
            f"{counted(len(self.spans), 'span')} in what the run trains on\n"
        )
        if self.spans and not self.document_map:
            head += "documents are unknown: the store has no document map\n"
        return head + "".join(f"\n{span.shown()}" for span in self.spans)


def trace(run: Storage, text: str, *, min_tokens: int, step: int | None = None) -> TracedText:
    """Lists the maximal spans of a text, of at least `min_tokens`, that stand in what the run
    trains on. With `step`, only steps up to that one count, as its checkpoint knows no later ones.
    Raises `UserError`."""
    learning, indexed = _opened(run, step)
    tracing = Tracing(indexed, learning)
    traced = tracing.trace(indexed.encoded(text), min_tokens=min_tokens)
    return TracedText(
        run.uri,
        indexed.store.uri,
        learning.last_step,
        tokens=len(traced.ids),
        traced_tokens=traced.num_covered,
        document_map=indexed.mapped is not None,
        spans=[_described(tracing, traced, span) for span in traced.spans],
    )


def _opened(run: Storage, step: int | None) -> tuple[Learning, IndexedStore]:
    """Opens a run with the store of its last attempt, or of a step."""
    opened = OpenedRun.open(run)
    outcomes, identity = opened.outcomes, opened.identity()
    if step is not None:
        if not 1 <= step <= outcomes.last_step:
            raise UserError(f"--step {step}: {run.uri} has taken steps 1 to {outcomes.last_step}")
        if outcomes.is_rolled_back(step):
            raise UserError(
                f"--step {step}: {run.uri} went back behind this step, so its weights are not the "
                "run's; name another one"
            )
        identity = outcomes.identity(step)
    indexed = _indexed_store(run, identity)
    last_step = step or outcomes.last_step
    return Learning(opened, indexed.store, indexed.manifest, last_step), indexed


def _indexed_store(run: Storage, identity: str | None) -> IndexedStore:
    """Returns a store with this identity that has an index; of several, one that also has a
    document map. Raises `UserError`."""
    find_tokens(run, identity)  # says where it looked, if there is no such store
    opened: list[IndexedStore] = []
    problems: list[TokenStoreError] = []
    for store in stores_with(run, identity):
        try:
            opened.append(IndexedStore.open(store))
        except TraceIndexError as error:
            problems.append(error)
    if not opened:
        raise problems[0]
    return next((indexed for indexed in opened if indexed.mapped), opened[0])


def _described(tracing: Tracing, traced: Trace, span: Span) -> TracedSpan:
    """Returns what is known of a span."""
    with ThreadPoolExecutor(_READERS) as pool:
        places = [*pool.map(tracing.place, span.pieces[:MOST_PLACES])]
        shown = [*pool.map(partial(_shown, tracing.indexed), places)]
    taken = [time for place in places for time in place.taken]
    steps = learned_steps(taken)
    return TracedSpan(
        span.start,
        span.end,
        tokens=span.end - span.start,
        text=tracing.text(traced, span),
        occurrences=len(span.pieces),
        occurrences_at_most=span.at_most or len(span.pieces),
        verdict=_verdict(steps, taken),
        steps=len(steps),
        first_step=steps[0] if steps else None,
        last_step=steps[-1] if steps else None,
        places=shown,
    )


def _shown(indexed: IndexedStore, place: Place) -> TracedPlace:
    steps = place.steps
    turns = [
        {name: value for name, value in time.json().items() if name != "sample"}
        for time in place.taken
    ]
    return TracedPlace(
        *_document(indexed, place.document),
        shard=place.piece.shard.file,
        token=place.piece.start,
        first_step=steps[0] if steps else None,
        last_step=steps[-1] if steps else None,
        turns=turns,
    )


def _document(
    indexed: IndexedStore, document: MappedDocument | None
) -> tuple[str | None, int | None, str | None]:
    """Returns a document's file, its place there and its first words."""
    if document is None or indexed.mapped is None:
        return None, None, None
    words = first_words(indexed.mapped, indexed.tokenizer, document)
    return indexed.file(document), document.place, words


def _verdict(steps: Sequence[int], taken: Sequence[Taken]) -> str:
    if steps:
        return f"learned at {counted(len(steps), 'step')}, first {steps[0]}, last {steps[-1]}"
    coming = [time.step for time in taken if time.outcome is Outcome.NOT_TAKEN]
    if coming:
        return f"not learned yet: step {min(coming)} is to come"
    if taken:
        return f"not learned: {', '.join(sorted({time.outcome for time in taken}))}"
    return "not learned: the run takes no row in which tokens of it count"
