"""One replica of the endpoint: HTTP ingress, tokenizer and the front of an engine process, in one Ray Serve deployment.

There is no handle between them, as each streamed token would pay 0.6 ms for it. Annotations are real objects here
(no `from __future__ import annotations`): Ray Serve reads them.
"""

from ray import serve
from starlette.types import ASGIApp

from cluster.config import ServeConfig
from cluster.registry import resolve_checkpoint
from model.sampling import SamplingParams
from serving.completions import AdmissionLimits
from serving.engine_client import EngineClient, EngineDiedError
from serving.ingress import build_http_app
from serving.messages import FinishReason, SequenceRequest
from serving.metrics import ReplicaMetrics
from serving.served_model import read_served_model


@serve.ingress()
class Replica:
    async def __init__(self, config: ServeConfig, *, key_hashes: tuple[str, ...]) -> None:  # type: ignore[misc]
        """Returns when the model answers: Ray Serve sends requests from then on."""
        folder = resolve_checkpoint(config.checkpoint, storage_uri=config.storage.uri)
        self._config = config
        self._key_hashes = key_hashes
        self._model = read_served_model(folder, name=config.model_name)
        self._engine = await EngineClient.start(
            folder,
            dtype=config.engine.dtype,
            num_slots=config.engine.max_num_seqs,
            eos_id=self._model.eos_id,
            threads=config.replicas.threads_per_replica,
        )
        await self._self_test()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve after the constructor."""
        engine, model = self._config.engine, self._model
        replica_id = serve.get_replica_context().replica_id.unique_id
        return build_http_app(
            model=model,
            engine=self._engine,
            metrics=ReplicaMetrics(
                engine=self._engine, num_slots=engine.max_num_seqs, model_name=model.name, replica=replica_id
            ),
            limits=AdmissionLimits(
                max_requests=self._config.replicas.max_ongoing_requests,
                max_sequences=engine.max_num_seqs + engine.max_waiting,
            ),
            key_hashes=self._key_hashes,
        )

    def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        if not self._engine.alive:
            raise EngineDiedError(self._engine.death_notice)

    async def __del__(self) -> None:
        await self._engine.close()

    async def _self_test(self) -> None:
        """One greedy token: weights that load but give no finite logits are never served."""
        request = SequenceRequest(
            seq_id=self._engine.next_seq_id(), prompt_ids=[0], max_tokens=1, sampling=SamplingParams(temperature=0.0)
        )
        async for event in self._engine.submit([request]):
            if event.finish_reason is FinishReason.ERROR:
                raise EngineDiedError(
                    f"the model {self._model.name} fails its self-test: its logits are not finite numbers"
                )
