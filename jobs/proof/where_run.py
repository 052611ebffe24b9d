"""Answers `raymill where`: at which steps of a run a document was learned, and which documents a
step took."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from cluster.output.json_result import JsonResult
from cluster.output.result_text import counted, lines, table
from cluster.storage.uris import Storage
from jobs.proof.missing_documents import file_note
from jobs.proof.opened_run import Learning, OpenedRun, Taken, learned_steps
from jobs.proof.step_outcomes import Outcome
from jobs.proof.stored_documents import Asked, find_by_place, find_by_text, first_words
from jobs.proof.training_order import Stretch, TrainingOrder, Turn
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.find_run import find_tokens, stores_with
from jobs.run.history import CONFIG_FILE
from jobs.tokens.document_map import DocumentMap, MappedDocument, NoDocumentMapError
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import TOKENIZER, read_manifest
from model.text.tokenizer import Tokenizer

_SHOWN_TURNS = 40  # to people; --json has all
_READERS = 16  # threads: from S3, a document's front is little but waiting


@dataclass(frozen=True)
class MappedRun:
    """The part of its store that a run has learned, and the documents of that."""

    learning: Learning
    mapped: DocumentMap
    tokenizer: Tokenizer


@dataclass(frozen=True)
class LearnedDocuments(JsonResult):
    """The account of a document, or of the documents of a file."""

    file: str
    place: int | None  # None for more than one document
    documents: int
    tokens: int
    held_out_tokens: int
    text: str  # the first words
    verdict: str
    first_step: int | None  # that learned them
    last_step: int | None
    checkpoint_before: str | None  # the newest one that is kept and knows nothing of them
    file_now: str | None  # how the file differs from what it was
    turns: list[Taken]


@dataclass(frozen=True)
class DocumentSteps(JsonResult):
    """Where the documents are that were asked for."""

    store: str
    documents: list[LearnedDocuments]


@dataclass(frozen=True)
class TaughtDocument(JsonResult):
    """A document, or a part of it, that a row of a step teaches."""

    file: str | None  # None where the store has no map of the shard
    place: int | None
    shard: str
    text: str | None  # the first words
    tokens: int  # that the loss counts
    targets: list[int]  # of the row: the first that is a token of it, and the first behind it

    @property
    def name(self) -> str:
        return f"{self.file}:{self.place}" if self.file else f"unknown, in {self.shard}"

    def json(self) -> dict[str, Any]:
        unsaid = "shard" if self.file else "text"
        return {name: value for name, value in super().json().items() if name != unsaid}


@dataclass(frozen=True)
class TaughtRow(JsonResult):
    lane: int
    sample: int
    epoch: int
    documents: list[TaughtDocument]


@dataclass(frozen=True)
class StepDocuments(JsonResult):
    """The rows of a step, with the documents that each teaches."""

    store: str
    step: int
    outcome: Outcome
    rows: list[TaughtRow]


def where(
    run: Storage, *, document: str | None = None, text: str | None = None, step: int | None = None
) -> DocumentSteps | StepDocuments:
    """Answers one of the three questions: where is the document `FILE[:PLACE]`, or the one with
    this text, and which documents are in this step? Raises `UserError`."""
    if step is not None:
        return documents_of_step(run, step)
    opened = with_documents(OpenedRun.open(run))
    if document is not None:
        asked = find_by_place(opened.mapped, document, opened.learning.opened.config.data)
    else:
        assert text is not None, "one of the three is asked"
        asked = find_by_text(opened.mapped, opened.tokenizer, text)
    return DocumentSteps(opened.mapped.store.uri, [_steps_of(opened, each) for each in asked])


def with_documents(opened: OpenedRun, step: int | None = None) -> MappedRun:
    """Opens the documents of the store of a run's last attempt, or of a step."""
    mapped = _mapped_store(opened.run, opened.identity(step))
    learning = Learning(opened, mapped.store, mapped.manifest, opened.outcomes.last_step)
    tokenizer = Tokenizer.from_json(mapped.store.read_bytes(TOKENIZER))
    return MappedRun(learning, mapped, tokenizer)


def _mapped_store(run: Storage, identity: str | None) -> DocumentMap:
    """Returns the map of a store with this identity, of any that has one. Raises
    `NoDocumentMapError`."""
    find_tokens(run, identity)  # says where it looked, if there is no such store
    why = ""
    for store in stores_with(run, identity):
        try:
            return DocumentMap(store, read_manifest(store))
        except NoDocumentMapError as error:
            why = why or str(error)
    raise NoDocumentMapError(
        f"{why}; `raymill tokenize --documents` with the run's settings, which are in {run.uri}/{CONFIG_FILE}, makes "
        "it from the same files"
    )


def _steps_of(opened: MappedRun, asked: Asked) -> LearnedDocuments:
    mapped, learning, first = opened.mapped, opened.learning, asked.found[0].first
    count = sum(found.documents for found in asked.found)
    stretches = _stretches(learning.order, asked)
    taken = learning.taken(stretches)
    learned = learned_steps(taken)
    num_tokens = sum(found.end - found.first.start for found in asked.found)
    in_training = sum(stretch.end - stretch.start for stretch in stretches)
    return LearnedDocuments(
        file=mapped.files[asked.file][0],
        place=first.place if count == 1 else None,
        documents=count,
        tokens=num_tokens,
        held_out_tokens=num_tokens - in_training,
        text=first_words(mapped, opened.tokenizer, first),
        verdict=_verdict(learning, stretches, taken),
        first_step=learned[0] if learned else None,
        last_step=learned[-1] if learned else None,
        checkpoint_before=_checkpoint_before(learning.opened, learned),
        file_now=file_note(mapped, asked.file) or None,
        turns=taken,
    )


def _stretches(order: TrainingOrder, asked: Asked) -> list[Stretch]:
    """Returns where the documents lie in the texts that train, joined where they meet."""
    parts: list[Stretch] = []
    for found in asked.found:
        parts += order.stretches(found.shard, found.first.start, found.end)
    joined: list[Stretch] = []
    for part in sorted(parts, key=lambda part: (part.source, part.start)):
        meets = joined and (joined[-1].source, joined[-1].end) == (part.source, part.start)
        start = joined.pop().start if meets else part.start
        joined.append(Stretch(part.source, start, part.end))
    return joined


def _verdict(learning: Learning, stretches: Sequence[Stretch], taken: Sequence[Taken]) -> str:
    if steps := learned_steps(taken):
        return f"learned at {counted(len(steps), 'step')}, first {steps[0]}, last {steps[-1]}"
    if not stretches:
        return "held out to validate the run, and not trained on"
    if why := _why_never(learning, stretches):
        return why
    if not taken:
        return "not learned: the run ends before it takes a row with tokens of it that count"
    first_of: dict[Outcome, int] = {}
    for time in taken:
        first_of.setdefault(time.outcome, time.step)
    if coming := first_of.get(Outcome.NOT_TAKEN):
        return f"not learned yet: step {coming} is to come, the run is at step {learning.last_step}"
    return "not learned: " + ", ".join(
        f"{outcome} at step {at}" for outcome, at in first_of.items()
    )


def _why_never(learning: Learning, stretches: Sequence[Stretch]) -> str:
    """Says why no step could learn these tokens; nothing where one could."""
    if all(map(learning.is_forgotten, stretches)):
        return "forgotten: the run is trained without it"
    if not any(learning.order.rows(stretch) for stretch in stretches):
        return "not learned: it is in the last tokens of the text, which fill no whole row"
    return ""


def _checkpoint_before(opened: OpenedRun, learned: Sequence[int]) -> str | None:
    """Returns the newest kept checkpoint of the run that knows nothing of these steps."""
    before = [
        name
        for name in RunCheckpoints(opened.run).names
        if step_of(name) < min(learned, default=0)
        and not opened.outcomes.is_rolled_back(step_of(name))
    ]
    return before[-1] if before else None


def documents_of_step(run: Storage, step: int) -> StepDocuments:
    """Returns the rows of a step, each with the documents that it teaches. Raises `UserError`, such
    as `NoDocumentMapError`."""
    opened = with_documents(OpenedRun.open(run), step)
    mapped, learning = opened.mapped, opened.learning
    turns = learning.order.turns_of_step(step)
    with ThreadPoolExecutor(_READERS) as pool:
        parts_of_rows = [*pool.map(partial(_documents_of, opened), turns)]
        every_part = chain.from_iterable(parts_of_rows)
        documents = {document for document, _ in every_part if document is not None}
        words = partial(first_words, mapped, opened.tokenizer)
        texts = dict(zip(documents, pool.map(words, documents), strict=True))
    rows: list[TaughtRow] = []
    for turn, parts in zip(turns, parts_of_rows, strict=True):
        taught = _taught(opened, parts, texts)
        rows.append(TaughtRow(turn.lane, turn.sample, turn.epoch + 1, taught))
    return StepDocuments(mapped.store.uri, step, learning.outcome(step), rows)


def _documents_of(opened: MappedRun, turn: Turn) -> list[tuple[MappedDocument | None, Piece]]:
    """Returns the documents of a row, each with the piece of it that the row teaches; None for the
    piece of a shard that has no table."""
    parts: list[tuple[MappedDocument | None, Piece]] = []
    order = opened.learning.order
    for piece in order.pieces(order.targets(turn)):
        documents = opened.mapped.documents_of(piece.shard.file)
        start = piece.start
        while documents and start < piece.end:
            document = documents.document(documents.number_at(start))
            end = min(piece.end, document.end)
            parts.append((document, Piece(piece.shard, start, end)))
            start = end
        if documents is None:
            parts.append((None, piece))
    return parts


def _taught(
    opened: MappedRun,
    parts: Sequence[tuple[MappedDocument | None, Piece]],
    texts: dict[MappedDocument, str],
) -> list[TaughtDocument]:
    """Returns the documents of a row, whose targets they share out in order."""
    taught: list[TaughtDocument] = []
    first = 0
    for document, piece in parts:
        targets = [first, first + piece.end - piece.start]
        first = targets[1]
        file = opened.mapped.files[document.file][0] if document else None
        taught.append(
            TaughtDocument(
                file=file,
                place=document.place if document else None,
                shard=piece.shard.file,
                text=texts[document] if document else None,
                tokens=opened.learning.num_counted(piece),
                targets=targets,
            )
        )
    return taught


def as_text(answer: DocumentSteps | StepDocuments) -> str:
    """Returns an answer as people read it: the steps of a document, or the documents of a step, as
    a table."""
    if isinstance(answer, StepDocuments):
        return _step_as_text(answer)
    return "\n".join(map(_document_as_text, answer.documents))


def _document_as_text(document: LearnedDocuments) -> str:
    place = "" if document.place is None else f":{document.place}"
    shown: dict[str, Any] = {"document": f"{document.file}{place}"}
    if document.documents > 1:
        shown["documents"] = document.documents
    shown["tokens"] = document.tokens
    if document.held_out_tokens:
        shown["of them held out"] = document.held_out_tokens
    shown |= {"text": document.text, "verdict": document.verdict}
    if document.first_step is not None:
        newest = document.checkpoint_before
        shown["checkpoint before"] = newest or f"none is kept before step {document.first_step}"
    if document.file_now:
        shown["file now"] = f"{document.file_now}; the steps are those of the text as it was"
    text = "".join(f"{line}\n" for line in lines(shown))
    turns = [time.json() for time in document.turns]
    if turns:
        names = ("step", "lane", "epoch", "tokens", "outcome")
        text += f"\n{table(names, turns[:_SHOWN_TURNS])}"
    if len(turns) > _SHOWN_TURNS:
        text += f"and {len(turns) - _SHOWN_TURNS:,} more, which --json has\n"
    return text


def _step_as_text(answer: StepDocuments) -> str:
    shown: list[dict[str, Any]] = []
    for row in answer.rows:
        for document in row.documents:
            shown.append(row.json() | document.json() | {"document": document.name})
    head = f"step {answer.step}: {answer.outcome}, {counted(len(answer.rows), 'row')}\n\n"
    return head + table(("lane", "sample", "epoch", "tokens", "document", "text"), shown)
