"""One version on one replica: its model, its text reader, its engine process or its turn in another
version's, and what it has done."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from cluster.settings.serve import ServeConfig
from cluster.storage.bases import find_base
from cluster.storage.registry import resolve_checkpoint
from model.files.hf_config import require_own_shape
from model.signing.signature import statement_in
from raymill.errors import UserError
from serving.delivery.promotion import Version
from serving.delivery.version_stats import VersionStats
from serving.engine.messages import FinishReason
from serving.engine_process.client import EngineClient
from serving.engine_process.health import HealthCheck
from serving.protocol.served_model import ServedModel, is_of_one_kind, read_served_model
from serving.text.grammar_check import GrammarCheck
from serving.text.reader import TextReader, open_reader

DRAIN_POLL_S = 0.1
LONGEST_REQUEST_S = 600.0  # after this an unneeded engine ends, whatever still runs on it


class Closing(Protocol):
    """A part that can be closed, at any time and again."""

    def close(self) -> None: ...


Kept = TypeVar("Kept", bound=Closing)


class LoadedVersion:
    """A version that can serve. `open_requests` counts the requests that may still use its
    engine."""

    def __init__(
        self,
        folder: Path,
        *,
        model: ServedModel,
        texts: TextReader,
        engine: EngineClient,
        weights: int = 0,
    ) -> None:
        self.folder = folder
        self.checkpoint = str(folder)
        self.model = model
        self.texts = texts
        self.engine = engine
        # For sequences to name; 0 if the engine was started with this version
        self.weights = weights
        self.grammars = GrammarCheck(folder, python=engine.python)
        self.health = HealthCheck(engine, prompt_ids=[0, 0, 0], weights=weights)
        self._beside: dict[type[Closing], Closing] = {}
        self.open_requests = 0
        self.stats = VersionStats()

    @classmethod
    async def load(
        cls,
        version: Version,
        *,
        name: str,
        config: ServeConfig,
        others: Sequence["LoadedVersion"] = (),
    ) -> "LoadedVersion":
        """Returns once the version can be tested. It shares the engine of one of the `others` if
        the settings say so and it is of the same kind. Raises `UserError` for an unusable
        checkpoint."""
        folder = await asyncio.to_thread(
            resolve_checkpoint,
            version.checkpoint,
            config.storage.uri,
            signed_by=config.storage.signer,
        )
        texts = await open_reader(folder)  # first: it bounds what a stranger's tokenizer does
        try:
            loaded = await cls._load(
                folder, texts, version, name=name, config=config, others=others
            )
        except BaseException:
            texts.close()
            raise
        loaded.checkpoint = version.checkpoint
        return loaded

    @classmethod
    async def _load(
        cls,
        folder: Path,
        texts: TextReader,
        version: Version,
        *,
        name: str,
        config: ServeConfig,
        others: Sequence["LoadedVersion"],
    ) -> "LoadedVersion":
        model = await asyncio.to_thread(
            read_served_model, folder, name=name, max_context=config.engine.max_context
        )
        if model.version != version.version:
            raise UserError(
                f"{version.checkpoint} holds {model.version} now, but {version.version} was promoted"
            )
        if config.storage.signed_by is not None:  # which `load` has checked
            model = replace(model, statement=await asyncio.to_thread(statement_in, folder))
        base = await asyncio.to_thread(find_base, folder, config.storage.uri)
        if base is not None:
            return await cls._adapter(
                folder, base, model=model, texts=texts, config=config, others=others
            )
        alive = [other for other in others if other.engine.alive]
        if any(other.engine.max_adapters for other in alive):
            raise UserError(
                f"{version.checkpoint} is a whole model, and adapters are served, whose base nothing replaces: promote "
                "an adapter of it, or serve the model as another endpoint"
            )
        if alive and config.engine.runs_vllm and config.delivery.weights != "beside":
            for other in alive:
                if is_of_one_kind(model, other.model):
                    weights = other.engine.share(folder)
                    return cls(
                        folder, model=model, texts=texts, engine=other.engine, weights=weights
                    )
            if config.delivery.weights == "in_place" or config.engine.device == "cuda":
                raise UserError(
                    f"{version.checkpoint} has another shape or precision than what is served, so its weights cannot "
                    "replace those in place, and a second engine may find no memory: serve it as another endpoint, or "
                    "set delivery.weights to beside if the memory is there"
                )
        engine = await _started(folder, model, config, has_adapters=bool(config.adapters))
        return cls(folder, model=model, texts=texts, engine=engine)

    @classmethod
    async def _adapter(
        cls,
        folder: Path,
        base: Path,
        *,
        model: ServedModel,
        texts: TextReader,
        config: ServeConfig,
        others: Sequence["LoadedVersion"],
    ) -> "LoadedVersion":
        """Returns an adapter on the engine that computes its base, which is started if there is no
        other. Raises `UserError`."""
        if not config.engine.runs_vllm:
            require_own_shape(folder)  # which says what to do
        if model.rank > config.engine.max_adapter_rank:
            raise UserError(
                f"{folder} has rank {model.rank}: set engine.max_adapter_rank to as much, it is "
                f"{config.engine.max_adapter_rank}"
            )
        alive = [other for other in others if other.engine.alive]
        if not alive:
            engine = await _started(base, model, config, has_adapters=True)
            weights = engine.share(folder)
            engine.num_users -= 1  # nobody asks for the base itself
            return cls(folder, model=model, texts=texts, engine=engine, weights=weights)
        for other in alive:
            if other.engine.max_adapters and other.model.base_hash == model.base_hash:
                weights = other.engine.share(folder)
                return cls(folder, model=model, texts=texts, engine=other.engine, weights=weights)
        is_other = all(other.model.base_hash != model.base_hash for other in alive)
        raise UserError(
            f"{folder} is an adapter of {model.base_hash}, and {alive[0].model.base_hash} is served: serve it as "
            "another endpoint"
            if is_other
            else f"{folder} is an adapter, and the endpoint was started without any: set engine.max_adapters"
        )

    async def loss(self, rows: Sequence[Sequence[int]], *, at_once: bool) -> float:
        """Returns the nats per token over the rows, NaN if the logits are not finite. The rows are
        read `at_once`, within one turn of an engine that is shared, or else one after the other, so
        that clients' tokens come in between."""
        requests = [
            self.engine.own_sequence(list(row), max_tokens=0, weights=self.weights) for row in rows
        ]
        logprobs: list[float] = []
        async for event in self.engine.submit(requests, at_once=None if at_once else 1):
            if event.finish_reason is FinishReason.ERROR:
                return math.nan
            logprobs += [
                token.logprob for token in event.prompt_logprobs or [] if token is not None
            ]
        return -sum(logprobs) / len(logprobs)

    def beside(self, kind: type[Kept], make: Callable[[], Kept]) -> Kept:
        """Returns what a route keeps beside this version: one of a kind, made when it is first
        asked for and closed with the version."""
        if kind not in self._beside:
            self._beside[kind] = make()
        kept = self._beside[kind]
        assert isinstance(kept, kind)
        return kept

    async def retire(self) -> None:
        """Ends the engine, or its share of it, once no request uses it."""
        deadline_s = time.monotonic() + LONGEST_REQUEST_S
        while self.open_requests and time.monotonic() < deadline_s:
            await asyncio.sleep(DRAIN_POLL_S)
        await self.close()

    async def close(self) -> None:
        for kept in self._beside.values():
            kept.close()
        self.texts.close()
        self.grammars.close()
        await self.engine.close()


async def _started(
    folder: Path, model: ServedModel, config: ServeConfig, *, has_adapters: bool
) -> EngineClient:
    """Returns an engine with the weights in a folder, and with room for adapters if it has any to
    compute."""
    most = config.num_adapter_places if has_adapters else config.engine.max_adapters or 0
    settings = config.engine.model_copy(update={"max_adapters": most})
    threads = config.replicas.threads_per_replica
    return await EngineClient.start(folder, config=settings, eos_id=model.eos_id, threads=threads)
