"""Answers `raymill explain`: which lane, row and document made the loss and the gradient norm of a
step what they are, and what the step would have been without them.

The steps before it are taken again in a scratch folder, as `raymill replay` does. Then the step is
taken apart (`step_parts`), and its rows are joined with their documents (`where_run`).
"""

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median_low
from typing import Any, assert_never

from cluster.output.progress import progress, say
from cluster.output.result_text import lines, table
from cluster.settings.run import RunConfig, max_steps
from cluster.storage.uris import Storage
from jobs.proof.replay_run import lay_out, scratch_plan
from jobs.proof.step_outcomes import Outcome, StepOutcomes
from jobs.proof.step_parts import Lane, Row, StepParts, TakenStep, update_difference
from jobs.proof.where_run import identity_of_step, where
from jobs.report.step_page import document_name, shortened, worst_rows, write_page
from jobs.run.checkpoints import step_of
from jobs.run.find_run import begun_ledger, data_identity
from jobs.run.history import recorded_config
from jobs.run.ledger import Ledger, Line
from jobs.run.run_plan import RunPlan, open_stream
from jobs.tokens.document_map import NoDocumentMapError
from jobs.training.attempt import Attempt
from jobs.training.guards import decide
from jobs.training.open_attempt import Hopeless, open_attempt
from jobs.training.train_loop import take_steps
from jobs.workers.heartbeat import Pulse
from jobs.workers.new_meeting import new_meeting
from model.linear_cross_entropy import IGNORE_INDEX
from model.text.tokenizer import Tokenizer
from raymill.errors import UserError
from raymill.workers.worker_group import WorkerGroup

STANDS_OUT = 1.5
"""A row's loss, or a lane's gradient norm, stands out from so many times the median of all."""

_SHOWN_LANES = 12  # to people; --json has all


def explain(run: Storage, step: int) -> dict[str, Any]:
    """Explains a step that was taken, also one that was skipped or rolled back, and writes
    `report/explain-STEP.html` and its figure into the run's folder.

    Raises `UserError` for a step that was not taken, or cannot be reached again, and
    `TokenStoreError` where the data is gone.
    """
    ledger, config = begun_ledger(run), recorded_config(run)
    outcomes = StepOutcomes(ledger)
    identity = identity_of_step(run, outcomes, step, max_steps=max_steps(config))
    _require_known_bits(run, ledger, config, identity, step)
    with tempfile.TemporaryDirectory(prefix="raymill-explain-") as folder, ExitStack() as opened:
        plan = scratch_plan(run, config, ledger, folder=folder, until=step - 1)
        rollbacks = ledger.standing.events("rollback")
        ended = [line for line in rollbacks if line["last"] < step]
        start = lay_out(run, ledger, plan, before=step, rollbacks=ended)
        first = step_of(start) + 1 if start else 1
        if first < step:
            say(f"taking steps {first} to {step - 1} again, 1 worker")
        attempt = _before(plan, step, opened)
        explained = _explained(run, attempt, step)
    outcome = outcomes.outcome(step, identity)
    result = {"step": step, "outcome": outcome.value, "from_checkpoint": start, **explained}
    result = {"verdict": _verdict(result), "note": _note(ledger, result), **result}
    return result | write_page(run, result)


def _require_known_bits(
    run: Storage, ledger: Ledger, config: RunConfig, identity: str | None, step: int
) -> None:
    if not config.train.exact:
        raise UserError(
            f"{run.uri} was trained with train.exact: false, so its steps have no lanes to tell apart; "
            "`raymill where --step` lists the documents of a step of any run"
        )
    if identity != data_identity(ledger):
        raise UserError(
            f"step {step} was taken on another token store than the last attempt of {run.uri}, and steps are taken "
            "again on that one alone; `raymill where --step` lists its documents"
        )


def _before(plan: RunPlan, step: int, opened: ExitStack) -> Attempt:
    """Takes the steps before this one. Returns the attempt that comes to it; a rollback on the way
    ends another one."""
    group = WorkerGroup(0, 1, new_meeting())
    while True:
        attempt_open = opened.enter_context(ExitStack())
        attempt = open_attempt(plan, group, attempt_open, signals=lambda: None)
        if isinstance(attempt, Hopeless):
            raise UserError(f"step {step} cannot be reached again: {attempt.reason}")
        if attempt.first_step > step:
            raise UserError(
                f"step {step} cannot be reached again: the run goes on at step {attempt.first_step} from "
                "the checkpoint before it"
            )
        if attempt.first_step == step or not take_steps(attempt, Pulse({})):
            break
        attempt_open.close()
    for line in Ledger.read(plan.run).events("gave_up"):
        raise UserError(f"step {step} cannot be reached again: {line['reason']}")
    return attempt


def _explained(run: Storage, attempt: Attempt, step: int) -> dict[str, Any]:
    """Measures the step and its parts."""
    parts = StepParts(attempt, step)
    whole = parts.taken()
    decision = decide(
        attempt.guard,
        attempt.plan.config,
        step=step,
        loss=whole.loss,
        grad_norm=whole.grad_norm,
    )
    lanes = parts.lanes(num_counted=whole.num_counted)
    rows = [row for row in parts.rows() if row.num_counted]
    if not rows:
        raise UserError(f"step {step} counts no token: its rows have no answer of a conversation")
    documents, no_documents = _documents(run, step)
    worst: list[dict[str, Any]] = []
    for row, (highest, grad_norm) in _worst(parts, lanes, rows).items():
        ranked: list[dict[str, Any]] = []
        holding = [row.sample]
        if documents:
            in_step = row.sample - parts.samples.start
            ranked = _with_losses(parts, row, documents[in_step])
            holding = _holding(ranked[0], parts.samples, documents) or holding
        without_row = _without(parts, whole, [row.sample])
        figures = {
            "highest": highest,
            **_shown(row),
            "grad_norm": _finite(grad_norm),
            "text": _text_of(attempt.plan, row),
            "documents": ranked,
            "document_rows": len(holding),
            "without_row": without_row,
            "without_document": (
                _without(parts, whole, holding) if len(holding) > 1 else without_row
            ),
            "without_lane": _without(parts, whole, parts.samples_of_lane(row.lane)),
        }
        worst.append(figures)
    return {
        "loss": _finite(whole.loss),
        "grad_norm": _finite(whole.grad_norm),
        "tokens": whole.num_counted,
        "guard": decision.reason or None,
        "stands_out": _stands_out(lanes, rows),
        "worst": worst,
        "no_documents": no_documents,
        "lanes": [_shown(lane) for lane in lanes],
        "rows": [_shown(row) for row in rows],
    }


def _documents(run: Storage, step: int) -> tuple[list[list[dict[str, Any]]], str | None]:
    """Returns the documents of each row of a step; of none, with the reason, where the store has no
    map."""
    try:
        return [row["documents"] for row in where(run, step=step)["rows"]], None
    except NoDocumentMapError as error:
        return [], str(error)


def _worst(
    parts: StepParts, lanes: Sequence[Lane], rows: Sequence[Row]
) -> dict[Row, tuple[list[str], float]]:
    """Returns the row with the highest loss of all, and the row with the largest gradient in the
    lane with the largest; of each, in what it is the highest and its gradient's norm. Often these
    are one row."""
    counted = [lane for lane in lanes if lane.num_counted]
    steepest_lane = max(counted, key=lambda lane: _rank(lane.grad_norm))
    candidates = [row for row in rows if row.lane == steepest_lane.number]
    norms: dict[Row, float] = {}
    with progress("measuring rows", total=len(candidates), unit="rows") as advance:
        for row in candidates:
            norms[row] = parts.grad_norm_of(row)
            advance(1)
    steepest = max(candidates, key=lambda row: _rank(norms[row]))
    highest = max(rows, key=lambda row: _rank(row.loss))
    if highest == steepest:
        return {highest: (["loss", "grad_norm"], norms[highest])}
    if highest not in norms:
        norms[highest] = parts.grad_norm_of(highest)
    return {highest: (["loss"], norms[highest]), steepest: (["grad_norm"], norms[steepest])}


def _rank(value: float) -> float:
    """Returns what figures are compared by: one that is not finite is above all."""
    return value if math.isfinite(value) else math.inf


def _finite(value: float) -> float | None:
    """Returns a figure as JSON can have it."""
    return value if math.isfinite(value) else None


def _stands_out(lanes: Sequence[Lane], rows: Sequence[Row]) -> bool:
    losses = [_rank(row.loss) for row in rows]
    norms = [_rank(lane.grad_norm) for lane in lanes]
    for values in (losses, norms):
        highest = max(values)
        if math.isinf(highest) or highest >= STANDS_OUT * median_low(values):
            return True
    return False


def _with_losses(
    parts: StepParts, row: Row, documents: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the documents of a row with the loss of each there, that with the highest first."""
    losses = parts.losses_within(row, [document["targets"] for document in documents])
    ranked = sorted(zip(losses, documents, strict=True), key=lambda pair: -_rank(pair[0]))
    return [document | {"loss": _finite(loss)} for loss, document in ranked]


def _holding(
    document: dict[str, Any], samples: range, documents: Sequence[Sequence[dict[str, Any]]]
) -> list[int]:
    """Returns the samples of a step that teach tokens of a document; none where it is not known."""
    holding: list[int] = []
    for sample, in_row in zip(samples, documents, strict=True):
        places = [(one["file"], one["place"]) for one in in_row if one["file"] is not None]
        if (document["file"], document["place"]) in places:
            holding.append(sample)
    return holding


def _without(parts: StepParts, whole: TakenStep, left_out: Sequence[int]) -> dict[str, Any] | None:
    """Returns what the step is without some samples; None where no token is left."""
    without = parts.taken(left_out=left_out)
    if not without.num_counted:
        return None
    difference = update_difference(whole, without)
    return {
        "loss": _finite(without.loss),
        "grad_norm": _finite(without.grad_norm),
        "tokens": without.num_counted,
        "update_change": difference and difference[0],
        "update_cosine": difference and difference[1],
    }


def _text_of(plan: RunPlan, row: Row) -> str:
    stream = open_stream(plan)
    inputs, targets = stream.samples([row.sample])
    ids = [*inputs[0].tolist(), *targets[0, -1:].tolist()]
    manifest = stream.manifest
    left_out = {manifest.eot_id, manifest.bos_id, IGNORE_INDEX}
    kept = [token for token in ids if token not in left_out]
    return Tokenizer.from_json(plan.tokenizer_json).decode(kept)


def _shown(part: Lane | Row) -> dict[str, Any]:
    """Returns a lane or a row as JSON has it."""
    match part:
        case Lane():
            return {
                "lane": part.number,
                "loss": _finite(part.loss),
                "part": _finite(part.part),
                "grad_norm": _finite(part.grad_norm),
                "tokens": part.num_counted,
            }
        case Row():
            return {
                "lane": part.lane,
                "row": part.number,
                "sample": part.sample,
                "loss": _finite(part.loss),
                "tokens": part.num_counted,
            }
        case _:
            assert_never(part)


def _note(ledger: Ledger, result: dict[str, Any]) -> str | None:
    """Says how the step that was taken again differs from what the ledger has of it; None where it
    does not."""
    recorded = _recorded(ledger, result["step"])
    reason = recorded.get("reason")
    if reason and not result["guard"]:
        return f"the ledger says: {reason}. Taken again, the step is sound, so its data is not the cause"
    if reason:
        return f"the ledger says: {reason}"
    figures = [(recorded[name], result[name]) for name in ("loss", "grad_norm")]
    if all(before == again for before, again in figures):
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


def _verdict(result: dict[str, Any]) -> str:
    """Returns the explanation in a sentence or two."""
    outcome = result["outcome"]
    head = f"step {result['step']}" + ("" if outcome == Outcome.LEARNED else f" ({outcome})")
    loss, norm = _number(result["loss"]), _number(result["grad_norm"])
    first, *others = result["worst"]
    if not result["stands_out"]:
        return (
            f"{head}: no row stands out; loss {loss} and gradient norm {norm}. The highest loss, "
            f"{_number(first['loss'])}, has {_place(first)}"
        )
    without = first["without_document"]
    if without is None:
        return f"{head}: loss {loss} and gradient norm {norm} are those of all that counts, {_place(first)}"
    loss_without, norm_without = _number(without["loss"]), _number(without["grad_norm"])
    if not others and _falls(result, first, "grad_norm"):
        return (
            f"{head}: loss {loss} and gradient norm {norm} come from {_place(first)}; "
            f"without it {loss_without} and {norm_without}"
        )
    text = f"{head}: loss {loss} comes from {_place(first)}; without it {loss_without}"
    if not others:
        return f"{text}, and gradient norm {norm_without} in place of {norm}"
    (other,) = others
    text += f". Of gradient norm {norm}, the largest gradient is that of {_place(other)}"
    without = other["without_document"]
    return f"{text}; without it {_number(without['grad_norm'])}" if without else text


def _falls(result: dict[str, Any], row: dict[str, Any], name: str) -> bool:
    """Reports whether a figure of the step is lower without a row and the document's others."""
    return _rank_shown(row["without_document"][name]) < _rank_shown(result[name])


def _place(row: dict[str, Any]) -> str:
    place = f"lane {row['lane']}, row {row['row']}"
    if not row["documents"]:
        return f'{place} ("{shortened(row["text"])}")'
    document = row["documents"][0]
    place += f": {document_name(document)}"
    if "text" in document:
        place += f' ("{document["text"]}")'
    if row["document_rows"] > 1:
        place += f", which has {row['document_rows']} rows of the step"
    return place


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def as_text(result: dict[str, Any]) -> str:
    """Returns an explanation as people read it: its sentence, the lanes with the highest losses,
    and the rows that are to blame."""
    shown = {"verdict": result["verdict"], "note": result["note"]}
    shown["no documents"] = result["no_documents"]
    shown |= {"page": result["html"], "figure": result["figure"]}
    text = "".join(f"{line}\n" for line in lines({k: v for k, v in shown.items() if v}))
    lanes = sorted(result["lanes"], key=lambda lane: -_rank_shown(lane["loss"]))
    text += f"\n{table(('lane', 'loss', 'part', 'grad_norm', 'tokens'), lanes[:_SHOWN_LANES])}"
    if len(lanes) > _SHOWN_LANES:
        text += f"and {len(lanes) - _SHOWN_LANES:,} more, which --json has\n"
    names = ("lane", "row", "sample", "what", "loss", "grad_norm", "update_change", "document")
    return f"{text}\n{table(names, worst_rows(result))}"


def _rank_shown(value: float | None) -> float:
    return math.inf if value is None else value
