"""The versions on one replica: loads and ends engines as the state demands, and picks one for each
request. Adapters with names of their own have versions of their own."""

import asyncio
import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.settings.serve import ServeConfig
from cluster.storage.checkpoint_cache import Holds
from raymill.errors import UserError
from serving.delivery.loaded_version import LoadedVersion
from serving.delivery.promotion import (
    MODEL,
    Delivery,
    Phase,
    SlotReport,
    SlotStatus,
    Version,
)
from serving.delivery.route import Route
from serving.delivery.version_stats import VersionStats
from serving.engine_process.client import EngineClient
from serving.text.chat_misfit import chat_misfit, chat_notice

# Before new weights get the only engine: two reports, as they may end it and the replica with it
TELL_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Slot:
    """A version that this replica has or is loading."""

    version: Version
    loading: asyncio.Task[None] = field(init=False)
    loaded: LoadedVersion | None = None
    is_measured: bool = False
    problem: str = ""
    loss: float | None = None
    live_loss: float | None = None

    @property
    def usable(self) -> LoadedVersion | None:
        return (
            self.loaded if self.is_measured and self.loaded and self.loaded.engine.alive else None
        )

    def report(self) -> SlotReport:
        loaded = self.loaded
        problem = self.problem or ("" if loaded is None else loaded.engine.death_notice)
        status = (
            SlotStatus.FAILED
            if problem
            else SlotStatus.READY
            if self.is_measured
            else SlotStatus.LOADING
        )
        in_place = loaded is not None and loaded.weights > 0
        stats = VersionStats() if loaded is None else copy.deepcopy(loaded.stats)
        return SlotReport(
            status, problem, self.loss, self.live_loss, in_place=in_place, stats=stats
        )


class Versions:
    """All versions of one line on one replica: of the model itself, or of an adapter by its name.
    The model's line has the lines of the `adapters`. All methods run in one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        delivery: Delivery,
        *,
        on_live_death: Callable[[str], None],
        name: str = MODEL,
        model: "Versions | None" = None,
    ) -> None:
        """`on_live_death` is called when a live engine dies that no other version can replace.
        `model` are the versions on whose engine those of an adapter compute."""
        self._on_live_death = on_live_death
        self._name = name
        self._model = model
        self.config = config
        self.delivery = delivery
        self.route = delivery.route
        self._learned_at_s = 0.0
        self._slots: dict[int, Slot] = {}
        # Engines are loaded while others serve
        self._one_at_a_time: asyncio.Lock = (
            asyncio.Lock() if model is None else model._one_at_a_time
        )
        self._ending: set[asyncio.Task[None]] = set()
        self._copies = Holds()
        self.adapters: dict[str, Versions] = {}
        self.num_ready_replicas = 0  # of the endpoint, as the coordinator said last
        self._reconcile()

    async def wait_until_live(self) -> None:
        """Returns when the live version answers, and each adapter's. Raises `RuntimeError` if one
        cannot be loaded."""
        # What is live may change meanwhile
        while not (live := self._slots[self.delivery.live.serial]).usable:
            await asyncio.shield(live.loading)
            if live.problem and live.version == self.delivery.live:
                subject = f"the adapter {self._name}: " if self._name else ""
                raise RuntimeError(subject + live.problem)
        for adapter in [*self.adapters.values()]:
            await adapter.wait_until_live()

    @property
    def lines(self) -> dict[str, "Versions"]:
        """Versions of the model itself, as `MODEL`, and of each adapter by its name."""
        return {MODEL: self, **self.adapters}

    def line_of(self, model: str | None) -> "Versions":
        """Returns the versions of the adapter of that name, or else the versions of the model
        itself."""
        adapter = self.adapters.get(model or MODEL)
        return adapter if adapter is not None and adapter._loaded else self

    def adopt(self, delivery: Delivery, *, asked_at_s: float) -> None:
        """Adopts the state that the coordinator returned to a question of `asked_at_s`. A route
        that was learned from a request since then is newer."""
        self.delivery = delivery
        if asked_at_s >= self._learned_at_s:
            self.route = delivery.route
        for name, adapter in self.adapters.items():
            if name in delivery.adapters:
                adapter.adopt(delivery.adapters[name], asked_at_s=asked_at_s)
        self._reconcile()

    def learn(self, route: Route) -> None:
        """Adopts a route that a client has seen at another replica, which heard from the
        coordinator a moment earlier. No replica switches before all of them can."""
        for adapter in self.adapters.values():
            adapter.learn(route)
        slot = self._slots.get(route.primary)
        if route.is_newer_than(self.route) and slot is not None and slot.usable:
            self.route = route
            self._learned_at_s = time.monotonic()

    @property
    def live(self) -> LoadedVersion:
        return self._usable(self.route.primary)

    @property
    def names(self) -> list[str]:
        """The names by which a request may ask for the model, the live one's first."""
        if self.config.model_name is not None:
            return [self.config.model_name]
        return [self.live.model.name, *self.delivery.names]

    @property
    def by_hash(self) -> dict[str, LoadedVersion]:
        """The versions that a request may ask for by their hash: the ones that answer clients now,
        and the one that would return."""
        usable = (
            self._slots[v.serial].usable for v in self.delivery.serving if v.serial in self._slots
        )
        return {loaded.model.version: loaded for loaded in usable if loaded is not None}

    def pick(self, key: str | None) -> LoadedVersion:
        """Returns the version for a request; the same one for the same `key`."""
        return self._usable(self.route.serial_for(key))

    def other_than(self, failed: LoadedVersion) -> LoadedVersion | None:
        """Returns a version for a request that `failed` could not answer; None without a
        promotion."""
        return next((loaded for loaded in self._trusted if loaded is not failed), None)

    def check_health(self) -> None:
        """Raises if this replica must be replaced: its live engine has died, or its weights give
        NaN. While another version can replace the live one, the coordinator decides."""
        live = self.live
        if self.other_than(live) is None:
            live.health.check()

    def report(self) -> dict[int, SlotReport]:
        return {serial: slot.report() for serial, slot in self._slots.items()}

    @property
    def num_running(self) -> int:
        return sum(engine.num_running for engine in self._engines)

    @property
    def num_waiting(self) -> int:
        return sum(engine.num_waiting for engine in self._engines)

    @property
    def kv_cache_usage(self) -> float:
        """The use of the fullest engine."""
        return max(engine.kv_cache_usage for engine in self._engines)

    @property
    def expected_wait_s(self) -> float:
        """The expected wait of a new sequence on the live engine."""
        return self.live.engine.queue.wait_s()

    async def close(self) -> None:
        for adapter in self.adapters.values():
            await adapter.close()
        for loaded in self._loaded:
            await loaded.close()
        self._copies.keep(())

    @property
    def _loaded(self) -> list[LoadedVersion]:
        return [slot.loaded for slot in self._slots.values() if slot.loaded is not None]

    @property
    def _engines(self) -> set[EngineClient]:
        return {loaded.engine for loaded in self._loaded}

    @property
    def _trusted(self) -> list[LoadedVersion]:
        """The usable versions, the primary first, without a candidate."""
        slots = sorted(
            self._slots.values(), key=lambda slot: slot.version.serial != self.route.primary
        )
        return [
            slot.usable for slot in slots if slot.usable and slot.version != self.delivery.candidate
        ]

    def _usable(self, serial: int) -> LoadedVersion:
        slot = self._slots.get(serial)
        wanted = slot.usable if slot is not None else None
        return wanted or (self._trusted or self._loaded)[0]

    @property
    def _computing(self) -> list[LoadedVersion]:
        """The versions whose engines another one may share."""
        usable = [slot.usable for slot in self._slots.values() if slot.usable]
        return usable if self._model is None else [*usable, *self._model._computing]

    def _reconcile(self) -> None:
        self._copies.keep([version.checkpoint for version in self.delivery.known])
        needed = {version.serial: version for version in self.delivery.needed}
        for serial, version in needed.items():
            if (slot := self._slots.get(serial)) is not None and slot.version != version:
                # Two coordinators gave the same number, one of them without a storage. The old
                # version still serves.
                self._slots[-serial] = self._slots.pop(serial)
            if serial not in self._slots:
                slot = self._slots[serial] = Slot(version)
                slot.loading = asyncio.create_task(self._load(slot))
        self._reconcile_adapters()
        if not self._slots[self.delivery.live.serial].usable:
            return  # the version that serves instead stays
        for serial in self._slots.keys() - needed.keys():
            task = asyncio.create_task(self._end(self._slots.pop(serial)))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _reconcile_adapters(self) -> None:
        """Begins with the adapters that this replica's settings name, and keeps them: replicas with
        other settings may share the state while one cluster replaces another."""
        for name in self.config.adapters:
            if name in self.delivery.adapters and name not in self.adapters:
                self.adapters[name] = Versions(
                    self.config,
                    self.delivery.adapters[name],
                    on_live_death=self._on_live_death,
                    name=name,
                    model=self,
                )

    async def _load(self, slot: Slot) -> None:
        async with self._one_at_a_time:
            try:
                others = self._computing
                if self._model is not None and not others:
                    raise UserError("the model that this adapter stands on is not loaded")
                name = self._name or self.config.model_name or slot.version.name
                slot.loaded = loaded = await LoadedVersion.load(
                    slot.version, name=name, config=self.config, others=others
                )
                if self._model is None:
                    loaded.engine.on_death = self._engine_died
                if loaded.weights and self.delivery.phase is not Phase.STEADY:
                    await asyncio.sleep(TELL_S)
                if slot.version == self.delivery.candidate:
                    _require_like_chats(self.live, loaded)
                    await self._measure(slot, loaded, before=self.live)
                else:
                    await loaded.health.self_test()
                slot.is_measured = True
                if self.delivery.phase is Phase.WATCHING and self.delivery.previous is not None:
                    # Only a replica that has joined later loads anything now. The new version
                    # serves already.
                    live, before = (
                        self._slots.get(v.serial)
                        for v in (self.delivery.live, self.delivery.previous)
                    )
                    if live and live.usable and live.loss is None and before and before.usable:
                        await self._measure(live, live.usable, before=before.usable)
            except Exception as error:  # foreign files may raise anything; they are refused, and the error is reported
                _log.warning("%s cannot be served", slot.version.checkpoint, exc_info=True)
                slot.problem = str(error) or repr(error)

    def _engine_died(self, notice: str) -> None:
        primary = self._slots.get(self.route.primary)
        has_lost_live = (
            primary is not None and primary.loaded is not None and not primary.loaded.engine.alive
        )
        if has_lost_live and not self._trusted:
            self._on_live_death(notice)

    async def _measure(self, slot: Slot, loaded: LoadedVersion, *, before: LoadedVersion) -> None:
        """Tests the new version, and measures its loss and that of the one before on the gate's
        rows. Clients wait while it has their engine, so it does both in one turn. Raises
        `EngineDiedError` if it fails its self-test."""
        terms, is_shared = self.delivery.terms, loaded.engine is before.engine
        if terms is None or not terms.gate_rows:
            await loaded.health.self_test()
            return
        live_loss = await before.loss(terms.gate_rows, at_once=is_shared)
        test = loaded.health.self_test()
        loss = loaded.loss(terms.gate_rows, at_once=is_shared)
        _, slot.loss = await asyncio.gather(test, loss)
        slot.live_loss = live_loss

    async def _end(self, slot: Slot) -> None:
        await slot.loading
        if slot.loaded is not None:
            await slot.loaded.retire()


def _require_like_chats(live: LoadedVersion, candidate: LoadedVersion) -> None:
    """Raises `UserError` if the candidate's chat template fails where the live version's does
    not."""
    before, after = live.texts.probe, candidate.texts.probe
    if problem := chat_misfit(before, after):
        raise UserError(f"the checkpoint {problem}")
    if notice := chat_notice(before, after):
        _log.warning("%s is promoted although %s", candidate.model.version, notice)
