"""Answers `raymill where`: at which steps of a run a document was learned, and which documents a
step took."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from cluster.output.result_text import counted, lines, table
from cluster.settings.parser import ConfigError
from cluster.settings.run import RunConfig, batch_schedule
from cluster.storage.uris import Storage
from jobs.proof.missing_documents import file_note
from jobs.proof.step_outcomes import Outcome, StepOutcomes
from jobs.proof.stored_documents import (
    Asked,
    find_by_place,
    find_by_text,
    first_words,
    tokens_between,
)
from jobs.proof.training_order import Marks, Stretch, TrainingOrder, Turn
from jobs.run.checkpoints import RunCheckpoints, step_of
from jobs.run.find_run import (
    begun_ledger,
    data_identity,
    division,
    find_tokens,
    last_start,
    stores_with,
)
from jobs.run.history import CONFIG_FILE, recorded_config
from jobs.tokens.document_map import DocumentMap, MappedDocument, NoDocumentMapError
from jobs.tokens.shard_reader import Piece
from jobs.tokens.token_store import TOKENIZER, read_manifest
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError

_SHOWN_TURNS = 40  # to people; --json has all
_READERS = 16  # threads: from S3, a document's front is little but waiting


@dataclass(frozen=True)
class _Run:
    """A run, the store that it was trained on, and what joins the two."""

    run: Storage
    config: RunConfig
    identity: str | None
    outcomes: StepOutcomes
    mapped: DocumentMap
    order: TrainingOrder
    tokenizer: Tokenizer

    @property
    def is_counted(self) -> Callable[[Piece], Marks] | None:
        """Marks the tokens of a piece that the loss counts; None where it counts all of them."""
        if self.mapped.manifest.chat is None:
            return None
        return lambda piece: tokens_between(self.mapped, *piece) >= 0

    def num_counted(self, piece: Piece) -> int:
        """Returns how many tokens of a piece the loss counts."""
        is_counted = self.is_counted
        return int(is_counted(piece).sum()) if is_counted else piece.end - piece.start


def where(
    run: Storage, *, document: str | None = None, text: str | None = None, step: int | None = None
) -> dict[str, Any]:
    """Answers one of the three questions: where is the document `FILE[:PLACE]`, or the one with
    this text, and which documents are in this step? Raises `UserError`."""
    if step is not None:
        return _documents_of_step(_opened(run, step), step)
    opened = _opened(run, None)
    if document is not None:
        asked = find_by_place(opened.mapped, document, opened.config.data)
    else:
        assert text is not None, "one of the three is asked"
        asked = find_by_text(opened.mapped, opened.tokenizer, text)
    return {
        "store": opened.mapped.store.uri,
        "documents": [_steps_of(opened, each) for each in asked],
    }


def _opened(run: Storage, step: int | None) -> _Run:
    """Opens a run with the store of its last attempt, or of a step."""
    ledger, config = begun_ledger(run), recorded_config(run)
    outcomes, schedule = StepOutcomes(ledger), batch_schedule(config)
    identity = data_identity(ledger)
    if step is not None:
        identity = identity_of_step(run, outcomes, step, max_steps=schedule.max_steps)
    mapped = _mapped_store(run, identity)
    order = TrainingOrder(
        mapped.manifest,
        division(last_start(ledger, identity)),
        schedule,
        seed=config.train.seed,
        window_rows=config.train.shuffle_window_rows,
    )
    tokenizer = Tokenizer.from_json(mapped.store.read_bytes(TOKENIZER))
    return _Run(run, config, identity, outcomes, mapped, order, tokenizer)


def identity_of_step(
    run: Storage, outcomes: StepOutcomes, step: int, *, max_steps: int
) -> str | None:
    """Returns the identity of the token store on which a step was taken. Raises `UserError` for one
    that was not."""
    if not 1 <= step <= max_steps:
        raise ConfigError(f"--step {step}: {run.uri} has steps 1 to {max_steps}")
    identity = outcomes.identity(step)
    if outcomes.outcome(step, identity) is Outcome.NOT_TAKEN:
        raise UserError(
            f"step {step} is not taken yet: {run.uri} is at step {outcomes.last_step} of {max_steps}"
        )
    return identity


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


def _steps_of(opened: _Run, asked: Asked) -> dict[str, Any]:
    """Returns what is known of the documents that were asked for together."""
    mapped, first = opened.mapped, asked.found[0].first
    count = sum(found.documents for found in asked.found)
    turns = _turns(opened, asked)
    learned = [turn["step"] for turn in turns if turn["outcome"] == Outcome.LEARNED]
    num_tokens = sum(found.end - found.first.start for found in asked.found)
    in_training = sum(stretch.end - stretch.start for stretch in _stretches(opened, asked))
    return {
        "file": mapped.files[asked.file][0],
        "place": first.place if count == 1 else None,
        "documents": count,
        "tokens": num_tokens,
        "held_out_tokens": num_tokens - in_training,
        "text": first_words(mapped, opened.tokenizer, first),
        "verdict": _verdict(opened, asked, turns),
        "first_step": min(learned, default=None),
        "last_step": max(learned, default=None),
        "checkpoint_before": _checkpoint_before(opened, min(learned)) if learned else None,
        "file_now": file_note(mapped, asked.file) or None,
        "turns": turns,
    }


def _turns(opened: _Run, asked: Asked) -> list[dict[str, Any]]:
    """Returns each time that a step takes tokens of the documents."""
    tokens: Counter[Turn] = Counter()
    for stretch in _stretches(opened, asked):
        rows = opened.order.rows(stretch)
        counts = opened.order.tokens_by_row(stretch, rows, is_counted=opened.is_counted)
        for turn in opened.order.turns(stretch.source, rows):
            tokens[turn] += counts[turn.row - rows.start]
    return [
        {
            "step": turn.step,
            "lane": turn.lane,
            "epoch": turn.epoch + 1,
            "sample": turn.sample,
            "tokens": tokens[turn],
            "outcome": opened.outcomes.outcome(turn.step, opened.identity).value,
        }
        for turn in sorted(tokens)  # by step, then by lane and sample
        if tokens[turn]
    ]


def _stretches(opened: _Run, asked: Asked) -> list[Stretch]:
    """Returns where the documents lie in the texts that train, joined where they meet."""
    parts: list[Stretch] = []
    for found in asked.found:
        parts += opened.order.stretches(found.shard, found.first.start, found.end)
    joined: list[Stretch] = []
    for part in sorted(parts, key=lambda part: (part.source, part.start)):
        meets = joined and (joined[-1].source, joined[-1].end) == (part.source, part.start)
        start = joined.pop().start if meets else part.start
        joined.append(Stretch(part.source, start, part.end))
    return joined


def _verdict(opened: _Run, asked: Asked, turns: Sequence[dict[str, Any]]) -> str:
    by_outcome: dict[str, list[int]] = {}
    for turn in turns:
        by_outcome.setdefault(turn["outcome"], []).append(turn["step"])
    steps = sorted({*by_outcome.get(Outcome.LEARNED, ())})
    if steps:
        return f"learned at {counted(len(steps), 'step')}, first {steps[0]}, last {steps[-1]}"
    stretches = _stretches(opened, asked)
    if not stretches:
        return "held out to validate the run, and not trained on"
    if not any(opened.order.rows(stretch) for stretch in stretches):
        return "not learned: it is in the last tokens of the text, which fill no whole row"
    if not turns:
        return "not learned: the run ends before it takes a row with tokens of it that count"
    if coming := by_outcome.get(Outcome.NOT_TAKEN):
        return f"not learned yet: step {min(coming)} is to come, the run is at step {opened.outcomes.last_step}"
    said = (f"{outcome} at step {min(at)}" for outcome, at in by_outcome.items())
    return f"not learned: {', '.join(said)}"


def _checkpoint_before(opened: _Run, step: int) -> str | None:
    """Returns the newest kept checkpoint of the run that knows nothing of a step."""
    before = [
        name
        for name in RunCheckpoints(opened.run).names
        if step_of(name) < step and not opened.outcomes.is_rolled_back(step_of(name))
    ]
    return before[-1] if before else None


def _documents_of_step(opened: _Run, step: int) -> dict[str, Any]:
    """Returns the rows of a step, each with the documents that it teaches."""
    turns = opened.order.turns_of_step(step)
    with ThreadPoolExecutor(_READERS) as pool:
        parts_of_rows = [*pool.map(partial(_documents_of, opened), turns)]
        every_part = chain.from_iterable(parts_of_rows)
        documents = {document for document, _ in every_part if document is not None}
        words = partial(first_words, opened.mapped, opened.tokenizer)
        texts = dict(zip(documents, pool.map(words, documents), strict=True))
    return {
        "store": opened.mapped.store.uri,
        "step": step,
        "outcome": opened.outcomes.outcome(step, opened.identity).value,
        "rows": [
            {
                "lane": turn.lane,
                "sample": turn.sample,
                "epoch": turn.epoch + 1,
                "documents": _shown_parts(opened, parts, texts),
            }
            for turn, parts in zip(turns, parts_of_rows, strict=True)
        ],
    }


def _documents_of(opened: _Run, turn: Turn) -> list[tuple[MappedDocument | None, Piece]]:
    """Returns the documents of a row, each with the piece of it that the row teaches; None for the
    piece of a shard that has no table."""
    parts: list[tuple[MappedDocument | None, Piece]] = []
    for piece in opened.order.pieces(opened.order.targets(turn)):
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


def _shown_parts(
    opened: _Run,
    parts: Sequence[tuple[MappedDocument | None, Piece]],
    texts: dict[MappedDocument, str],
) -> list[dict[str, Any]]:
    """Returns what is said of the documents of a row, whose targets they share out in order."""
    shown: list[dict[str, Any]] = []
    first = 0
    for document, piece in parts:
        span = [first, first + piece.end - piece.start]
        first = span[1]
        part: dict[str, Any] = {"file": None, "place": None, "shard": piece.shard.file}
        if document is not None:
            file = opened.mapped.files[document.file][0]
            part = {"file": file, "place": document.place, "text": texts[document]}
        shown.append(part | {"tokens": opened.num_counted(piece), "targets": span})
    return shown


def as_text(result: dict[str, Any]) -> str:
    """Returns an answer as people read it: the steps of a document, or the documents of a step, as
    a table."""
    if "rows" in result:
        return _step_as_text(result)
    return "\n".join(_document_as_text(document) for document in result["documents"])


def _document_as_text(document: dict[str, Any]) -> str:
    place = "" if document["place"] is None else f":{document['place']}"
    shown: dict[str, Any] = {"document": f"{document['file']}{place}"}
    if document["documents"] > 1:
        shown["documents"] = document["documents"]
    shown["tokens"] = document["tokens"]
    if document["held_out_tokens"]:
        shown["of them held out"] = document["held_out_tokens"]
    shown |= {"text": document["text"], "verdict": document["verdict"]}
    if document["first_step"] is not None:
        newest = document["checkpoint_before"]
        shown["checkpoint before"] = newest or f"none is kept before step {document['first_step']}"
    if document["file_now"]:
        shown["file now"] = f"{document['file_now']}; the steps are those of the text as it was"
    text = "".join(f"{line}\n" for line in lines(shown))
    turns = document["turns"]
    if turns:
        names = ("step", "lane", "epoch", "tokens", "outcome")
        text += f"\n{table(names, turns[:_SHOWN_TURNS])}"
    if len(turns) > _SHOWN_TURNS:
        text += f"and {len(turns) - _SHOWN_TURNS:,} more, which --json has\n"
    return text


def _step_as_text(result: dict[str, Any]) -> str:
    shown: list[dict[str, Any]] = []
    for row in result["rows"]:
        for document in row["documents"]:
            file = document["file"]
            place = f"{file}:{document['place']}" if file else f"unknown, in {document['shard']}"
            shown.append(row | document | {"document": place})
    head = f"step {result['step']}: {result['outcome']}, {counted(len(result['rows']), 'row')}\n\n"
    return head + table(("lane", "sample", "epoch", "tokens", "document", "text"), shown)
