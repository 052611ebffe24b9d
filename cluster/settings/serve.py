"""The typed settings of the endpoint: `ServeConfig`, of the same kind as the trees in run.py."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.settings.run import ClusterConfig, Settings, StorageConfig


class ReplicaConfig(Settings):
    """The number of replicas, and what each may use."""

    min_replicas: int = Field(default=1, ge=0, description="replicas kept when idle; 0 scales to zero")
    max_replicas: int = Field(default=1, ge=1, description="replicas under load")
    target_ongoing_requests: float = Field(
        default=8.0, gt=0, description="requests per replica that autoscaling aims at"
    )
    max_ongoing_requests: int = Field(
        default=64, ge=1, description="completions a replica takes on at once; more get 429"
    )
    max_requests_per_key: int | None = Field(
        default=None, ge=1, description="POST requests of one API key in flight on a replica; more get 429"
    )
    scale_up_after_s: float = Field(default=2.0, ge=0, description="seconds of such load before replicas are added")
    scale_down_after_s: float = Field(
        default=180.0, ge=0, description="seconds of lower load before replicas are drained"
    )
    scale_to_zero_after_s: float = Field(
        default=300.0, ge=0, description="seconds without a request before the last replica ends, if min_replicas is 0"
    )
    borrow_from: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="id of a training run in the same storage, whose workers are borrowed while replicas find no room; "
        "one worker must make room for one replica",
    )
    threads_per_replica: int = Field(default=1, ge=1, description="compute threads, and logical CPUs, of a replica")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}")
        return self


class EngineConfig(Settings):
    """The engine of one replica."""

    max_num_seqs: int = Field(default=16, ge=1, description="sequences decoded together")
    max_waiting: int = Field(default=128, ge=0, description="sequences that may wait for a slot; more get 429")
    max_queue_s: float = Field(
        default=30.0,
        gt=0,
        description="longest wait until a request is started, seconds; one that waits, or would wait, longer gets 429",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        default="auto",
        description="precision of weights and KV cache; int8 needs the native kernels and has a bfloat16 cache; auto: "
        "bfloat16 if the run computed in it and this processor does so at speed, otherwise float32",
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="cuda: one GPU for each replica")
    backend: Literal["raymill", "vllm"] = Field(
        default="raymill", description="vllm: the same checkpoint and API, computed by vLLM; see engine.vllm_python"
    )
    vllm_python: str | None = Field(
        default=None,
        description="Python of an environment with vLLM, which needs its own torch; raymill's when unset",
    )
    kernels: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="native: compiled for this CPU at first use, by g++ or $CXX; torch: PyTorch's own; auto: native if "
        "available, and torch on a GPU",
    )
    kv_cache_tokens: int | None = Field(
        default=None, ge=16, description="tokens that fit into the KV cache; max_num_seqs whole contexts when unset"
    )
    prefix_cache: bool = Field(
        default=True, description="read the common start of prompts only once while the cache holds it"
    )
    prefill_tokens_per_step: int = Field(
        default=96, ge=1, description="prompt tokens that a step reads while the running sequences wait"
    )

    @property
    def max_sequences(self) -> int:
        """The number of sequences that a replica takes on, running and waiting; each prompt and each choice is one."""
        return self.max_num_seqs + self.max_waiting


class HttpConfig(Settings):
    """The limits on a client's use of the endpoint's HTTP server."""

    header_timeout_s: float = Field(default=10.0, gt=0, description="longest time for a request's headers, seconds")
    body_timeout_s: float = Field(default=15.0, gt=0, description="longest time for a request's body, seconds")
    write_timeout_s: float = Field(
        default=30.0, gt=0, description="longest time for a client that does not read, seconds"
    )
    request_timeout_s: float = Field(
        default=600.0, gt=0, description="the most that x-request-timeout-seconds may ask for, seconds"
    )
    max_connections: int = Field(
        default=1000, ge=1, description="connections to a proxy; beyond it the longest idle one is closed"
    )


class DeliveryConfig(Settings):
    """The rules by which a promoted checkpoint is judged, unless `raymill promote` says otherwise."""

    endpoint: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="name of this endpoint's state under endpoints/ in the storage, unique in that storage; host and "
        "port when unset",
    )
    watch_s: float = Field(
        default=60.0, ge=0, description="how long a new version is watched and may be rolled back, seconds"
    )
    max_loss_increase: float = Field(
        default=0.05,
        ge=0,
        description="largest increase over the live version's loss on the gate's text, nats per token",
    )
    max_error_rate: float = Field(
        default=0.01, ge=0, le=1, description="largest share of a new version's sequences that may fail"
    )
    max_latency_ratio: float | None = Field(
        default=3.0,
        gt=0,
        description="largest ratio of a new version's time for a token to that before it; not judged when unset",
    )


class ServeConfig(Settings):
    """Everything that the endpoint needs, except the model's shape, which comes from the checkpoint."""

    checkpoint: str = Field(
        default="latest", description="path or URI of a checkpoint folder, or `latest`: the newest published one"
    )
    model_name: str | None = Field(
        default=None, description="id under /v1/models, whatever is promoted; the live checkpoint's run id when unset"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; any but loopback needs an API key")
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port to listen on")
    api_key_file: str | None = Field(
        default=None,
        description="file with one API key on each line; created with a new key (0600) if missing, reread on changes",
    )
    admin_key_file: str | None = Field(
        default=None, description="file like api_key_file with keys for /admin; there is no /admin when unset"
    )
    http: HttpConfig = HttpConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig(num_nodes=2)
    storage: StorageConfig = StorageConfig()
