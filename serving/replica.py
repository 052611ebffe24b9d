"""One replica of the endpoint: HTTP ingress, tokenizer and the front of engine processes, in one deployment.

There is no handle between them, as each streamed token would pay 0.6 ms for it. Annotations are real objects here
(no `from __future__ import annotations`): Ray Serve reads them.
"""

import asyncio
import time

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.monitoring.metric_export import PUBLISH_INTERVAL_S, Metrics
from cluster.settings.serve import ServeConfig
from serving.api.access import AccessRules, CurrentAccess
from serving.api.admin_routes import admin_router
from serving.api.admission import AdmissionLimits
from serving.api.ingress import build_http_app
from serving.api.metrics import ReplicaMetrics
from serving.delivery.autoscaling import KV_USE, WAITING
from serving.delivery.follower import Follower
from serving.engine_process.health import leave


@serve.ingress()
class Replica:
    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, *, access: AccessRules, coordinator: DeploymentHandle, deployment: str
    ) -> None:
        """Returns when the model answers: Ray Serve sends requests from then on. `deployment` tells the coordinator
        apart from that of an endpoint that this one replaces."""
        began_s = time.monotonic()
        self._config = config
        self._access = CurrentAccess(access, user_file=config.api_key_file, admin_file=config.admin_key_file)
        await asyncio.to_thread(self._access.reload)  # the keys of `access` are as old as the deployment
        self._id = serve.get_replica_context().replica_id.unique_id
        self._follower = Follower(config, coordinator, deployment=deployment, replica=self._id, on_live_death=leave)
        await self._follower.start()
        self._start_s = time.monotonic() - began_s

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve after the constructor."""
        versions, engine = self._follower.versions, self._config.engine
        metrics = ReplicaMetrics(
            versions=versions,
            model_name=versions.delivery.model_name,
            replica=self._id,
            start_s=self._start_s,
        )
        metrics.exported.of("raymill:coordinator_away_seconds").set_function(lambda: self._follower.away_s)
        self._publishing = asyncio.create_task(self._publish(metrics.exported))
        self._reloading = asyncio.create_task(self._access.keep())
        return build_http_app(
            versions=versions,
            metrics=metrics,
            limits=AdmissionLimits(
                max_requests=self._config.replicas.max_ongoing_requests,
                max_sequences=engine.max_num_seqs + engine.max_waiting,
                max_queue_s=engine.max_queue_s,
            ),
            access=self._access,
            admin=admin_router(self._follower),
        )

    async def _publish(self, metrics: Metrics) -> None:
        """In this loop, as the versions that it asks change in it."""
        application = serve.get_replica_context().app_name
        while True:
            await asyncio.sleep(PUBLISH_INTERVAL_S)
            metrics.publish(application=application)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray Serve each second, for `ScalingPolicy`."""
        versions = self._follower.versions
        in_use = max(versions.kv_cache_usage, versions.num_running / self._config.engine.max_num_seqs)
        return {WAITING: versions.num_waiting, KV_USE: in_use}

    async def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        self._follower.check_health()

    async def __del__(self) -> None:
        await self._follower.close()
