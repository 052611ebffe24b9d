"""The one place that changes what is served: a small deployment beside the replicas, which report
to it and ask it what to serve. Its state is in the storage, so that nothing changes if it or all
replicas die. `delivery_file.py` says what happens if two coordinators write there.
"""

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

from cluster.metrics.annotation import Annotation, annotator
from cluster.settings.serve import ServeConfig
from cluster.storage.uris import StorageError, open_storage
from serving.delivery import promotion
from serving.delivery.adapters import Order, begin_adapters, continued, on_line
from serving.delivery.delivery_file import (
    DamagedDeliveryError,
    DeliveryFile,
    NewerStateError,
    endpoint_name,
)
from serving.delivery.promotion import (
    MODEL,
    Delivery,
    DeliveryError,
    ReplicaReport,
    SlotStatus,
    Terms,
    Version,
)
from serving.limits.usage_board import UsageBoard
from serving.limits.usage_report import UsageAnswer, UsageReport
from serving.protocol.json_log import Process, log_in

REPLICA_LOST_S = 10.0  # without a report; a replica on a busy machine may be late
FORGET_S = 3600.0  # how long the reports of a replica that is gone count
RETRY_STORING_S = 10.0
STORING_S = 2.0  # for which a decision waits for the storage; a replica waits 5 s for an answer
PROMOTING_S = 15.0  # for which a promotion does, as none begins that is not stored

NO_USAGE = UsageReport()

_log = logging.getLogger(__name__)
Decided = TypeVar("Decided")


class Reply(NamedTuple):
    """The answer to a replica's report."""

    # False for a replica of another deployment, which a redeployed endpoint has for a while
    is_ours: bool
    delivery: Delivery | None  # None before the first replica has begun
    is_stored: bool = True
    # What keys use on all replicas; None for a replica of another deployment
    usage: UsageAnswer | None = None
    num_ready: int = 0  # replicas on which the live version answers


class Coordinator:
    """Decides when reports arrive, so without replicas nothing changes. All methods run in one
    event loop."""

    def __init__(self, config: ServeConfig, *, deployment: str) -> None:
        log_in(config.log_format, Process.COORDINATOR)
        self._deployment = deployment
        self._name = endpoint_name(config)
        self._named = config.adapters
        self._num_adapter_places = config.num_adapter_places
        self._file = DeliveryFile(
            open_storage(config.storage.uri), self._name, deployment=deployment
        )
        self._damage: DamagedDeliveryError | None = None  # set if the stored state cannot be read
        self._delivery: Delivery | None = None
        self._stored: Delivery | None = None
        self._retry_at_s = 0.0
        self._storing_problem = ""  # the last one
        # By line; of those that are not in it, and began before this coordinator
        self._phase_began_s: dict[str, float] = {}
        self._began_s = time.monotonic()
        self._reports: dict[str, tuple[float, ReplicaReport]] = {}
        self._usage = UsageBoard()
        self._lock = asyncio.Lock()  # one change at a time
        # Its methods run one at a time
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="delivery-file")
        self._writing: asyncio.Task[None] | None = None
        self._newer: Delivery | None = None  # of another coordinator, which a late write has found
        self._deciding: set[asyncio.Task[Any]] = set()
        self._annotator = annotator()
        self._restore()

    async def exchange(
        self, deployment: str, report: ReplicaReport, used: UsageReport = NO_USAGE
    ) -> Reply:
        """Takes a replica's report, and returns what it is to serve, and what keys use on all
        replicas."""
        if deployment != self._deployment:
            return Reply(is_ours=False, delivery=None)
        self._reports[report.replica] = (time.monotonic(), report)
        usage = self._usage.exchange(report.replica, used)
        if not self._lock.locked():  # otherwise somebody decides already; no replica waits for that
            await self._whole(self._advance())
        elif self._damage is not None:
            raise DeliveryError(str(self._damage))
        return Reply(
            is_ours=True,
            delivery=self._delivery,
            is_stored=self._stored is self._delivery,
            usage=usage,
            num_ready=self._num_ready(),
        )

    async def begin(self, model_name: str, live: Version) -> Delivery:
        """Sets what a new endpoint serves; the first replica decides for all."""
        return await self._whole(self._begin(model_name, live))

    async def begin_adapters(
        self, references: Mapping[str, str], versions: Mapping[str, Version]
    ) -> Delivery:
        """Has the endpoint serve adapters that its settings name; the first replica decides for
        all."""
        return await self._whole(self._begin_adapters(references, versions))

    async def promote(self, candidate: Version, terms: Terms, line: str = MODEL) -> Delivery:
        """Starts a promotion, of the model or of an adapter. Raises `DeliveryError` during another
        one of the same, and if the storage does not take the state."""
        return await self._whole(self._promote(candidate, terms, line))

    async def finish(self, line: str = MODEL) -> Delivery:
        return await self._whole(self._obey_alone(line, promotion.finish))

    async def roll_back(self, reason: str, line: str = MODEL) -> Delivery:
        order = partial(promotion.roll_back, reason=reason)
        return await self._whole(self._obey_alone(line, order))

    async def drain(self, draining: bool) -> Delivery:
        return await self._whole(self._drain(draining))

    async def _whole(self, decision: Coroutine[Any, Any, Decided]) -> Decided:
        """Returns a decision's result. A caller that gives up does not undo half of it."""
        task = asyncio.create_task(decision)
        self._deciding.add(task)
        task.add_done_callback(self._deciding.discard)
        return await asyncio.shield(task)

    async def _advance(self) -> None:
        async with self._lock:
            await self._require_known()
            if self._newer is not None:
                self._adopt(self._newer)
                self._newer = None
            if self._delivery is not None:
                for name in self._delivery.lines:
                    await self._advance_line(name)

    async def _advance_line(self, name: str) -> None:
        state, (present, gone) = self._begun(), self._by_presence()
        if name not in state.lines:  # another coordinator has changed the state meanwhile
            return
        advanced = promotion.advance(
            state.lines[name],
            [report.of_line(name) for report in present],
            gone=[report.of_line(name) for report in gone],
            elapsed_s=self._phase_s(name),
        )
        is_same = advanced is state.lines[name]
        await self._change(state if is_same else state.with_line(name, advanced))

    def _phase_s(self, line: str) -> float:
        return time.monotonic() - self._phase_began_s.get(line, self._began_s)

    async def _begin(self, model_name: str, live: Version) -> Delivery:
        async with self._lock:
            await self._require_known()
            if self._delivery is None:
                origin, first = secrets.token_hex(4), live.having(serial=1)
                begun = Delivery(
                    deployment=self._deployment, origin=origin, model_name=model_name, live=first
                )
                await self._change(begun)
            assert self._delivery is not None
            return self._delivery

    async def _begin_adapters(
        self, references: Mapping[str, str], versions: Mapping[str, Version]
    ) -> Delivery:
        async with self._lock:
            for _ in range(2):  # also in a newer state of another coordinator
                begun = begin_adapters(
                    self._begun(), references, versions, new_origin=partial(secrets.token_hex, 4)
                )
                if await self._change(begun):
                    break
            return self._begun()

    async def _promote(self, candidate: Version, terms: Terms, line: str) -> Delivery:
        async with self._lock:
            if self._writing is not None:  # a late write of what was decided before
                await asyncio.wait({self._writing}, timeout=PROMOTING_S)
            before = self._begun()
            order = partial(promotion.start, candidate=candidate, terms=terms)
            promoted = await self._obey(line, order, storing_s=PROMOTING_S)
            if self._stored is not promoted:
                await self._change(before)
                raise DeliveryError(
                    f"the state could not be stored in {self._file.uri}, so a replica that starts later would not know "
                    f"the checkpoint; nothing was promoted. The reason: {self._storing_problem}"
                )
            return promoted

    async def _obey_alone(self, line: str, order: Order) -> Delivery:
        async with self._lock:
            return await self._obey(line, order)

    async def _drain(self, draining: bool) -> Delivery:
        async with self._lock:
            for _ in range(2):  # the order applies to a newer state of another coordinator too
                if await self._change(self._begun().having(draining=draining)):
                    break
            return self._begun()

    async def status(self) -> dict[str, Any]:
        """Returns what /admin/status shows: the state, and each replica's report."""
        present, _ = self._by_presence()
        state = self._begun()
        return {
            "delivery": state.shown(),
            "is_stored": self._stored is state,
            "phase_s": round(self._phase_s(MODEL), 1),
            "adapters_phase_s": {name: round(self._phase_s(name), 1) for name in state.adapters},
            "replicas": [dataclasses.asdict(report) for report in present],
        }

    def _begun(self) -> Delivery:
        if self._delivery is None:
            raise DeliveryError(
                str(self._damage or "no replica has started yet; try again in a moment")
            )
        return self._delivery

    async def _obey(self, line: str, order: Order, *, storing_s: float | None = None) -> Delivery:
        """Carries out an operator's order on a line, but only on the state that the operator could
        see."""
        ordered = on_line(line, order, num_places=self._num_adapter_places)
        if not await self._change(ordered(self._begun()), storing_s):
            now = self._begun()
            now = now.lines.get(line, now)
            raise DeliveryError(
                "another coordinator of this endpoint has changed the state meanwhile (two clusters have one while one "
                f"replaces the other): the endpoint is {now.phase}, live is {now.live.checkpoint}; nothing was done, "
                "ask again if you still want it"
            )
        return self._begun()

    def _by_presence(self) -> tuple[list[ReplicaReport], list[ReplicaReport]]:
        now_s = time.monotonic()
        self._reports = {
            name: seen for name, seen in self._reports.items() if now_s - seen[0] < FORGET_S
        }
        present, gone = list[ReplicaReport](), list[ReplicaReport]()
        for at_s, report in self._reports.values():
            is_gone = report.is_leaving or now_s - at_s >= REPLICA_LOST_S
            (gone if is_gone else present).append(report)
        return present, gone

    def _num_ready(self) -> int:
        if self._delivery is None:
            return 0
        live = self._delivery.live.serial
        slots = [report.slots.get(live) for report in self._by_presence()[0]]
        return sum(slot is not None and slot.status is SlotStatus.READY for slot in slots)

    def _restore(self) -> None:
        """Reads the stored state. Raises `StorageError` if the storage does not answer. With a
        damaged state without a copy the coordinator starts and reports it: replicas that serve need
        the coordinator for changes only."""
        try:
            restored = self._file.restore()
            self._stored = None if self._file.is_damaged else restored
            self._delivery = restored and continued(restored, self._named)
        except DamagedDeliveryError as error:
            if self._damage is None:
                _log.error("%s", error)
            self._damage, self._retry_at_s = error, time.monotonic() + RETRY_STORING_S
            return
        self._damage = None
        if self._delivery is not None and self._delivery.draining:
            _log.warning(
                "%s was drained before this start and takes no completions; POST /admin/drain with "
                '{"drain": false} ends that',
                self._name,
            )

    async def _require_known(self) -> None:
        """Raises `DeliveryError` if the state is damaged and nobody has restored it meanwhile."""
        if self._damage is not None and time.monotonic() > self._retry_at_s:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._restore)
        if self._damage is not None:
            raise DeliveryError(str(self._damage))

    async def _change(self, state: Delivery, storing_s: float | None = None) -> bool:
        """Stores the state, then acts on it; on a rollback it acts first. A storage that is down,
        or hangs, delays no decision by more than `storing_s`, by default `STORING_S`; writing is
        tried again later. Returns False if another coordinator has stored a newer state, which then
        counts."""
        before, is_ours = self._delivery, True
        is_due = state is not before or time.monotonic() > self._retry_at_s
        if _is_retreat(before, state):
            self._adopt(state)
        if state is not self._stored and is_due and self._writing is None:
            try:
                await self._store(state, STORING_S if storing_s is None else storing_s)
            except NewerStateError as error:
                _log.warning("%s", error)
                state = self._stored = error.state
                is_ours = False
            except StorageError as error:
                if state is not before:
                    _log.warning("the state of this endpoint is not stored: %s", error)
                self._retry_at_s = time.monotonic() + RETRY_STORING_S
                self._storing_problem = str(error)
        self._adopt(state)
        return is_ours

    async def _store(self, state: Delivery, within_s: float) -> None:
        """Returns once the state is stored. Raises `StorageError`, also if the storage takes longer;
        then the write goes on, no other begins before it has ended, and what it finds counts
        then."""
        writing = self._writing = asyncio.create_task(self._write(state))
        done, _ = await asyncio.wait({writing}, timeout=within_s)
        if done:
            self._writing = None
            writing.result()
        else:
            writing.add_done_callback(self._written_late)
            raise StorageError(f"the storage has not answered within {within_s:g} s")

    async def _write(self, state: Delivery) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, self._file.write, state)
        self._stored = state

    def _written_late(self, writing: asyncio.Task[None]) -> None:
        self._writing = None
        error = None if writing.cancelled() else writing.exception()
        if isinstance(error, NewerStateError):
            _log.warning("%s", error)
            self._newer = self._stored = error.state
        elif error is None:
            self._retry_at_s = 0.0  # what was decided meanwhile is stored now

    def _adopt(self, state: Delivery) -> None:
        """Acts on a state: replicas hear of it with their next report."""
        known = {} if self._delivery is None else self._delivery.lines
        self._delivery = state
        for name, line in state.lines.items():
            before = known.get(name)
            if before is None or line.phase is not before.phase or line.live != before.live:
                self._phase_began_s[name] = time.monotonic()
                self._tell(name, line)

    def _tell(self, name: str, line: Delivery) -> None:
        subject = f"adapter {name}: " if name else ""
        outcome = f"; {line.outcome.result}: {line.outcome.reason}" if line.outcome else ""
        text = f"{subject}{line.phase}, live is {line.live.checkpoint}{outcome}"
        _log.warning("%s", text)
        if self._annotator is not None:
            self._annotator.add(
                Annotation(time.time(), "promotion", f"endpoint:{self._name}", text)
            )


def _is_retreat(before: Delivery | None, after: Delivery) -> bool:
    """Tells whether a promotion ends without its version. What served before it is safe to serve,
    stored or not."""
    known = {} if before is None else before.lines
    ended = [
        line.outcome
        for name, line in after.lines.items()
        if name in known and line.outcome is not known[name].outcome
    ]
    return any(outcome is not None and outcome.result != "promoted" for outcome in ended)
