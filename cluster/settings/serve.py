"""The typed settings of the endpoint: `ServeConfig`, of the same kind as the trees in run.py."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.functional_validators import BeforeValidator, model_validator

from cluster.settings.run import ClusterConfig, Settings, StorageConfig
from model.tables import read_table

CPU_NUM_SEQS, CPU_PREFILL_TOKENS = 16, 96  # of settings that are unset; on a GPU vLLM has its own

NOT_VLLM_ARGS: dict[str, str] = read_table(__file__, "not_vllm_args")
"""vLLM's arguments that follow from other settings, and what to do instead."""


def _from_json(value: Any) -> Any:
    """Reads what a flag gives: a list of one text, or of several if the shell has split it."""
    if not isinstance(value, list):
        return value
    try:
        return json.loads(" ".join(value))
    except ValueError as error:
        raise ValueError(f"expected one JSON object, such as '{{\"enforce_eager\": true}}': {error}") from None


VllmArgs = Annotated[dict[str, Any], BeforeValidator(_from_json)]


class ReplicaConfig(Settings):
    """The number of replicas, and what each may use."""

    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat | None = None
    max_ongoing_requests: PositiveInt | None = None
    max_requests_per_key: PositiveInt | None = None
    scale_up_after_s: NonNegativeFloat = 2.0
    scale_down_after_s: NonNegativeFloat = 180.0
    scale_to_zero_after_s: NonNegativeFloat = 300.0
    threads_per_replica: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}")
        return self


class EngineConfig(Settings):
    """The engine of one replica."""

    max_num_seqs: PositiveInt | None = None
    max_waiting: NonNegativeInt | None = None
    max_queue_s: PositiveFloat = 30.0
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    backend: Literal["auto", "raymill", "vllm"] = "auto"
    vllm_python: str | None = None
    vllm_args: VllmArgs = Field(default={})
    tensor_parallel_size: PositiveInt = 1
    batch_invariant: bool = False
    kernels: Literal["auto", "native", "torch"] = "auto"
    max_context: int | None = Field(default=None, ge=16)
    clip_max_tokens: bool = False
    kv_cache_tokens: int | None = Field(default=None, ge=16)
    prefix_cache: bool = True
    prefix_cache_scope: Literal["endpoint", "key"] = "endpoint"
    prefill_tokens_per_step: PositiveInt | None = None

    @property
    def runs_vllm(self) -> bool:
        return self.backend == "vllm" or (self.backend == "auto" and self.device == "cuda")

    @property
    def waiting_room(self) -> int:
        """The number of sequences that may wait."""
        return self.max_waiting if self.max_waiting is not None else 1024 if self.device == "cuda" else 128

    @model_validator(mode="after")
    def _what_the_engine_has(self) -> Self:
        if self.backend == "raymill" and self.device == "cuda":
            raise ValueError("backend=raymill computes on CPUs; with device=cuda expected backend auto or vllm")
        if not self.runs_vllm and (self.vllm_args or self.tensor_parallel_size > 1):
            raise ValueError("vllm_args and tensor_parallel_size are vLLM's; expected backend=vllm or device=cuda")
        if self.runs_vllm and self.kernels != "auto":
            raise ValueError(f"kernels={self.kernels} is of raymill's own engine, and vLLM has others; leave it out")
        if self.batch_invariant and self.device == "cpu":
            raise ValueError(
                "batch_invariant needs device=cuda; on CPUs a sequence has the same bits in any batch by raymill's own "
                "kernels (backend=raymill), and never by vLLM"
            )
        for name in self.vllm_args.keys() & NOT_VLLM_ARGS.keys():
            raise ValueError(f"vllm_args cannot have {name}: {NOT_VLLM_ARGS[name]}")
        return self


class HttpConfig(Settings):
    """The limits on a client's use of the endpoint's HTTP server."""

    header_timeout_s: PositiveFloat = 10.0
    body_timeout_s: PositiveFloat = 15.0
    write_timeout_s: PositiveFloat = 30.0
    request_log: str | None = None
    max_connections: PositiveInt = 1000
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s*]+)$")]] = Field(default=[])


class DeliveryConfig(Settings):
    """The rules by which a promoted checkpoint is judged, unless `raymill promote` says otherwise."""

    endpoint: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+$")
    weights: Literal["auto", "beside", "in_place"] = "auto"
    allowed_checkpoints: list[str] = Field(default=[])
    watch_s: NonNegativeFloat = 60.0
    max_loss_increase: NonNegativeFloat = 0.05
    max_error_rate: float = Field(default=0.01, ge=0, le=1)
    max_latency_ratio: PositiveFloat | None = 3.0


class ServeConfig(Settings):
    """Everything that the endpoint needs, except the model's shape, which comes from the checkpoint."""

    checkpoint: str = "latest"
    model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_key_file: str | None = None
    admin_key_file: str | None = None
    xray: Literal["auto", "off", "admin", "user"] = "auto"
    log_format: Literal["text", "json"] | None = None
    http: HttpConfig = HttpConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig(num_nodes=2)
    storage: StorageConfig = StorageConfig()

    @property
    def max_ongoing_requests(self) -> int:
        """The number of requests that a replica takes on."""
        return self.replicas.max_ongoing_requests or (1024 if self.engine.device == "cuda" else 64)

    @property
    def target_ongoing_requests(self) -> float:
        """The number of requests per replica that autoscaling aims at."""
        return self.replicas.target_ongoing_requests or (128 if self.engine.device == "cuda" else 8)

    @model_validator(mode="after")
    def _in_place(self) -> Self:
        if self.delivery.weights == "in_place" and not self.engine.runs_vllm:
            raise ValueError(
                "delivery.weights=in_place needs vLLM; expected auto or beside with raymill's engine, whose weights "
                "cannot be replaced"
            )
        return self
