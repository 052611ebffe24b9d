"""One worker's part of an attempt at a run: its state, its rows, and what it does with them at each
step."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cluster.settings.run import (
    BatchSchedule,
    RunConfig,
    cooldown_tokens,
    max_steps,
    warmup_tokens,
    way_to_compute,
)
from jobs.exact.audited_gradient import AuditedGradient, AuditedStep
from jobs.exact.audits.silent_faults import corrupt
from jobs.run.costs.budget import saved_step
from jobs.run.end import End
from jobs.run.run_plan import RunPlan
from jobs.saving.saver import Saver
from jobs.snapshots.snapshots import Snapshots
from jobs.tokens.token_store import Manifest
from jobs.training.guards import (
    Decision,
    GuardState,
    Verdict,
    after_wrong_weights,
    complaint,
    decide,
)
from jobs.training.run_writer import RunWriter
from jobs.training.sentinel import Sentinel
from jobs.training.step_record import StepRecord
from jobs.training.validation import Validator
from jobs.workers.preemption import LeavingError, Notice, Notices
from model.files.checkpoint_folder import Metadata
from model.training.optimizer import learning_rate, portable_cosine
from raymill.errors import LostPeerError
from raymill.state.train_state import TrainState
from raymill.workers.worker_group import WorkerGroup


@dataclass
class Attempt:
    """An attempt that `open_attempt` has opened, with all its parts. The training loop replaces `guard` once a
    step, else nothing."""

    plan: RunPlan
    group: WorkerGroup
    number: int  # of the run's attempts, from 1
    generation: int  # the number of the run's writer, which shuts out writers with lower ones
    first_step: int
    state: TrainState
    guard: GuardState  # belongs to `state`
    manifest: Manifest  # of the tokens to train on
    schedule: BatchSchedule
    gradient: AuditedGradient
    sentinel: Sentinel
    validator: Validator
    record: StepRecord
    snapshots: Snapshots
    saver: Saver
    notices: Notices
    tell: Callable[..., None]  # writes an event into the ledger, on rank 0
    writer: RunWriter | None  # rank 0's

    def is_saved(self, step: int) -> bool:
        """Reports whether a checkpoint of the step is due; in a replay, whether its hash is."""
        replay = self.plan.replay
        if replay:
            return step in replay.hashed
        return saves(self.plan.config, step) or self.saver.wants_again

    def is_validated(self, step: int) -> bool:
        replay = self.plan.replay
        return step in replay.validated if replay else validates(self.plan.config, step)

    def rate(self, step: int) -> float:
        """Returns the step's learning rate."""
        config = self.plan.config
        return learning_rate(
            self.schedule.tokens_seen(step),
            peak=config.train.learning_rate,
            warmup_tokens=warmup_tokens(config),
            decay_tokens=config.train.decay_tokens or config.train.max_tokens,
            min_ratio=config.train.min_learning_rate_ratio,
            cooldown_tokens=cooldown_tokens(config),
            cosine=portable_cosine if way_to_compute(config) == "portable" else math.cos,
        )

    def enter(self, step: int) -> None:
        """Raises `LostPeerError` where the round of the workers' meetings is over: that another
        worker comes is learnt from no message."""
        meeting = self.group.meeting
        meeting.progress.step = step
        if meeting.ended.is_set():
            raise LostPeerError(
                f"step {step}: the workers' meeting is over, another worker comes or was lost"
            )
        self.notices.ask()

    def measure(self, step: int) -> AuditedStep | None:
        """Puts the gradient of the step's whole batch into the state's buffer. Returns its figures,
        and None where a worker was found wrong and the run must go back. Raises what
        `Sentinel.cleared` does."""
        timer, config = self.record.timer, self.plan.config
        measured = self.sentinel.cleared(step, self.gradient.of_step(step, timer), timer)
        if measured and not config.train.exact:
            self.group.prove(step, self.state.device)
        if measured is None:
            return None
        reason = complaint(self.guard.losses, config, loss=measured.loss, grad_norm=measured.norm)
        # Before the data is blamed, somebody else computes it
        return self.sentinel.asked_again(step, measured, reason, timer) if reason else measured

    def update(self, step: int, measured: AuditedStep) -> Decision | None:
        """Decides what to do with the step's gradient, and applies it where that is the decision.

        At a step that saves, weights that are not finite turn the decision into a rollback. Returns
        None where a worker may have made them so, and the run must go back. Raises what
        `Sentinel.cleared` does.
        """
        config, timer = self.plan.config, self.record.timer
        decision = decide(
            self.guard, config, step=step, loss=measured.loss, grad_norm=measured.norm
        )
        if decision.verdict is Verdict.APPLY:
            figures = {"norm": measured.norm, "learning_rate": self.rate(step)}
            notes = self.gradient.notes_of_update(step)
            with timer.phase("update"), self.record.layers.around_update(step):
                self.state.apply(**figures, timer=timer)
            corrupt("weights", self.state.values)
            for vector in self.state.vectors.values():
                corrupt("vectors", vector)
            if notes:
                with timer.phase("sync"):
                    self.sentinel.update_again = notes.repeated(self.group, **figures)
            if self.state.sharding.sends_values:
                self.group.prove(step, self.state.device)
        stays = decision.verdict in (Verdict.APPLY, Verdict.SKIP)
        if not (stays and saves(config, step)) or self.state.is_finite():
            return decision
        if self.sentinel.goes_back_from(step + 1):
            return None
        return after_wrong_weights(decision.state, config, step=step)

    def save(self, step: int, validation: dict[str, Any], *, must: bool = False) -> None:
        """Has the state stored while training continues. `must` waits for a save in progress instead
        of skipping this one."""
        metadata = Metadata(
            run_id=str(self.plan.config.run_id),
            step=step,
            tokens_seen=self.schedule.tokens_seen(step),
            data_manifest_hash=self.manifest.hash,
            data_identity=self.manifest.identity,
            generation=self.generation,
            code_version=self.plan.code_version,
            precision=self.plan.config.train.precision,
            guard=asdict(self.guard),
            **validation,
            **self._base,
        )
        self.saver.save(metadata, self.state, must=must)

    @property
    def _base(self) -> dict[str, Any]:
        """The base, in the metadata of an adapter."""
        base = self.plan.base
        if base is None:
            return {}
        return {"base": base.uri, "base_hash": base.parameter_hash, "base_source": base.source}

    def tell_of(self, notice: Notice, *, step: int) -> None:
        """Writes down that something asked the run to end, which is saved at the step, and what
        continues one that a person stopped."""
        known = notice is Notice.STOP and self.plan.command
        fields = {"continue_with": self.plan.command} if known else {}
        self.tell("preempted", step=step, notice=notice.name.lower(), **fields)

    def keep(self, step: int, validation: dict[str, Any]) -> None:
        """Begins a snapshot of the state after a step whose line the ledger has, if one is due.

        One is due before each step that does more than train: that step's update takes this state
        away, and another worker may be lost before the step has a line.
        """
        carried = {"guard": asdict(self.guard), "line": self.record.line, "validation": validation}
        is_due = not only_trains(self.plan.config, step + 1)
        news = self.snapshots.after_step(
            step, self.state, attempt=self.number, carried=carried, is_due=is_due
        )
        if news:
            self.tell("snapshots_off", step=step, attempt=self.number, reason=news)
        elif news is not None:
            self.tell("snapshots_on", step=step, attempt=self.number)

    def answer(self, step: int) -> Notice:
        """Returns what all ranks do at the end of a step. Where some of them leave, raises
        `LeavingError` in those and `LostPeerError` in the others, which meet without them."""
        notice = self.notices.answer()
        if notice is not Notice.PART:
            return notice
        if step == self.plan.last_step:
            return Notice.NONE
        gone_at_s = self.notices.leaves_before_s
        if gone_at_s is not None:
            raise LeavingError(
                f"leaves after step {step}, as its node is to go", gone_at_s=gone_at_s
            )
        raise LostPeerError(f"another worker leaves after step {step}, as its node is to go")

    def close(self, end: End | None) -> None:
        """Returns once the storage has the attempt's last checkpoint and all of its ledger. Without
        an end, other workers continue."""
        self.saver.finish()
        if self.writer:
            if end is End.SPENT and (budget := self.writer.budget):
                step = saved_step(self.writer.outline())
                self.writer.ledger.event(End.SPENT, step=step, **budget.fields())
            self.writer.close(end)

    def leave(self, step: int, decision: Decision) -> End:
        """Says in the ledger why a step cannot stand."""
        if decision.verdict is not Verdict.ROLL_BACK:
            self.tell(End.GAVE_UP, step=step, reason=f"step {step}: {decision.reason}")
            return End.GAVE_UP
        first, last = decision.state.rollbacks[-1]
        left_out = self.schedule.samples_of(first, last)
        samples = [left_out.start, left_out.stop]
        self.tell(
            "rollback", step=step, first=first, last=last, samples=samples, reason=decision.reason
        )
        return End.WENT_BACK


def saves(config: RunConfig, step: int) -> bool:
    """Reports whether a checkpoint of the step is due, whatever else happens."""
    return step % config.checkpoint.save_every_steps == 0 or step == max_steps(config)


def validates(config: RunConfig, step: int) -> bool:
    return step % config.train.eval_every_steps == 0 or step == max_steps(config)


def only_trains(config: RunConfig, step: int) -> bool:
    """Reports whether a line is all that a step leaves: it neither evaluates nor saves."""
    return not saves(config, step) and not validates(config, step)
