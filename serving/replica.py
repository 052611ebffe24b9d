"""One replica of the endpoint: HTTP ingress, tokenizer and the front of an engine process, in one Ray Serve deployment.

There is no handle between them, as each streamed token would pay 0.6 ms for it. Annotations are real objects here
(no `from __future__ import annotations`): Ray Serve reads them.
"""

from ray import serve
from starlette.types import ASGIApp

from cluster.registry import resolve_checkpoint
from cluster.serve_config import ServeConfig
from serving.access import AccessRules
from serving.completions import AdmissionLimits
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

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve after the constructor."""
        engine, model = self._config.engine, self._model
        replica_id = serve.get_replica_context().replica_id.unique_id
        return build_http_app(
            model=model,
            engine=self._engine,
            metrics=ReplicaMetrics(engine=self._engine, model_name=model.name, replica=replica_id),
            limits=AdmissionLimits(
                max_requests=self._config.replicas.max_ongoing_requests,
                max_sequences=engine.max_num_seqs + engine.max_waiting,
            ),
            access=self._access,
            xray=self._xray,
        )

    async def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        self._health.check()

    async def __del__(self) -> None:
        self._xray.close()
        await self._engine.close()
