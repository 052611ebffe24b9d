"""Lets a replica follow the coordinator: it reports, asks what to serve, and serves that.

Whatever fails there, a replica that serves continues to serve: it warns, and a metric shows for how
long it has been alone. Its health depends on its own engines only.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeVar

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from cluster.settings.serve import ServeConfig
from cluster.storage.registry import find_checkpoint
from model.files.bounded_text import require_bounded_text
from serving.delivery.coordinator import Reply
from serving.delivery.promotion import (
    MODEL,
    Delivery,
    DeliveryError,
    Phase,
    ReplicaReport,
    Version,
    version_of,
)
from serving.delivery.versions import Versions
from serving.limits.key_usage import KeyUsage
from serving.protocol.served_model import read_served_model

POLL_S = 0.5  # between reports
ANSWER_TIMEOUT_S = 5.0
WARN_AGAIN_S = 60.0  # while the coordinator does not answer

_log = logging.getLogger(__name__)
Answered = TypeVar("Answered")


class CoordinatorAwayError(Exception):
    """The coordinator gives no usable answer: it is being replaced, has not started yet, or
    fails."""


@dataclass(eq=False)
class Follower:
    """A replica's side of the coordinator. `versions` exists once `start` has returned."""

    config: ServeConfig
    coordinator: DeploymentHandle
    _: KW_ONLY
    deployment: str
    replica: str
    on_live_death: Callable[[str], None]  # see `Versions`
    usage: KeyUsage = field(default_factory=KeyUsage)
    versions: Versions = field(init=False)
    # Whether the storage has the endpoint's state
    is_stored: bool = field(default=True, init=False)
    _following: asyncio.Task[None] | None = field(default=None, init=False)
    _away_since_s: float | None = field(default=None, init=False)
    _warned_s = 0.0

    async def start(self) -> None:
        """Returns when the live version answers. Raises `CheckpointError` or `RuntimeError` if it
        cannot be served."""
        self.versions = Versions(self.config, await self._join(), on_live_death=self.on_live_death)
        self._following = asyncio.create_task(self._follow())
        await self.versions.wait_until_live()

    @property
    def away_s(self) -> float:
        """The seconds since the coordinator last gave a usable answer; 0 while it answers."""
        return 0.0 if self._away_since_s is None else time.monotonic() - self._away_since_s

    async def close(self) -> None:
        if self._following is None:  # `start` has failed before there was anything to close
            return
        self._following.cancel()
        # The new version is not what ends this replica
        lines = self.versions.delivery.lines.values()
        is_promoting = any(line.phase is not Phase.STEADY for line in lines)
        if is_promoting or self.usage.has_news:
            with contextlib.suppress(CoordinatorAwayError, DeliveryError):
                await self._exchange(self._report(is_leaving=True))
        await self.versions.close()

    def _report(self, *, is_leaving: bool = False) -> ReplicaReport:
        reports = {
            name: ReplicaReport(self.replica, line.delivery.epoch, line.report(), is_leaving)
            for name, line in self.versions.lines.items()
        }
        model = reports.pop(MODEL)
        return dataclasses.replace(model, adapters=reports)

    async def _exchange(self, report: ReplicaReport) -> Reply:
        """Reports, also what keys use here, and returns the coordinator's answer."""
        asked_at_s = time.monotonic()
        used = self.usage.report()
        reply: Reply = await answer_of(
            self.coordinator.exchange.remote(self.deployment, report, used)
        )
        if reply.usage is not None:
            self.usage.adopt(reply.usage, used, asked_at_s=asked_at_s)
        return reply

    async def _join(self) -> Delivery:
        """Returns what to serve. Waits while the coordinator starts, or is still that of the
        previous deployment. The first replica of a new endpoint begins with the checkpoint of the
        settings, and the first one that finds more adapters in the settings begins with those."""
        report = ReplicaReport(self.replica)
        while True:
            try:
                reply = await self._exchange(report)
                if reply.delivery is not None:
                    return await self._with_adapters(reply.delivery)
                if reply.is_ours:
                    return await self._with_adapters(await self._begin())
            except (CoordinatorAwayError, DeliveryError) as error:
                self._warn("waiting for the coordinator", error)
            await asyncio.sleep(POLL_S)

    async def _begin(self) -> Delivery:
        live = await asyncio.to_thread(_read_version, self.config.checkpoint, self.config)
        return await answer_of(
            self.coordinator.begin.remote(self.config.model_name or live.name, live)
        )

    async def _with_adapters(self, state: Delivery) -> Delivery:
        """Returns the state once it has the adapters of the settings."""
        named = self.config.adapters
        versions = {
            name: await asyncio.to_thread(_read_version, reference, self.config)
            for name, reference in named.items()
            if name not in state.adapters
        }
        if not versions:
            return state
        return await answer_of(self.coordinator.begin_adapters.remote(named, versions))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            asked_at_s = time.monotonic()
            try:
                reply = await self._exchange(self._report())
                self.is_stored = reply.is_stored
                self.versions.num_ready_replicas = reply.num_ready
                if reply.delivery is not None:
                    self.versions.adopt(reply.delivery, asked_at_s=asked_at_s)
            except Exception as error:  # nothing here may end a replica that serves
                self._warn("serving continues without the coordinator", error)
                continue
            if self._away_since_s is not None:
                _log.warning("the coordinator answers again, after %.0f s", self.away_s)
                self._away_since_s = None

    def _warn(self, what: str, error: Exception) -> None:
        """Logs a problem when it begins, and once in a while as long as it lasts."""
        now_s = time.monotonic()
        if self._away_since_s is None:
            self._away_since_s = now_s
        elif now_s - self._warned_s < WARN_AGAIN_S:
            return
        self._warned_s = now_s
        # An unexpected error gets a traceback, which shows the bug.
        is_known = isinstance(error, CoordinatorAwayError | DeliveryError)
        _log.error("%s: %s", what, error, exc_info=None if is_known else error)


def _read_version(reference: str, config: ServeConfig) -> Version:
    """Returns the version of a checkpoint as it is now. Raises `CheckpointError`."""
    storage = config.storage
    uri, folder = find_checkpoint(reference, storage.uri, signed_by=storage.signer)
    require_bounded_text(folder)
    return version_of(read_served_model(folder, name=None), checkpoint=uri)


async def answer_of(call: Awaitable[Answered]) -> Answered:
    """Returns the coordinator's answer. Raises its `DeliveryError`, and `CoordinatorAwayError` for
    everything else: its process is gone, or its code fails."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await call
    except RayTaskError as error:
        if isinstance(error.cause, DeliveryError):
            raise error.cause from None
        raise CoordinatorAwayError(f"it fails: {error}") from None  # includes its traceback
    except (
        Exception
    ) as error:  # from Ray or Ray Serve, or a reply of other code that cannot be unpickled
        raise CoordinatorAwayError(f"{type(error).__name__}: {error}") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise CoordinatorAwayError("it was ended while it worked on the answer") from None
