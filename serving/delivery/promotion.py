"""Decides which version serves which requests: from plain reports, without clock or cluster."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from serving.delivery.route import Route
from serving.delivery.version_stats import VersionStats, step_times_at_like_load
from serving.protocol.served_model import ServedModel

MODEL = ""  # the line of the model itself, see `Delivery.lines`
MIN_ERRORS = 3  # fewer may be chance
MIN_JUDGED_SEQUENCES = 20  # after which a version's speed is judged
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


class PromotionRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def having(self, **changes: Any) -> Self:
        """Returns a copy with these changes."""
        return self.model_copy(update=changes)


class Version(PromotionRecord):
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

    @property
    def is_adapter(self) -> bool:
        return self.lineage is not None and self.lineage.get("base_hash") is not None


class Terms(PromotionRecord):
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


class PromotionOutcome(PromotionRecord):
    """The end of a promotion."""

    version: Version
    result: Result
    reason: str


class Delivery(PromotionRecord):
    """The versions that are served and being promoted: all that survives a restart.

    An adapter that has a name of its own has a state of the same kind, without further adapters, so
    that it is promoted like the model itself.
    """

    deployment: str  # of the endpoint; of an adapter, the reference that the settings name
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
    outcome: PromotionOutcome | None = None  # of the last promotion, once it has ended
    history: tuple[PromotionOutcome, ...] = ()  # of the last ones, the oldest first
    draining: bool = False
    adapters: dict[str, "Delivery"] = {}  # by the name that clients give as model

    def shown(self) -> dict[str, Any]:
        """Returns what /admin shows of it."""
        shown = self.model_dump(mode="json", exclude={"terms": {"gate_rows"}, "adapters": True})
        return shown | {"adapters": {name: line.shown() for name, line in self.adapters.items()}}

    @property
    def lines(self) -> dict[str, "Delivery"]:
        """The things that are promoted by themselves: the model, as `MODEL`, and each adapter by its name."""
        return {MODEL: self, **self.adapters}

    def line(self, name: str) -> "Delivery":
        """Returns one of the lines. Raises `DeliveryError` for a name that is none of them."""
        if name in self.lines:
            return self.lines[name]
        none = "none by a name of its own: start it with `--adapters NAME=CHECKPOINT`, on vLLM"
        served = ", ".join(self.adapters) or none
        raise DeliveryError(f"no adapter is called {name[:64]!a}; this endpoint serves {served}")

    def with_line(self, name: str, line: "Delivery") -> "Delivery":
        """Returns the state with another one of a line."""
        return line if name == MODEL else self.having(adapters=self.adapters | {name: line})

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
    def serving(self) -> list[Version]:
        """Versions of `needed` that clients may get: no candidate that is still being measured."""
        return [self.live] if self.phase is Phase.LOADING else self.needed

    @property
    def known(self) -> list[Version]:
        """The versions of this line whose checkpoints must not be deleted."""
        versions = (self.live, self.candidate, self.previous)
        return [version for version in versions if version is not None]

    @property
    def pinned(self) -> list[str]:
        """The checkpoints of all lines that must not be deleted."""
        versions = chain.from_iterable(line.known for line in self.lines.values())
        return [version.checkpoint for version in versions]

    @property
    def num_adapters(self) -> int:
        """The number of adapters that each replica has loaded."""
        versions = chain.from_iterable(line.needed for line in self.lines.values())
        return sum(version.is_adapter for version in versions)

    @property
    def withdrawn(self) -> frozenset[str]:
        """The weights, as `Version.version`, that the last promotions refused or that were rolled
        back: nobody is shown what nobody may be served. Weights that were promoted since, or are
        live after all, are not among them."""
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
    adapters: Mapping[str, "ReplicaReport"] = field(default_factory=dict)

    def of_line(self, name: str) -> "ReplicaReport":
        """Returns what it reports on one line; nothing if it does not know the line yet."""
        if name == MODEL:
            return self
        return self.adapters.get(name) or ReplicaReport(self.replica, is_leaving=self.is_leaving)


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
        left = PromotionOutcome(version=state.live, result="rolled_back", reason=reason)
        return start(_remembering(state, left), state.previous, Terms(watch_s=0))
    serves = state.phase is not Phase.LOADING
    result: Result = "rolled_back" if serves else "refused"
    outcome = PromotionOutcome(version=state.candidate or state.live, result=result, reason=reason)
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
    problem = _problem_on_a_replica(new, slots, gone, state.terms)
    if problem:
        return roll_back(state, problem)
    if state.phase is Phase.LOADING:
        return _loading(state, state.terms, slots, elapsed_s)
    problem = _service_problem(state, state.terms, [*present, *gone])
    if problem:
        return roll_back(state, problem)
    if elapsed_s < state.terms.watch_s:
        return state
    promoted = PromotionOutcome(version=state.live, result="promoted", reason="")
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


def _switched(state: Delivery) -> Delivery:
    new, old = state.candidate, state.live
    return state.having(
        phase=Phase.WATCHING, epoch=state.epoch + 1, live=new, previous=old, candidate=None
    )


def _ended(state: Delivery, outcome: PromotionOutcome, **changes: Any) -> Delivery:
    ended = _remembering(state, outcome)
    return ended.having(**changes, phase=Phase.STEADY, candidate=None, terms=None, outcome=outcome)


def _remembering(state: Delivery, outcome: PromotionOutcome) -> Delivery:
    return state.having(history=(*state.history, outcome)[-HISTORY:])


def version_of(model: ServedModel, *, checkpoint: str) -> Version:
    """Returns what the coordinator keeps of a model; `checkpoint` is its URI."""
    return Version(checkpoint=checkpoint, version=model.version, lineage=model.lineage)
