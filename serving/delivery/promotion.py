"""Decides which version serves which requests: from plain reports, without clock or cluster."""

import hashlib
import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from serving.protocol.served_model import ServedModel

ROUTE_HEADER = "x-route"
MIN_ERRORS = 3  # fewer may be chance
MIN_JUDGED_SEQUENCES = 20  # after which a version's speed is judged
MIN_JUDGED_STEPS = 20  # of a size, of both versions
HISTORY = 20  # promotions and rollbacks that are remembered


class Phase(StrEnum):
    STEADY = "steady"  # one version serves
    # A candidate is loaded and measured beside the live version; it gets no requests
    LOADING = "loading"
    CANARY = "canary"  # the candidate serves its share of the requests
    # The candidate is live; the version before stays loaded and can return at once
    WATCHING = "watching"


class SlotStatus(StrEnum):
    LOADING = "loading"  # its engine starts or is being measured
    READY = "ready"  # it can serve
    FAILED = "failed"  # it did not load, failed its self-test, or its engine has died


class DeliveryError(Exception):
    """An order does not fit the endpoint's state."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def having(self, **changes: Any) -> Self:
        """Returns a copy with these changes."""
        return self.model_copy(update=changes)


class Version(Record):
    """A checkpoint as it was promoted."""

    # Grows with each promotion; a checkpoint that is tried again is another version
    serial: int = 0
    checkpoint: str  # URI of its folder
    version: str  # hash of the weights, `x-model-version`
    lineage: dict[str, Any] | None = None  # run, step, data, tokenizer, code

    @property
    def name(self) -> str:
        """The run's id, or the folder's name if transformers saved the checkpoint."""
        return (
            str(self.lineage["run_id"])
            if self.lineage
            else self.checkpoint.rstrip("/").rpartition("/")[2]
        )


class Terms(Record):
    """The conditions on which a candidate becomes the live version and stays it."""

    # Share of the requests that it serves first; None: all at once
    canary_percent: float | None = None
    watch_s: float  # as a canary, and once more as the live version
    # Token rows whose loss is measured; without any, only a self-test
    gate_rows: tuple[tuple[int, ...], ...] = ()
    max_loss_increase: float = 0.0  # nats per token above the live version's loss
    max_error_rate: float = 0.01  # of its sequences, once `MIN_ERRORS` have failed
    # Of the seconds for a step of like size, compared with the version before
    max_latency_ratio: float | None = None
    load_timeout_s: float = 600.0


Result = Literal["promoted", "refused", "rolled_back"]


class Outcome(Record):
    """The end of a promotion."""

    version: Version
    result: Result
    reason: str


class Delivery(Record):
    """The versions that are served and being promoted: all that survives a restart."""

    deployment: str  # of the endpoint
    model_name: str  # of the first version, or the name that the settings give to all
    live: Version
    phase: Phase = Phase.STEADY
    # random: an endpoint that begins anew counts its epochs and serials from 1 again
    origin: str = ""
    epoch: int = 1  # grows whenever the route changes
    candidate: Version | None = None  # while LOADING or CANARY
    previous: Version | None = None  # loaded while WATCHING; otherwise a rollback would load it
    terms: Terms | None = None  # during a promotion
    last_serial: int = 1
    outcome: Outcome | None = None  # of the last promotion, once it has ended
    history: tuple[Outcome, ...] = ()  # of the last ones, the oldest first
    draining: bool = False

    def shown(self) -> dict[str, Any]:
        """Returns what /admin shows of it."""
        return self.model_dump(mode="json", exclude={"terms": {"gate_rows"}})

    @property
    def stable(self) -> Version:
        """The version that serves after a rollback."""
        return self.previous if self.phase is Phase.WATCHING and self.previous else self.live

    @property
    def canary(self) -> Version | None:
        """The version that is being promoted, from its loading until it is the only one."""
        return self.live if self.phase is Phase.WATCHING else self.candidate

    @property
    def needed(self) -> list[Version]:
        """The versions that each replica has loaded, in the order of loading."""
        beside = self.previous if self.phase is Phase.WATCHING else self.candidate
        return [self.live] if beside is None else [self.live, beside]

    @property
    def known(self) -> list[Version]:
        """The versions whose checkpoints must not be deleted."""
        versions = (self.live, self.candidate, self.previous)
        return [version for version in versions if version is not None]

    @property
    def withdrawn(self) -> frozenset[str]:
        """The weights, as `Version.version`, that the last promotions refused or that were rolled
        back: nobody is shown what nobody may be served. Those that were promoted since, or are live
        after all, are not among them."""
        # The newest of each
        results = {outcome.version.version: outcome.result for outcome in self.history}
        kept = {version for version, result in results.items() if result == "promoted"}
        return frozenset(results.keys() - kept - {self.live.version})

    @property
    def names(self) -> list[str]:
        """The names by which a client may ask for the model. A promotion removes none that is in
        use."""
        served = [outcome.version for outcome in self.history if outcome.result != "refused"]
        now = [
            version
            for version in self.known
            if self.phase is not Phase.LOADING or version != self.candidate
        ]
        return list(
            dict.fromkeys([self.live.name, self.model_name, *(v.name for v in [*now, *served])])
        )

    @property
    def route(self) -> "Route":
        if (
            self.phase is Phase.CANARY
            and self.candidate
            and self.terms
            and self.terms.canary_percent
        ):
            beside = self.candidate.serial, self.terms.canary_percent
            return Route(self.epoch, self.live.serial, *beside, origin=self.origin)
        return Route(self.epoch, self.live.serial, origin=self.origin)


@dataclass(frozen=True)
class Route:
    """Says which version a request goes to."""

    epoch: int
    primary: int  # serial
    canary: int = 0  # serial, 0 for none
    percent: float = 0.0
    # That of the `Delivery`; epochs and serials of different origins are not comparable
    origin: str = ""

    def is_newer_than(self, other: "Route") -> bool:
        return self.origin == other.origin and self.epoch > other.epoch

    def serial_for(self, key: str | None) -> int:
        """Returns a version's serial: the same one for the same key, a random one without a key."""
        if not self.canary:
            return self.primary
        digest = hashlib.sha256(f"{self.canary}:{key}".encode()).digest()
        place = random.random() if key is None else int.from_bytes(digest[:8]) / 2**64
        return self.canary if place * 100 < self.percent else self.primary

    def to_header(self) -> str:
        return f"{self.epoch}:{self.primary}:{self.canary}:{self.percent}:{self.origin}"

    @classmethod
    def from_header(cls, text: str) -> Self | None:
        """Returns None if `text` is not a route."""
        try:
            epoch, primary, canary, percent, origin = text.split(":")
            return cls(int(epoch), int(primary), int(canary), float(percent), origin)
        except ValueError:
            return None


@dataclass
class StepTimes:
    """Steps of about the same size that read no prompt."""

    count: int = 0
    busy_s: float = 0.0

    @property
    def mean_s(self) -> float:
        return self.busy_s / self.count


@dataclass
class VersionStats:
    """Counts what a version has done on one replica, without the sequences of clients that left."""

    sequences: int = 0
    errors: int = 0
    # By `step_size` of the sequences that got a token
    steps: dict[int, StepTimes] = field(default_factory=dict)

    def stepped(self, num_sequences: int, step_s: float) -> None:
        """Counts a step that gave each of so many sequences a token, and did nothing else."""
        times = self.steps.setdefault(step_size(num_sequences), StepTimes())
        times.count += 1
        times.busy_s += step_s

    def add(self, other: "VersionStats") -> None:
        self.sequences += other.sequences
        self.errors += other.errors
        for size, times in other.steps.items():
            total = self.steps.setdefault(size, StepTimes())
            total.count += times.count
            total.busy_s += times.busy_s


def step_size(num_sequences: int) -> int:
    """Returns the class of steps with about as many sequences: 1, 2, 3 to 4, 5 to 8 and so on."""
    return (num_sequences - 1).bit_length()


@dataclass(frozen=True)
class SlotReport:
    """A replica's report on one version."""

    status: SlotStatus
    problem: str = ""
    loss: float | None = None  # on the gate's rows, nats per token
    live_loss: float | None = None
    in_place: bool = False  # whether its weights take turns with another version's, in one engine
    stats: VersionStats = field(default_factory=VersionStats)


@dataclass(frozen=True)
class ReplicaReport:
    replica: str
    epoch: int = 0
    slots: Mapping[int, SlotReport] = field(default_factory=dict)  # by serial
    is_leaving: bool = False  # it ends because it is not needed any more


def start(state: Delivery, candidate: Version, terms: Terms) -> Delivery:
    """Starts a promotion: `candidate` is loaded beside the live version."""
    if state.phase is not Phase.STEADY:
        checkpoint = (state.candidate or state.live).checkpoint
        raise DeliveryError(
            f"{checkpoint} is being promoted ({state.phase}): wait for it, finish it, or roll it back"
        )
    serial = state.last_serial + 1
    candidate = candidate.having(serial=serial)
    return state.having(
        phase=Phase.LOADING, candidate=candidate, terms=terms, last_serial=serial, outcome=None
    )


def finish(state: Delivery) -> Delivery:
    """Gives all requests to the canary."""
    if state.phase is not Phase.CANARY:
        raise DeliveryError(f"there is no canary to finish: the endpoint is {state.phase}")
    return _switched(state)


def roll_back(state: Delivery, reason: str) -> Delivery:
    """Ends the promotion, or returns to the version before, which is loaded again if necessary."""
    if state.phase is Phase.STEADY:
        if state.previous is None:
            raise DeliveryError("there is no earlier version to return to")
        left = Outcome(version=state.live, result="rolled_back", reason=reason)
        return start(_remembering(state, left), state.previous, Terms(watch_s=0))
    serves = state.phase is not Phase.LOADING
    result: Result = "rolled_back" if serves else "refused"
    outcome = Outcome(version=state.candidate or state.live, result=result, reason=reason)
    previous = None if state.phase is Phase.WATCHING else state.previous
    return _ended(state, outcome, epoch=state.epoch + serves, live=state.stable, previous=previous)


def advance(
    state: Delivery,
    present: Collection[ReplicaReport],
    *,
    gone: Collection[ReplicaReport] = (),
    elapsed_s: float,
) -> Delivery:
    """Returns the next state, or the same. `present` are the replicas that report; reports of
    `gone` ones count too. `elapsed_s` is the time since the phase began."""
    newest = max((report.epoch for report in present), default=0)
    if newest > state.epoch:  # a coordinator died before it could store its last decision
        state = state.having(epoch=newest + 1)
    if state.terms is None:
        return state
    new = state.canary
    assert new is not None
    slots = [report.slots.get(new.serial) for report in present]
    if reason := _problem_on_a_replica(new, slots, gone, state.terms):
        return roll_back(state, reason)
    if state.phase is Phase.LOADING:
        return _loading(state, state.terms, slots, elapsed_s)
    if reason := _service_problem(state, state.terms, [*present, *gone]):
        return roll_back(state, reason)
    if elapsed_s < state.terms.watch_s:
        return state
    promoted = Outcome(version=state.live, result="promoted", reason="")
    return _switched(state) if state.phase is Phase.CANARY else _ended(state, promoted)


def _loading(
    state: Delivery, terms: Terms, slots: Collection[SlotReport | None], elapsed_s: float
) -> Delivery:
    """Returns the state after LOADING. No replica switches before all of them can."""
    if slots and all(slot is not None and slot.status is SlotStatus.READY for slot in slots):
        if terms.canary_percent is None:
            return _switched(state)
        return state.having(phase=Phase.CANARY, epoch=state.epoch + 1)
    if elapsed_s > terms.load_timeout_s:
        return roll_back(
            state, f"it was not loaded by every replica within {terms.load_timeout_s:g} s"
        )
    return state


def _problem_on_a_replica(
    new: Version,
    slots: Collection[SlotReport | None],
    gone: Collection[ReplicaReport],
    terms: Terms,
) -> str:
    """Returns why the new version must go, in any phase, since a replica may join late; empty if it
    may stay."""
    for slot in slots:
        if slot is not None and (reason := slot.problem or _gate_problem(slot, terms)):
            return reason
    for report in gone:
        if (
            not report.is_leaving
            and (slot := report.slots.get(new.serial)) is not None
            and slot.in_place
        ):
            # A replica reports weights that end an engine of their own. These may have ended its
            # only engine, and it.
            return f"replica {report.replica} has ended, whose engine could have these weights"
    return ""


def _gate_problem(slot: SlotReport, terms: Terms) -> str:
    if slot.loss is None or slot.live_loss is None:
        return ""
    if not math.isfinite(slot.loss):
        return "its loss on the gate's text is not a finite number"
    if slot.loss > slot.live_loss + terms.max_loss_increase:
        return (
            f"its loss on the gate's text is {slot.loss:.4f} nats per token, the live version's {slot.live_loss:.4f}: "
            f"worse by more than {terms.max_loss_increase:g}"
        )
    return ""


def _service_problem(state: Delivery, terms: Terms, everyone: Collection[ReplicaReport]) -> str:
    """Returns why the new version must go, by how it has served; empty if it may stay."""
    new, old = state.canary, state.stable
    assert new is not None
    stats, before = total(everyone, new.serial), total(everyone, old.serial)
    if stats.errors >= MIN_ERRORS and stats.errors > terms.max_error_rate * stats.sequences:
        return f"{stats.errors} of its {stats.sequences} sequences failed, more than {terms.max_error_rate:.1%}"
    num_judged = min(stats.sequences, before.sequences)
    if terms.max_latency_ratio is None or num_judged < MIN_JUDGED_SEQUENCES:
        return ""
    compared = step_times_at_like_load(stats, before)
    if compared is None:
        return ""
    took_s, took_before_s = compared
    if took_s > terms.max_latency_ratio * took_before_s:
        return (
            f"it takes {1000 * took_s:.1f} ms a token, the version before {1000 * took_before_s:.1f} ms in steps of "
            f"like size: more than {terms.max_latency_ratio:g} times as long"
        )
    return ""


def total(reports: Collection[ReplicaReport], serial: int) -> VersionStats:
    """Adds up what all replicas report of a version."""
    stats = VersionStats()
    for report in reports:
        if serial in report.slots:
            stats.add(report.slots[serial].stats)
    return stats


def step_times_at_like_load(new: VersionStats, old: VersionStats) -> tuple[float, float] | None:
    """Returns the seconds of the new version's mean step, and those that the old one takes for the
    same mixture of sizes. Prompts that are read, and more sequences at a time, make any version
    slower. Returns None before each has made enough steps of sizes that the other has made too."""
    num_steps, new_s, old_s = 0, 0.0, 0.0
    for size, times in new.steps.items():
        before = old.steps.get(size)
        if before is None or min(times.count, before.count) < MIN_JUDGED_STEPS:
            continue
        num_steps += times.count
        new_s += times.busy_s
        old_s += times.count * before.mean_s
    return (new_s / num_steps, old_s / num_steps) if num_steps else None


def _switched(state: Delivery) -> Delivery:
    new, old = state.candidate, state.live
    return state.having(
        phase=Phase.WATCHING, epoch=state.epoch + 1, live=new, previous=old, candidate=None
    )


def _ended(state: Delivery, outcome: Outcome, **changes: Any) -> Delivery:
    ended = _remembering(state, outcome)
    return ended.having(**changes, phase=Phase.STEADY, candidate=None, terms=None, outcome=outcome)


def _remembering(state: Delivery, outcome: Outcome) -> Delivery:
    return state.having(history=(*state.history, outcome)[-HISTORY:])


def version_of(model: ServedModel, *, checkpoint: str) -> Version:
    """Returns what the coordinator keeps of a model; `checkpoint` is its URI."""
    return Version(checkpoint=checkpoint, version=model.version, lineage=model.lineage)
