"""Answers `raymill explain`: which lane, row and document made the loss and the gradient norm of a
step what they are, and what the step would have been without them.

The steps before it are taken again in a scratch folder, as `raymill replay` does. Then the step is
taken apart (`step_parts`), and its rows are joined with their documents (`where_run`).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster.output.progress import progress, say
from cluster.output.result_text import lines, table
from cluster.storage.uris import Storage
from jobs.proof.explain.explanation import (
    Explanation,
    Lane,
    Row,
    RowDocument,
    StepWithout,
    WorstRow,
    rank,
    stands_out,
)
from jobs.proof.explain.step_page import worst_rows, write_page
from jobs.proof.explain.step_parts import StepParts, TakenStep, update_difference
from jobs.proof.opened_run import OpenedRun
from jobs.proof.replay_run import lay_out, scratch_plan
from jobs.proof.where_run import TaughtDocument, documents_of_step
from jobs.run.checkpoints import step_of
from jobs.run.end import End
from jobs.run.ledger import Ledger, Line
from jobs.run.run_plan import RunPlan, open_stream
from jobs.tokens.document_map import NoDocumentMapError
from jobs.training.attempt import Attempt
from jobs.training.guards import decide
from jobs.training.train_loop import last_attempt
from jobs.workers.heartbeat import Pulse
from jobs.workers.new_meeting import new_meeting
from model.linear_cross_entropy import IGNORE_INDEX
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from raymill.workers.worker_group import WorkerGroup

_SHOWN_LANES = 12  # to people; --json has all


def explain(run: Storage, step: int) -> Explanation:
    """Explains a step that was taken, also one that was skipped or rolled back, and writes
    `report/explain-STEP.html` and its figure into the run's folder.

    Raises `UserError` for a step that was not taken, or cannot be reached again, and
    `TokenStoreError` where the data is gone.
    """
    opened = OpenedRun.open(run)
    ledger, config = opened.ledger, opened.config
    identity = opened.identity(step)
    _require_known_bits(opened, identity, step)
    with tempfile.TemporaryDirectory(prefix="raymill-explain-") as folder:
        plan = scratch_plan(run, config, ledger, folder=folder, until=step - 1)
        rollbacks = ledger.standing.events("rollback")
        ended = [line for line in rollbacks if line["last"] < step]
        start = lay_out(run, ledger, plan, before=step, rollbacks=ended)
        first = step_of(start) + 1 if start else 1
        if first < step:
            say(f"taking steps {first} to {step - 1} again, 1 worker")
        with _before(plan, step) as attempt:
            explanation = _explained(opened, attempt, step, start=start)
    return write_page(run, explanation)


def _require_known_bits(opened: OpenedRun, identity: str | None, step: int) -> None:
    uri = opened.run.uri
    if not opened.config.train.exact:
        raise UserError(
            f"{uri} was trained with train.exact: false, so its steps have no lanes to tell apart; "
            "`raymill where --step` lists the documents of a step of any run"
        )
    if identity != opened.identity():
        raise UserError(
            f"step {step} was taken on another token store than the last attempt of {uri}, and steps are taken "
            "again on that one alone; `raymill where --step` lists its documents"
        )


@contextmanager
def _before(plan: RunPlan, step: int) -> Iterator[Attempt]:
    """Takes the steps before this one. Yields the attempt that comes to it."""
    with last_attempt(plan, WorkerGroup(0, 1, new_meeting()), Pulse({})) as (end, attempt):
        if attempt is None or end is End.GAVE_UP:
            reason = Ledger.read(plan.run).events(End.GAVE_UP)[-1]["reason"]
            raise UserError(f"step {step} cannot be reached again: {reason}")
        if attempt.first_step > step:
            raise UserError(
                f"step {step} cannot be reached again: the run goes on at step {attempt.first_step} from "
                "the checkpoint before it"
            )
        yield attempt


def _explained(opened: OpenedRun, attempt: Attempt, step: int, *, start: str | None) -> Explanation:
    """Measures the step and its parts. `start` is the checkpoint from which the steps before it were
    taken."""
    parts = StepParts(attempt, step)
    whole = parts.taken()
    decision = decide(
        attempt.guard,
        attempt.plan.config,
        step=step,
        loss=whole.loss,
        grad_norm=whole.grad_norm,
    )
    guard = decision.reason or None
    lanes = parts.lanes(num_counted=whole.num_counted)
    rows = [row for row in parts.rows() if row.tokens]
    if not rows:
        raise UserError(f"step {step} counts no token: its rows have no answer of a conversation")
    documents, no_documents = _documents(opened.run, step)
    worst: list[WorstRow] = []
    for row, (highest, grad_norm) in _worst(parts, lanes, rows).items():
        ranked: list[RowDocument] = []
        holding = [row.sample]
        if documents:
            ranked = _with_losses(parts, row, documents[row.sample - parts.samples.start])
            holding = _holding(ranked[0], parts.samples, documents) or holding
        without_row = _without(parts, whole, [row.sample])
        worst.append(
            WorstRow(
                **vars(row),
                highest=highest,
                grad_norm=grad_norm,
                text=_text_of(attempt.plan, row),
                documents=ranked,
                document_rows=len(holding),
                without_row=without_row,
                without_document=(
                    _without(parts, whole, holding) if len(holding) > 1 else without_row
                ),
                without_lane=_without(parts, whole, parts.samples_of_lane(row.lane)),
            )
        )
    losses, norms = [row.loss for row in rows], [lane.grad_norm for lane in lanes]
    return Explanation(
        note=_note(opened.ledger, step, whole, guard),
        step=step,
        outcome=opened.outcomes.outcome(step, opened.identity()),
        from_checkpoint=start,
        loss=whole.loss,
        grad_norm=whole.grad_norm,
        tokens=whole.num_counted,
        guard=guard,
        stands_out=stands_out(losses) or stands_out(norms),
        worst=worst,
        no_documents=no_documents,
        lanes=lanes,
        rows=rows,
    )


def _documents(run: Storage, step: int) -> tuple[list[list[TaughtDocument]], str | None]:
    """Returns the documents of each row of a step; of none, with the reason, where the store has no
    map."""
    try:
        return [row.documents for row in documents_of_step(run, step).rows], None
    except NoDocumentMapError as error:
        return [], str(error)


def _worst(
    parts: StepParts, lanes: Sequence[Lane], rows: Sequence[Row]
) -> dict[Row, tuple[list[str], float]]:
    """Returns the row with the highest loss of all, and the row with the largest gradient in the
    lane with the largest; of each, in what it is the highest and its gradient's norm. Often these
    are one row."""
    counted = [lane for lane in lanes if lane.tokens]
    steepest_lane = max(counted, key=lambda lane: rank(lane.grad_norm))
    candidates = [row for row in rows if row.lane == steepest_lane.lane]
    norms: dict[Row, float] = {}
    with progress("measuring rows", total=len(candidates), unit="rows") as advance:
        for row in candidates:
            norms[row] = parts.grad_norm_of(row)
            advance(1)
    steepest = max(candidates, key=lambda row: rank(norms[row]))
    highest = max(rows, key=lambda row: rank(row.loss))
    if highest == steepest:
        return {highest: (["loss", "grad_norm"], norms[highest])}
    if highest not in norms:
        norms[highest] = parts.grad_norm_of(highest)
    return {highest: (["loss"], norms[highest]), steepest: (["grad_norm"], norms[steepest])}


def _with_losses(
    parts: StepParts, row: Row, documents: Sequence[TaughtDocument]
) -> list[RowDocument]:
    """Returns the documents of a row with the loss of each there, that with the highest first."""
    losses = parts.losses_within(row, [document.targets for document in documents])
    pairs = zip(documents, losses, strict=True)
    ranked = [RowDocument(**vars(document), loss=loss) for document, loss in pairs]
    return sorted(ranked, key=lambda document: -rank(document.loss))


def _holding(
    document: TaughtDocument, samples: range, documents: Sequence[Sequence[TaughtDocument]]
) -> list[int]:
    """Returns the samples of a step that teach tokens of a document; none where it is not known."""
    holding: list[int] = []
    for sample, in_row in zip(samples, documents, strict=True):
        places = [(one.file, one.place) for one in in_row if one.file is not None]
        if (document.file, document.place) in places:
            holding.append(sample)
    return holding


def _without(parts: StepParts, whole: TakenStep, left_out: Sequence[int]) -> StepWithout | None:
    """Returns what the step is without some samples; None where no token is left."""
    without = parts.taken(left_out=left_out)
    if not without.num_counted:
        return None
    change, cosine = update_difference(whole, without) or (None, None)
    return StepWithout(without.loss, without.grad_norm, without.num_counted, change, cosine)


def _text_of(plan: RunPlan, row: Row) -> str:
    stream = open_stream(plan)
    inputs, targets = stream.samples([row.sample])
    ids = [*inputs[0].tolist(), *targets[0, -1:].tolist()]
    manifest = stream.manifest
    left_out = {manifest.eot_id, manifest.bos_id, IGNORE_INDEX}
    kept = [token for token in ids if token not in left_out]
    return Tokenizer.from_json(plan.tokenizer_json).decode(kept)


def _note(ledger: Ledger, step: int, taken: TakenStep, guard: str | None) -> str | None:
    """Says how the step that was taken again differs from what the ledger has of it; None where it
    does not."""
    recorded = _recorded(ledger, step)
    reason = recorded.get("reason")
    if reason and not guard:
        return f"the ledger says: {reason}. Taken again, the step is sound, so its data is not the cause"
    if reason:
        return f"the ledger says: {reason}"
    if (recorded["loss"], recorded["grad_norm"]) == (taken.loss, taken.grad_norm):
        return None
    return (
        f"the ledger has loss {recorded['loss']} and gradient norm {recorded['grad_norm']}: these are not its bits; "
        "`raymill replay` says at which step they part"
    )


def _recorded(ledger: Ledger, step: int) -> Line:
    """Returns the last line that says what came of a step."""
    for line in reversed(ledger.lines):
        if line.get("event") in (None, "skip", "rollback") and line["step"] == step:
            return line
    raise AssertionError(f"step {step} was taken")


def as_text(explanation: Explanation) -> str:
    """Returns an explanation as people read it: its sentence, the lanes with the highest losses,
    and the rows that are to blame."""
    shown = {
        "verdict": explanation.verdict,
        "note": explanation.note,
        "no documents": explanation.no_documents,
        "page": explanation.html,
        "figure": explanation.figure,
    }
    text = "".join(f"{line}\n" for line in lines({k: v for k, v in shown.items() if v}))
    lanes = sorted(explanation.lanes, key=lambda lane: -rank(lane.loss))
    rows = [lane.json() for lane in lanes[:_SHOWN_LANES]]
    text += f"\n{table(('lane', 'loss', 'part', 'grad_norm', 'tokens'), rows)}"
    if len(lanes) > _SHOWN_LANES:
        text += f"and {len(lanes) - _SHOWN_LANES:,} more, which --json has\n"
    names = ("lane", "row", "sample", "what", "loss", "grad_norm", "update_change", "document")
    return f"{text}\n{table(names, worst_rows(explanation))}"
