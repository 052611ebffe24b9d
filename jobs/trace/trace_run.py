"""Answers `raymill trace find`: which spans of a text stand word for word in what a run trains on,
in which documents, and at which steps the run learned them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from cluster.output.result_text import counted, lines, table
from cluster.settings.run import batch_schedule
from cluster.storage.uris import Storage
from jobs.corpus.text_borders import cut_text
from jobs.proof.step_outcomes import Outcome, StepOutcomes
from jobs.proof.stored_documents import first_words
from jobs.proof.training_order import Marks, TrainingOrder
from jobs.run.find_run import (
    begun_ledger,
    data_identity,
    division,
    find_tokens,
    last_start,
    stores_with,
)
from jobs.run.history import recorded_config
from jobs.tokens.document_map import DocumentMap, read_map
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import TOKENIZER, Manifest, TokenStoreError, read_manifest
from jobs.trace.spans import SearchedStore, Span, find_spans
from jobs.trace.trace_index import TraceIndex, TraceIndexError
from jobs.trace.windows import Ids
from model.errors import UserError
from model.text.bulk_encoder import PlainEncoder
from model.text.tokenizer import Tokenizer

MOST_PLACES = 1000
"""Places of a span that are listed, each with its document and steps."""

_SHOWN_PLACES = 5  # to people; --json has all that are listed
_SHOWN_CHARS = 70
_READERS = 16  # threads: from S3, a document's front is little but waiting


@dataclass(frozen=True)
class _Run:
    """A run, the store that it was trained on, and the store's index."""

    run: Storage
    store: Storage
    manifest: Manifest
    index: TraceIndex
    mapped: DocumentMap | None
    order: TrainingOrder
    outcomes: StepOutcomes
    identity: str | None
    last_step: int  # that counts: the run's, or that of the checkpoint which is asked about
    tokenizer: Tokenizer

    @property
    def is_counted(self) -> Callable[[Piece], Marks] | None:
        """Marks the tokens of a piece that the loss counts; None where it counts all of them."""
        return None if self.manifest.chat is None else self._is_answer

    def _is_answer(self, piece: Piece) -> Marks:
        dtype = self.manifest.dtype
        start, end = piece.start * dtype.itemsize, piece.end * dtype.itemsize
        content = self.store.read_bytes(piece.shard.file, start=start, end=end)
        return np.frombuffer(content, dtype) >= 0


def trace(run: Storage, text: str, *, min_tokens: int, step: int | None = None) -> dict[str, Any]:
    """Lists the maximal spans of a text, of at least `min_tokens`, that stand in what the run
    trains on. With `step`, only steps up to that one count, as its checkpoint knows no later ones.
    Raises `UserError`."""
    opened = _opened(run, step)
    ids = encoded(opened.tokenizer, text)
    pieces = chain.from_iterable(source.text for source in opened.order.texts)
    searched = SearchedStore(opened.store, opened.manifest, pieces)
    spans = find_spans(ids, opened.index, searched, min_tokens=min_tokens)
    return {
        "run": run.uri,
        "store": opened.store.uri,
        "step": opened.last_step,
        "tokens": len(ids),
        "traced_tokens": _num_covered(spans),
        "document_map": opened.mapped is not None,
        "spans": [_described(opened, ids, span) for span in spans],
    }


def encoded(tokenizer: Tokenizer, text: str) -> Ids:
    """Returns the ids of a text (N,), as those of a document of a store without its borders."""
    pieces = PlainEncoder(tokenizer).encode_pieces(cut_text(text))
    return np.fromiter(chain.from_iterable(pieces), np.uint64)


def _opened(run: Storage, step: int | None) -> _Run:
    """Opens a run with the store of its last attempt, or of a step."""
    ledger, config = begun_ledger(run), recorded_config(run)
    outcomes, schedule = StepOutcomes(ledger), batch_schedule(config)
    identity = data_identity(ledger)
    if step is not None:
        if not 1 <= step <= outcomes.last_step:
            raise UserError(f"--step {step}: {run.uri} has taken steps 1 to {outcomes.last_step}")
        if outcomes.is_rolled_back(step):
            raise UserError(
                f"--step {step}: {run.uri} went back behind this step, so its weights are not the "
                "run's; name another one"
            )
        identity = outcomes.identity(step)
    store, manifest, index = _indexed_store(run, identity)
    order = TrainingOrder(
        manifest,
        division(last_start(ledger, identity)),
        schedule,
        seed=config.train.seed,
        window_rows=config.train.shuffle_window_rows,
    )
    return _Run(
        run,
        store,
        manifest,
        index,
        read_map(store, manifest),
        order,
        outcomes,
        identity,
        step or outcomes.last_step,
        Tokenizer.from_json(store.read_bytes(TOKENIZER)),
    )


def _indexed_store(run: Storage, identity: str | None) -> tuple[Storage, Manifest, TraceIndex]:
    """Returns a store with this identity that has an index; of several, one that also has a
    document map. Raises `UserError`."""
    find_tokens(run, identity)  # says where it looked, if there is no such store
    indexed: list[tuple[Storage, Manifest, TraceIndex]] = []
    problems: list[TokenStoreError] = []
    for store in stores_with(run, identity):
        try:
            manifest = read_manifest(store)
            indexed.append((store, manifest, TraceIndex(store, manifest)))
        except TraceIndexError as error:
            problems.append(error)
    if not indexed:
        raise problems[0]
    mapped = (known for known in indexed if read_map(*known[:2]))
    return next(mapped, indexed[0])


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
        "text": opened.tokenizer.decode(ids[span.start : span.end].tolist()),
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
    turns = [*_turns(opened, piece)]
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
    documents = opened.mapped and opened.mapped.documents_of(piece.shard.file)
    if not opened.mapped or not documents:
        return {"file": None, "place": None, "text": None}
    document = documents.document(documents.number_at(piece.start))
    return {
        "file": opened.mapped.files[document.file][0],
        "place": document.place,
        "text": first_words(opened.mapped, opened.tokenizer, document),
    }


def _turns(opened: _Run, piece: Piece) -> Iterator[dict[str, Any]]:
    """Yields each time that a step takes tokens of a piece, in the order of steps."""
    order = opened.order
    for stretch in order.stretches(*piece):
        rows = order.rows(stretch)
        counts = order.tokens_by_row(stretch, rows, is_counted=opened.is_counted)
        for turn in order.turns(stretch.source, rows):
            if num_tokens := counts[turn.row - rows.start]:
                yield {
                    "step": turn.step,
                    "lane": turn.lane,
                    "epoch": turn.epoch + 1,
                    "tokens": num_tokens,
                    "outcome": _outcome(opened, turn.step).value,
                }


def _outcome(opened: _Run, step: int) -> Outcome:
    """Returns what became of a step up to the one that counts."""
    if step > opened.last_step:
        return Outcome.NOT_TAKEN
    return opened.outcomes.outcome(step, opened.identity)


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


def _num_covered(spans: Sequence[Span]) -> int:
    """Returns how many tokens of the text are in spans, which may overlap."""
    covered, end = 0, 0
    for span in spans:
        covered += span.end - max(span.start, end)
        end = span.end
    return covered


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
