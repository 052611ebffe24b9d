"""How a replica follows the coordinator: it reports, asks what to serve, and serves that.

Whatever fails there, a replica that serves continues with what it serves: it warns, and says in a metric for how long
it has been on its own. Its health is a matter of its own engines alone.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from cluster.settings.serve import ServeConfig
from cluster.storage.registry import find_checkpoint
from serving.delivery.coordinator import Reply
from serving.delivery.promotion import Delivery, DeliveryError, ReplicaReport, version_of
from serving.delivery.versions import Versions
from serving.protocol.served_model import read_served_model

ANSWER_TIMEOUT_S = 5.0
WARN_AGAIN_S = 60.0  # while the coordinator stays away

_log = logging.getLogger(__name__)
Answered = TypeVar("Answered")


class CoordinatorAwayError(Exception):
    """The coordinator gives no usable answer: it is being replaced, has not started yet, or fails."""


class Follower:
    """`versions` exists once `start` has returned."""

    versions: Versions

    def __init__(
        self,
        config: ServeConfig,
        coordinator: DeploymentHandle,
        *,
        deployment: str,
        replica: str,
        on_live_death: Callable[[str], None],
    ) -> None:
        """`on_live_death`: see `Versions`."""
        self._config = config
        self.coordinator = coordinator
        self._deployment = deployment
        self._replica = replica
        self._on_live_death = on_live_death
        self._away_since_s: float | None = None
        self._warned_s = 0.0

    async def start(self) -> None:
        """Returns when what is live answers. Raises `CheckpointError` and `RuntimeError` for what cannot be served."""
        self.versions = Versions(self._config, await self._join(), on_live_death=self._on_live_death)
        self._following = asyncio.create_task(self._follow())
        await self.versions.wait_until_live()

    def check_health(self) -> None:
        """Raises for a replica to be replaced. The coordinator has no part in that: what is wrong with it would end all
        replicas in the same second."""
        self.versions.check_health()

    @property
    def away_s(self) -> float:
        """For how long there has been no usable answer of the coordinator; 0 while it answers."""
        return 0.0 if self._away_since_s is None else time.monotonic() - self._away_since_s

    async def close(self) -> None:
        self._following.cancel()
        await self.versions.close()

    async def _join(self) -> Delivery:
        """What to serve. Waits for a coordinator that starts, or is still the one of the deployment before; the first
        replica of a new endpoint tells it what the settings name."""
        report = ReplicaReport(self._replica)
        while True:
            try:
                reply: Reply = await answer_of(self.coordinator.exchange.remote(self._deployment, report))
                if reply.delivery is not None:
                    return reply.delivery
                if reply.is_ours:
                    return await self._begin()
            except (CoordinatorAwayError, DeliveryError) as error:
                self._warn("waiting for the coordinator", error)
            await asyncio.sleep(self._config.delivery.poll_s)

    async def _begin(self) -> Delivery:
        uri, folder = await asyncio.to_thread(find_checkpoint, self._config.checkpoint, self._config.storage.uri)
        model = await asyncio.to_thread(read_served_model, folder, name=self._config.model_name)
        live = version_of(model, checkpoint=uri)
        return await answer_of(self.coordinator.begin.remote(self._config.model_name or live.name, live))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._config.delivery.poll_s)
            asked_at_s = time.monotonic()
            try:
                report = ReplicaReport(self._replica, self.versions.delivery.epoch, self.versions.report())
                reply: Reply = await answer_of(self.coordinator.exchange.remote(self._deployment, report))
                if reply.delivery is not None:
                    self.versions.adopt(reply.delivery, asked_at_s=asked_at_s)
            except Exception as error:  # see above: nothing here may end a replica that serves
                self._warn("serving goes on without the coordinator", error)
                continue
            if self._away_since_s is not None:
                _log.warning("the coordinator answers again, after %.0f s", self.away_s)
                self._away_since_s = None

    def _warn(self, what: str, error: Exception) -> None:
        """When it begins, and now and then while it lasts."""
        now_s = time.monotonic()
        if self._away_since_s is None:
            self._away_since_s = now_s
        elif now_s - self._warned_s < WARN_AGAIN_S:
            return
        self._warned_s = now_s
        # An error that is none of ours has a traceback, which says where the defect is.
        is_known = isinstance(error, CoordinatorAwayError | DeliveryError)
        _log.error("%s: %s", what, error, exc_info=None if is_known else error)


async def answer_of(call: Awaitable[Answered]) -> Answered:
    """The coordinator's answer. Raises `DeliveryError` as it does, and `CoordinatorAwayError` for all else: its process
    is away, or its code fails."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await call
    except RayTaskError as error:
        if isinstance(error.cause, DeliveryError):
            raise error.cause from None
        raise CoordinatorAwayError(f"it fails: {error}") from None  # with its traceback, as Ray gives it
    except Exception as error:  # Ray's, Ray Serve's, a reply of other code that cannot be unpickled
        raise CoordinatorAwayError(f"{type(error).__name__}: {error}") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise CoordinatorAwayError("it was ended while it worked on the answer") from None
