"""Answers for one checkpoint, as an endpoint asks: which spans of a text it learned word for word,
from which documents, at which steps, and with which loss then."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from cluster.storage.file_cache import FileCache
from cluster.storage.uris import Storage, open_storage
from jobs.proof.opened_run import Learning, OpenedRun
from jobs.proof.step_outcomes import Outcome
from jobs.run.find_run import find_run
from jobs.tokens.shard_reader import Piece
from jobs.trace.indexed_store import IndexedStore
from jobs.trace.spans import Span
from jobs.trace.trace_index import TRACE
from jobs.trace.tracing import Place, Trace, Tracing
from jobs.trace.windows import Ids
from model.text.token_bytes import TokenizerError
from raymill.errors import UserError

_NEAR = Path.home() / ".cache/raymill/trace"
_NEAR_BYTES = 8 << 30


class RefusedError(UserError):
    """A question is over a bound; `param` names its field."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class LineageError(UserError):
    """The checkpoint was trained on another token store than the index belongs to."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's record of its training."""

    uri: str
    run_id: str
    step: int
    data_manifest_hash: str | None
    data_identity: str | None


@dataclass(frozen=True)
class Question:
    """A text, or its tokens, and how much is to be said of it."""

    text: str | None
    tokens: list[int] | None
    min_tokens: int
    documents: int  # to be listed of a span
    context_tokens: int  # before a span, and behind it


@dataclass(frozen=True)
class Limits:
    """How much an answer may take."""

    max_tokens: int  # of a text
    max_listed: int  # places in an answer, each with its document; each span has one of them
    max_steps: int  # listed of a place


class CheckpointTrace:
    """The store that a checkpoint was trained on, and what the checkpoint learned of it; for one
    thread."""

    def __init__(
        self, checkpoint: Checkpoint, limits: Limits, *, store_uri: str, storage_uri: str
    ) -> None:
        """Opens the store. Raises `LineageError` for another store than the checkpoint's, and
        `TokenStoreError` for one without an index of its own."""
        self.checkpoint, self.limits = checkpoint, limits
        store = open_storage(store_uri.removesuffix(f"/{TRACE}"))
        is_here = store.local_path(TRACE) is not None
        near = None if is_here else FileCache(store, _NEAR, max_bytes=_NEAR_BYTES)
        self.indexed = IndexedStore.open(store, near=near)
        _require_lineage(checkpoint, self.indexed)
        self.indexed.index.bring_near()
        self.missing: list[str] = []
        if self.indexed.mapped is None:
            self.missing.append(
                "the token store has no document map, so documents are unknown; `raymill tokenize --documents` makes it"
            )
        self.tracing = Tracing(self.indexed, self._learning(storage_uri))

    def _learning(self, storage_uri: str) -> Learning | None:
        """Returns what the checkpoint's run has recorded; None where its ledger is not found."""
        beside, _, _ = self.checkpoint.uri.rpartition("/checkpoints/")
        store, manifest = self.indexed.store, self.indexed.manifest
        try:
            run = _found_run([beside, self.checkpoint.run_id], storage_uri)
            opened = OpenedRun.open(run)
        except UserError as error:
            self.missing.append(f"the steps are unknown: {error}")
            return None
        step = self.checkpoint.step
        if opened.outcomes.is_rolled_back(step):
            self.missing.append(
                f"{run.uri} went back behind step {step} later, so the steps that it left out then are not named, "
                "though the checkpoint has learned them"
            )
        return Learning(opened, store, manifest, step)

    def answer(self, question: Question) -> dict[str, Any]:
        """Returns the maximal spans. Raises `RefusedError`, and `TokenStoreError` for a part of the
        store or of the index that is missing."""
        ids = self._ids(question)
        traced = Trace(ids, ())
        if len(ids) >= question.min_tokens:
            traced = self.tracing.trace(ids, min_tokens=question.min_tokens)
        listed, num_spans = self.limits.max_listed, len(traced.spans)
        most = max(1, min(question.documents, listed // max(1, num_spans)))
        characters = self._characters(ids, question.text)
        return {
            "run": self.checkpoint.run_id,
            "step": self.checkpoint.step,
            "manifest_hash": self.indexed.manifest.hash,
            "text": self._text(ids, question.text),
            "num_tokens": len(ids),
            "traced_tokens": traced.num_covered,
            "num_spans": num_spans,
            "spans": [
                self._described(traced, span, characters, question.context_tokens, most)
                for span in traced.spans[:listed]
            ],
            "missing": self.missing,
        }

    def _ids(self, question: Question) -> Ids:
        param = "text" if question.tokens is None else "tokens"
        if question.tokens is None:
            assert question.text is not None, "one of the two is given"
            ids = self.indexed.encoded(question.text)
        else:
            ids = np.array(question.tokens, np.uint64)
        if len(ids) > self.limits.max_tokens:
            raise RefusedError(
                f"{param}: {len(ids):,} tokens, and at most {self.limits.max_tokens:,} are traced at once; divide "
                "the text",
                param=param,
            )
        return ids

    def _text(self, ids: Ids, text: str | None) -> str:
        return b"".join(self._pieces(ids)).decode(errors="replace") if text is None else text

    def _characters(self, ids: Ids, text: str | None) -> list[int] | None:
        """Returns where each token begins in the text, in characters, and its end; None where the
        tokenizer has changed the text."""
        pieces = self._pieces(ids)
        if text is not None and b"".join(pieces) != text.encode():
            return None
        # A character belongs to the token with its last byte
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        ends = accumulate(len(decoder.decode(piece)) for piece in pieces)
        return [0, *ends]

    def _pieces(self, ids: Ids) -> list[bytes]:
        """Returns what each token adds to the text; nothing for an id that the tokenizer lacks, as
        a model's vocabulary may be padded."""
        tokenizer = self.indexed.tokenizer
        pieces: list[bytes] = []
        for token in ids.tolist():
            bytes_of = tokenizer.token_bytes if pieces else tokenizer.first_bytes
            try:
                pieces.append(bytes_of(token))
            except TokenizerError:
                pieces.append(b"")
        return pieces

    def _described(
        self,
        traced: Trace,
        span: Span,
        characters: list[int] | None,
        context_tokens: int,
        most: int,
    ) -> dict[str, Any]:
        """Returns what is known of a span, with up to so many of its places."""
        places = [self.tracing.place(piece) for piece in span.pieces[:most]]
        steps = [step for place in places for step in place.steps]
        return {
            "tokens": [span.start, span.end],
            "characters": characters and [characters[span.start], characters[span.end]],
            "text": self.tracing.text(traced, span),
            "occurrences": len(span.pieces),
            "occurrences_at_most": span.at_most or len(span.pieces),
            "first_step": min(steps, default=None),
            "last_step": max(steps, default=None),
            "documents": [self._shown(place, context_tokens) for place in places],
        }

    def _shown(self, place: Place, context_tokens: int) -> dict[str, Any]:
        """Returns the document of a place, what is around it there, and the steps that learned
        it."""
        piece, document, steps = place.piece, place.document, place.steps
        before, behind = self._around(piece, context_tokens)
        return {
            "file": self.indexed.file(document) if document else None,
            "place": document.place if document else None,
            "tokens": document.tokens if document else None,
            "first_token": piece.start - document.start if document else None,
            "shard": piece.shard.file,
            "shard_token": piece.start,
            "before": before,
            "behind": behind,
            "num_steps": len(steps) if self.tracing.learning else None,
            "first_step": steps[0] if steps else None,
            "last_step": steps[-1] if steps else None,
            "steps": self._learned(place),
        }

    def _around(self, piece: Piece, num_tokens: int) -> tuple[str, str]:
        """Returns the text of a document before a place and behind it, up to so many tokens."""
        shard, eot_id = piece.shard, self.indexed.manifest.eot_id
        before = self._tokens(Piece(shard, max(0, piece.start - num_tokens), piece.start))
        behind = self._tokens(Piece(shard, piece.end, min(shard.tokens, piece.end + num_tokens)))
        if eot_id in before:
            before = before[len(before) - before[::-1].index(eot_id) :]
        if eot_id in behind:
            behind = behind[: behind.index(eot_id)]
        left_out = self.indexed.manifest.bos_id
        front = self.indexed.tokenizer.decode(
            [token for token in before if token != left_out], continues=True
        )
        rest = self.indexed.tokenizer.decode(behind, continues=True)
        return front.lstrip("\ufffd"), rest.rstrip("\ufffd")

    def _tokens(self, piece: Piece) -> list[int]:
        return self.tracing.searched.ids(piece).tolist()

    def _learned(self, place: Place) -> list[dict[str, Any]]:
        """Returns the first times that steps learned tokens of a place, each with the loss of its
        batch."""
        learning = self.tracing.learning
        if learning is None:
            return []
        learned = [time for time in place.taken if time.outcome is Outcome.LEARNED]
        return [
            {
                "step": time.step,
                "epoch": time.epoch,
                "tokens": time.tokens,
                "loss": learning.losses.get(time.step),
            }
            for time in learned[: self.limits.max_steps]
        ]


def _require_lineage(checkpoint: Checkpoint, indexed: IndexedStore) -> None:
    manifest = indexed.manifest
    if checkpoint.data_manifest_hash == manifest.hash:
        return
    if checkpoint.data_identity == manifest.identity:
        return  # the same shards, tokenized from another place
    raise LineageError(
        f"the index of {indexed.store.uri} belongs to the manifest hash {manifest.hash}, and {checkpoint.uri} was "
        f"trained on {checkpoint.data_manifest_hash or 'data that it does not name'}: give the index of its own store"
    )


def _found_run(references: Sequence[str], storage_uri: str) -> Storage:
    """Returns the first of these runs that is there. Raises `UserError` where none is."""
    problems: list[UserError] = []
    for reference in filter(None, references):
        try:
            return find_run(reference, storage_uri)
        except UserError as error:
            problems.append(error)
    raise problems[-1]
