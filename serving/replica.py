"""One replica of the endpoint: HTTP ingress, tokenizer and the front of engine processes, in one
deployment.

There is no handle between them, which would cost each streamed token 0.6 ms. Annotations are real
objects here (no `from __future__ import annotations`), because Ray Serve reads them.
"""

import asyncio
import time

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.metrics.metric_export import PUBLISH_INTERVAL_S
from cluster.settings.serve import ServeConfig
from cluster.wings import added
from serving.api.access import AccessRules, CurrentAccess
from serving.api.admin_routes import add_admin_routes
from serving.api.ingress import build_http_app
from serving.api.metrics import ReplicaMetrics
from serving.delivery.autoscaling import KV_USE, WAITING
from serving.delivery.follower import Follower
from serving.engine_process.health import leave
from serving.protocol.json_log import Process, log_in
from serving.responses.routes import add_response_routes


@serve.ingress()
class Replica:
    async def __init__(  # type: ignore[misc]
        self,
        config: ServeConfig,
        *,
        access: AccessRules,
        coordinator: DeploymentHandle,
        deployment: str,
    ) -> None:
        """Returns when the model answers; from then on Ray Serve sends requests. `deployment`
        distinguishes the coordinator from that of an endpoint that this one replaces."""
        began_s = time.monotonic()
        self._id = serve.get_replica_context().replica_id.unique_id
        log_in(config.log_format, Process.REPLICA, replica=self._id)
        self._config = config
        self._access = CurrentAccess(
            access, user_file=config.api_key_file, admin_file=config.admin_key_file
        )
        # The keys in `access` are as old as the deployment
        await asyncio.to_thread(self._access.reload)
        self._follower = Follower(
            config, coordinator, deployment=deployment, replica=self._id, on_live_death=leave
        )
        await self._follower.start()
        self._start_s = time.monotonic() - began_s

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the application; Ray Serve calls this after the constructor."""
        versions = self._follower.versions
        metrics = ReplicaMetrics(versions=versions, replica=self._id, start_s=self._start_s)
        metrics.exported.of("raymill:coordinator_away_seconds").set_function(
            lambda: self._follower.away_s
        )
        metrics.exported.of("raymill:state_stored").set_function(lambda: self._follower.is_stored)
        self._publishing = asyncio.create_task(self._publish(metrics))
        self._reloading = asyncio.create_task(self._access.keep())
        return build_http_app(
            versions=versions,
            metrics=metrics,
            access=self._access,
            usage=self._follower.usage,
            others=(self._add_admin_routes, add_response_routes, *added(lambda wing: wing.routes)),
        )

    def _add_admin_routes(self, app: FastAPI, *_: object) -> None:
        add_admin_routes(app, self._follower)

    async def _publish(self, metrics: ReplicaMetrics) -> None:
        """Publishes the metrics in this event loop, in which the versions change."""
        application = serve.get_replica_context().app_name
        while True:
            metrics.by_key.keep(self._access.rules.names)
            await asyncio.sleep(PUBLISH_INTERVAL_S)
            metrics.publish(application=application)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns figures for `ScalingPolicy`; Ray Serve calls this each second."""
        versions = self._follower.versions
        num_slots = versions.live.engine.facts.max_num_seqs
        in_use = max(versions.kv_cache_usage, versions.num_running / num_slots)
        return {WAITING: versions.num_waiting / num_slots, KV_USE: in_use}

    async def check_health(self) -> None:
        """Raises if Ray Serve has to replace this replica. The coordinator plays no part in that: a
        fault of its own would end all replicas in the same second."""
        self._follower.versions.check_health()

    async def __del__(self) -> None:
        await self._follower.close()
