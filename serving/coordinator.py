"""The one place that changes what is served: a small deployment beside the replicas, which tell it how they are and
ask it what to serve. Its state is in the storage, so that its death, or all replicas', changes nothing.
"""

import asyncio
import dataclasses
import json
import logging
import time
from typing import Any, NamedTuple

from ray import serve

from cluster.grafana import Annotation, Annotator
from cluster.registry import ENDPOINTS
from cluster.serve_config import ReplicaConfig, ServeConfig
from cluster.storage import AlreadyExistsError, ConflictError, StorageError, open_storage
from serving import promotion
from serving.borrowing import Borrower, Seen, num_wanted_replicas
from serving.promotion import Delivery, DeliveryError, ReplicaReport, Terms, Version

REPLICA_LOST_S = 10.0  # without a report; a replica on a busy machine may be late
FORGET_S = 3600.0  # what a replica that is gone had seen
RETRY_STORING_S = 10.0

_log = logging.getLogger(__name__)


class Reply(NamedTuple):
    """To a replica."""

    is_ours: (
        bool  # whether the replica is of the coordinator's own deployment: a redeployed endpoint has both for a while
    )
    delivery: Delivery | None  # None before the first replica has begun


class Coordinator:
    """All methods run in one event loop. Decisions are taken as reports come in: without replicas there are none."""

    def __init__(self, config: ServeConfig, *, deployment: str) -> None:
        self._deployment = deployment
        self._storage = open_storage(config.storage.uri)
        self._key = f"{ENDPOINTS}{config.delivery.endpoint or f'{config.host}-{config.port}'.replace(':', '.')}.json"
        self._file_version: str | None = None
        self._stored: Delivery | None = None
        self._retry_at_s = 0.0
        self._phase_began_s = time.monotonic()
        self._reports: dict[str, tuple[float, ReplicaReport]] = {}
        self._lock = asyncio.Lock()  # one change at a time
        self._annotator = Annotator.from_environment()
        self._delivery = self._restored()
        if config.replicas.borrow_from is not None:
            self._borrow_from(config.replicas.borrow_from, config.replicas)

    async def exchange(self, deployment: str, report: ReplicaReport) -> Reply:
        """A replica's report, and what it is to serve."""
        if deployment != self._deployment:
            return Reply(is_ours=False, delivery=None)
        self._reports[report.replica] = (time.monotonic(), report)
        async with self._lock:
            if self._delivery is not None:
                present, gone = self._by_presence()
                elapsed_s = time.monotonic() - self._phase_began_s
                advanced = promotion.advance(self._delivery, present, gone=gone, elapsed_s=elapsed_s)
                await self._change(advanced)
        return Reply(is_ours=True, delivery=self._delivery)

    async def begin(self, model_name: str, live: Version) -> Delivery:
        """What a new endpoint serves; the first replica's word counts for all."""
        async with self._lock:
            if self._delivery is None:
                first = live.model_copy(update={"serial": 1})
                await self._change(Delivery(deployment=self._deployment, model_name=model_name, live=first))
            assert self._delivery is not None
            return self._delivery

    async def promote(self, candidate: Version, terms: Terms) -> Delivery:
        """Raises `DeliveryError` while another promotion is on, and where the storage takes no state."""
        async with self._lock:
            before = self._begun()
            await self._change(promotion.start(before, candidate, terms))
            if self._stored is not self._delivery:
                await self._change(before)
                raise DeliveryError(
                    f"the state could not be stored under {self._storage.uri}/{self._key}, so a replica that starts "
                    "later would not know of the checkpoint; the coordinator's log says why"
                )
            return self._begun()

    async def finish(self) -> Delivery:
        async with self._lock:
            await self._change(promotion.finish(self._begun()))
            return self._begun()

    async def roll_back(self, reason: str) -> Delivery:
        async with self._lock:
            await self._change(promotion.roll_back(self._begun(), reason))
            return self._begun()

    async def drain(self, draining: bool) -> Delivery:
        async with self._lock:
            await self._change(self._begun().model_copy(update={"draining": draining}))
            return self._begun()

    async def status(self) -> dict[str, Any]:
        """For people: the state, and what each replica says."""
        present, gone = self._by_presence()
        state = self._begun()
        return {
            "delivery": state.model_dump(mode="json", exclude={"terms": {"gate_rows"}}),
            "is_stored": self._stored is state,
            "phase_s": round(time.monotonic() - self._phase_began_s, 1),
            "replicas": [dataclasses.asdict(report) for report in present],
            "totals": {
                version.serial: vars(promotion.total([*present, *gone], version.serial)) for version in state.known
            },
        }

    def _begun(self) -> Delivery:
        if self._delivery is None:
            raise DeliveryError("no replica has started yet; try again in a moment")
        return self._delivery

    def _borrow_from(self, run_id: str, replicas: ReplicaConfig) -> None:
        application = serve.get_replica_context().app_name

        def look() -> Seen:
            """From the borrower's thread."""
            now_s = time.monotonic()
            num_placed = sum(now_s - at_s < REPLICA_LOST_S for at_s, _ in list(self._reports.values()))
            return Seen(num_wanted_replicas(application), num_placed)

        Borrower(
            self._storage.child(f"runs/{run_id}"),
            after_s=replicas.borrow_after_s,
            min_replicas=replicas.min_replicas,
            look=look,
        ).step_forever()

    def _by_presence(self) -> tuple[list[ReplicaReport], list[ReplicaReport]]:
        now_s = time.monotonic()
        self._reports = {name: seen for name, seen in self._reports.items() if now_s - seen[0] < FORGET_S}
        present = [report for at_s, report in self._reports.values() if now_s - at_s < REPLICA_LOST_S]
        gone = [report for at_s, report in self._reports.values() if now_s - at_s >= REPLICA_LOST_S]
        return present, gone

    def _restored(self) -> Delivery | None:
        """What this deployment served before its coordinator died; None for a new deployment. Raises `StorageError`:
        not to know what is live is worse than to wait for the storage."""
        entry = self._storage.stat(self._key)
        if entry is None:
            return None
        self._file_version = entry.version
        stored = json.loads(self._storage.read_bytes(self._key))["delivery"]
        if stored["deployment"] != self._deployment:
            return None
        self._stored = Delivery.model_validate_json(json.dumps(stored))
        return self._stored

    async def _change(self, state: Delivery) -> None:
        """Stores the state, then acts on it. A storage that is down delays no decision: it is tried again later."""
        before = self._delivery
        is_due = state is not before or time.monotonic() > self._retry_at_s
        if state is not self._stored and is_due:
            try:
                self._file_version = await asyncio.to_thread(self._store, state)
                self._stored = state
            except StorageError as error:
                if state is not before:
                    _log.warning("the state of this endpoint is not stored: %s", error)
                self._retry_at_s = time.monotonic() + RETRY_STORING_S
        self._delivery = state
        if before is None or state.phase is not before.phase or state.live != before.live:
            self._phase_began_s = time.monotonic()
            outcome = f"; {state.outcome.result}: {state.outcome.reason}" if state.outcome else ""
            text = f"{state.phase}, live is {state.live.checkpoint}{outcome}"
            _log.warning("%s", text)
            if self._annotator is not None:
                name = self._key.removeprefix(ENDPOINTS).removesuffix(".json")
                self._annotator.add(Annotation(time.time(), "promotion", f"endpoint:{name}", text))

    def _store(self, state: Delivery) -> str:
        pinned = [version.checkpoint for version in state.known]
        data = json.dumps({"pinned": pinned, "delivery": state.model_dump(mode="json")}).encode()
        if self._file_version is None:
            try:
                return self._storage.write_bytes(self._key, data, if_absent=True)
            except AlreadyExistsError:
                return self._replace_our_own(data)
        try:
            return self._storage.write_bytes(self._key, data, if_version=self._file_version)
        except ConflictError:
            return self._replace_our_own(data)

    def _replace_our_own(self, data: bytes) -> str:
        """A write whose answer was lost is no conflict, nor is the last one of the deployment before this one."""
        entry = self._storage.stat(self._key)
        owner = entry and json.loads(self._storage.read_bytes(self._key))["delivery"]["deployment"]
        if entry is None or (self._stored and owner != self._deployment):
            raise StorageError(
                f"another endpoint keeps its state in {self._storage.uri}/{self._key}; give each its own name with "
                "--delivery.endpoint"
            )
        return self._storage.write_bytes(self._key, data, if_version=entry.version)
