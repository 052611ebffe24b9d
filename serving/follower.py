"""How a replica follows the coordinator: it reports, asks what to serve, and serves that."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.registry import find_checkpoint
from cluster.serve_config import ServeConfig
from serving.coordinator import Reply
from serving.promotion import Delivery, DeliveryError, ReplicaReport
from serving.served_model import read_served_model, version_of
from serving.versions import Versions

ANSWER_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)
Answered = TypeVar("Answered")


class CoordinatorAwayError(Exception):
    """The coordinator does not answer; it is being replaced, or not started yet."""


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

    async def start(self) -> None:
        """Returns when what is live answers. Raises `CheckpointError` and `RuntimeError` for what cannot be served."""
        self.versions = Versions(self._config, await self._join(), on_live_death=self._on_live_death)
        self._following = asyncio.create_task(self._follow())
        await self.versions.wait_until_live()

    def check_health(self) -> None:
        """Raises for a replica to be replaced."""
        if self._following.done():
            self._following.result()
        self.versions.check_health()

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
            except CoordinatorAwayError as error:
                _log.info("waiting for the coordinator: %s", error)
            await asyncio.sleep(self._config.delivery.poll_s)

    async def _begin(self) -> Delivery:
        uri, folder = await asyncio.to_thread(find_checkpoint, self._config.checkpoint, self._config.storage.uri)
        model = await asyncio.to_thread(read_served_model, folder, name=self._config.model_name)
        return await answer_of(self.coordinator.begin.remote(model.name, version_of(model, checkpoint=uri)))

    async def _follow(self) -> None:
        is_away = False
        while True:
            await asyncio.sleep(self._config.delivery.poll_s)
            asked_at_s = time.monotonic()
            report = ReplicaReport(self._replica, self.versions.delivery.epoch, self.versions.report())
            try:
                reply: Reply = await answer_of(self.coordinator.exchange.remote(self._deployment, report))
            except CoordinatorAwayError as error:
                if not is_away:
                    _log.warning("serving goes on without the coordinator: %s", error)
                is_away = True
                continue
            is_away = False
            if reply.delivery is not None:
                self.versions.adopt(reply.delivery, asked_at_s=asked_at_s)


async def answer_of(call: Awaitable[Answered]) -> Answered:
    """Of the coordinator. Raises `DeliveryError` as it does, and `CoordinatorAwayError`."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await call
    except RayTaskError as error:
        if isinstance(error.cause, DeliveryError):
            raise error.cause from None
        raise
    except (RayError, RayServeException, TimeoutError) as error:
        raise CoordinatorAwayError(f"{type(error).__name__}: {error}") from None
