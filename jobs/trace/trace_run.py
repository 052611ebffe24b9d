"""Answers `raymill trace find`: which spans of a text stand word for word in what a run trains on,
in which documents, and at which steps the run learned them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from cluster.output.result_text import counted, lines, table
from cluster.storage.uris import Storage
from jobs.proof.step_outcomes import Outcome, StepOutcomes
from jobs.proof.stored_documents import first_words
from jobs.run.find_run import begun_ledger, data_identity, find_tokens, stores_with
from jobs.run.history import recorded_config
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import TokenStoreError
from jobs.trace.indexed_store import IndexedStore
from jobs.trace.learning import Learning
from jobs.trace.spans import SearchedStore, Span, find_spans, num_covered
from jobs.trace.trace_index import TraceIndexError
from jobs.trace.windows import Ids
from raymill.errors import UserError

MOST_PLACES = 1000
"""Places of a span that are listed, each with its document and steps."""

_SHOWN_PLACES = 5  # to people; --json has all that are listed
_SHOWN_CHARS = 70
_READERS = 16  # threads: from S3, a document's front is little but waiting


@dataclass(frozen=True)
class _Run:
    """A run, the indexed store that it was trained on, and what it learned of it."""

    run: Storage
    indexed: IndexedStore
    learning: Learning


def trace(run: Storage, text: str, *, min_tokens: int, step: int | None = None) -> dict[str, Any]:
    """Lists the maximal spans of a text, of at least `min_tokens`, that stand in what the run
    trains on. With `step`, only steps up to that one count, as its checkpoint knows no later ones.
    Raises `UserError`."""
    opened = _opened(run, step)
    indexed, learning = opened.indexed, opened.learning
    ids = indexed.encoded(text)
    pieces = chain.from_iterable(source.text for source in learning.order.texts)
    searched = SearchedStore(indexed.store, indexed.manifest, pieces)
    spans = find_spans(ids, indexed.index, searched, min_tokens=min_tokens)
    return {
        "run": run.uri,
        "store": indexed.store.uri,
        "step": learning.last_step,
        "tokens": len(ids),
        "traced_tokens": num_covered(spans),
        "document_map": indexed.mapped is not None,
        "spans": [_described(opened, ids, span) for span in spans],
    }


def _opened(run: Storage, step: int | None) -> _Run:
    """Opens a run with the store of its last attempt, or of a step."""
    ledger, config = begun_ledger(run), recorded_config(run)
    outcomes, identity = StepOutcomes(ledger), data_identity(ledger)
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
    learning = Learning(ledger, config, outcomes, indexed.store, indexed.manifest, last_step)
    return _Run(run, indexed, learning)


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


def _described(opened: _Run, ids: Ids, span: Span) -> dict[str, Any]:
    """Returns what is known of a span."""
    listed = span.pieces[:MOST_PLACES]
    with ThreadPoolExecutor(_READERS) as pool:
        places = [*pool.map(partial(_place, opened), listed)]
    turns = [turn for place in places for turn in place["turns"]]
    steps = sorted({turn["step"] for turn in turns if turn["outcome"] == Outcome.LEARNED})
    return {
        "start": span.start,
        "end": span.end,
        "tokens": span.end - span.start,
        "text": opened.indexed.tokenizer.decode(ids[span.start : span.end].tolist()),
        "occurrences": len(span.pieces),
        "occurrences_at_most": span.at_most or len(span.pieces),
        "verdict": _verdict(steps, turns),
        "steps": len(steps),
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "places": places,
    }


def _place(opened: _Run, piece: Piece) -> dict[str, Any]:
    """Returns the document of a place where a span stands, and the steps that took it."""
    turns = [*opened.learning.turns(piece)]
    learned = [turn["step"] for turn in turns if turn["outcome"] == Outcome.LEARNED]
    return {
        **_document(opened, piece),
        "shard": piece.shard.file,
        "token": piece.start,
        "first_step": min(learned, default=None),
        "last_step": max(learned, default=None),
        "turns": turns,
    }


def _document(opened: _Run, piece: Piece) -> dict[str, Any]:
    """Returns the document that holds a piece; without a map, none is known."""
    indexed = opened.indexed
    document = indexed.document(piece)
    if document is None or indexed.mapped is None:
        return {"file": None, "place": None, "text": None}
    return {
        "file": indexed.file(document),
        "place": document.place,
        "text": first_words(indexed.mapped, indexed.tokenizer, document),
    }


def _verdict(steps: Sequence[int], turns: Sequence[dict[str, Any]]) -> str:
    if steps:
        return f"learned at {counted(len(steps), 'step')}, first {steps[0]}, last {steps[-1]}"
    coming = [turn["step"] for turn in turns if turn["outcome"] == Outcome.NOT_TAKEN]
    if coming:
        return f"not learned yet: step {min(coming)} is to come"
    if turns:
        outcomes = sorted({turn["outcome"] for turn in turns})
        return f"not learned: {', '.join(outcomes)}"
    return "not learned: the run takes no row in which tokens of it count"


def as_text(result: dict[str, Any]) -> str:
    """Returns an answer as people read it."""
    head = (
        f"{result['traced_tokens']:,} of {result['tokens']:,} tokens stand in "
        f"{counted(len(result['spans']), 'span')} in what the run trains on\n"
    )
    if result["spans"] and not result["document_map"]:
        head += "documents are unknown: the store has no document map\n"
    return head + "".join(f"\n{_span_as_text(span)}" for span in result["spans"])


def _span_as_text(span: dict[str, Any]) -> str:
    words = " ".join(span["text"].split())
    at_least = "" if span["occurrences"] == span["occurrences_at_most"] else "at least "
    shown = {
        "span": f"{words[:_SHOWN_CHARS]}…" if len(words) > _SHOWN_CHARS else words,
        "tokens": f"{span['tokens']:,}, from token {span['start']:,} of the text",
        "occurrences": f"{at_least}{span['occurrences']:,}",
        "verdict": span["verdict"],
    }
    if span["occurrences"] > len(span["places"]):
        shown["verdict"] += f", of its first {len(span['places']):,} occurrences"
    places = []
    for place in span["places"][:_SHOWN_PLACES]:
        document = f"{place['file']}:{place['place']}"
        unknown = f"unknown, token {place['token']} of {place['shard']}"
        places.append(place | {"document": document if place["file"] else unknown})
    text = "".join(f"{line}\n" for line in lines(shown))
    text += table(("first_step", "last_step", "document", "text"), places)
    num_more = len(span["places"]) - len(places)
    return f"{text}and {num_more:,} more, which --json has\n" if num_more else text
