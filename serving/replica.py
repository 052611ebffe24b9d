"""One replica of the endpoint: HTTP ingress, tokenizer and the front of an engine process, in one Ray Serve deployment.

There is no handle between them, as each streamed token would pay 0.6 ms for it. Annotations are real objects here
(no `from __future__ import annotations`): Ray Serve reads them.
"""

import time

from ray import serve
from starlette.types import ASGIApp

from cluster.registry import resolve_checkpoint
from cluster.serve_config import ServeConfig
from serving.access import AccessRules
from serving.admission import AdmissionLimits
from serving.autoscaling import KV_USE, WAITING
from serving.engine_client import EngineClient
from serving.health import HealthCheck, leave
from serving.ingress import build_http_app
from serving.metrics import ReplicaMetrics
from serving.served_model import read_served_model
from serving.xray import Xray


@serve.ingress()
class Replica:
    async def __init__(self, config: ServeConfig, *, access: AccessRules) -> None:  # type: ignore[misc]
        """Returns when the model answers: Ray Serve sends requests from then on."""
        began_s = time.monotonic()
        folder = resolve_checkpoint(config.checkpoint, storage_uri=config.storage.uri)
        self._config = config
        self._access = access
        self._model = read_served_model(folder, name=config.model_name)
        self._engine = await EngineClient.start(
            folder,
            config=config.engine,
            eos_id=self._model.eos_id,
            threads=config.replicas.threads_per_replica,
        )
        self._xray = Xray(folder, name=config.model_name, dtype=config.engine.dtype)
        self._health = HealthCheck(self._engine, prompt_ids=[0])
        await self._health.self_test()
        self._engine.on_death = leave
        self._start_s = time.monotonic() - began_s

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve after the constructor."""
        engine, model = self._config.engine, self._model
        replica_id = serve.get_replica_context().replica_id.unique_id
        return build_http_app(
            model=model,
            engine=self._engine,
            metrics=ReplicaMetrics(
                engine=self._engine,
                num_slots=engine.max_num_seqs,
                model_name=model.name,
                replica=replica_id,
                start_s=self._start_s,
            ),
            limits=AdmissionLimits(
                max_requests=self._config.replicas.max_ongoing_requests,
                max_sequences=engine.max_num_seqs + engine.max_waiting,
                max_queue_s=engine.max_queue_s,
            ),
            access=self._access,
            xray=self._xray,
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray Serve each second, for `ScalingPolicy`."""
        engine = self._engine
        in_use = max(engine.kv_cache_usage, engine.num_running / self._config.engine.max_num_seqs)
        return {WAITING: engine.num_waiting, KV_USE: in_use}

    async def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        self._health.check()

    async def __del__(self) -> None:
        self._xray.close()
        await self._engine.close()
