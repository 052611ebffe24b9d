"""The typed settings of the endpoint: `ServeConfig`, of the same kind as the trees in run.py."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.settings.run import ClusterConfig, Settings, StorageConfig, setting


class ReplicaConfig(Settings):
    """The number of replicas, and what each may use."""

    min_replicas: NonNegativeInt = setting(1, "replicas kept when idle; 0 scales to zero")
    max_replicas: PositiveInt = setting(1, "replicas under load")
    target_ongoing_requests: PositiveFloat = setting(8.0, "requests per replica that autoscaling aims at")
    max_ongoing_requests: PositiveInt = setting(64, "completions a replica takes on at once; more get 429")
    max_requests_per_key: PositiveInt | None = setting(
        None, "POST requests of one API key in flight on a replica; more get 429"
    )
    scale_up_after_s: NonNegativeFloat = setting(2.0, "seconds of such load before replicas are added")
    scale_down_after_s: NonNegativeFloat = setting(180.0, "seconds of lower load before replicas are drained")
    scale_to_zero_after_s: NonNegativeFloat = setting(
        300.0, "seconds without a request before the last replica ends, if min_replicas is 0"
    )
    borrow_from: str | None = setting(
        None,
        "id of a training run in the same storage, whose workers are borrowed while replicas find no room; "
        "one worker must make room for one replica",
        pattern=r"^[A-Za-z0-9._-]+$",
    )
    threads_per_replica: PositiveInt = setting(1, "compute threads, and logical CPUs, of a replica")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}")
        return self


class EngineConfig(Settings):
    """The engine of one replica."""

    max_num_seqs: PositiveInt = setting(16, "sequences decoded together")
    max_waiting: NonNegativeInt = setting(128, "sequences that may wait for a slot; more get 429")
    max_queue_s: PositiveFloat = setting(
        30.0, "longest wait until a request is started, seconds; one that waits, or would wait, longer gets 429"
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = setting(
        "auto",
        "precision of weights and KV cache; int8 needs the native kernels and has a bfloat16 cache; auto: "
        "bfloat16 if the run computed in it and this processor does so at speed, otherwise float32",
    )
    device: Literal["cpu", "cuda"] = setting("cpu", "cuda: one GPU for each replica")
    backend: Literal["raymill", "vllm"] = setting(
        "raymill", "vllm: the same checkpoint and API, computed by vLLM; see engine.vllm_python"
    )
    vllm_python: str | None = setting(None, "Python of vLLM's own environment, with its torch; raymill's when unset")
    kernels: Literal["auto", "native", "torch"] = setting(
        "auto",
        "native: compiled for this CPU at first use, by g++ or $CXX; torch: PyTorch's own; auto: native if "
        "available, and torch on a GPU",
    )
    kv_cache_tokens: int | None = setting(None, "tokens in the KV cache; max_num_seqs whole contexts when unset", ge=16)
    prefix_cache: bool = setting(True, "read the common start of prompts only once while the cache holds it")
    prefill_tokens_per_step: PositiveInt = setting(96, "prompt tokens that a step reads while running sequences wait")

    @property
    def max_sequences(self) -> int:
        """The number of sequences that a replica takes on, running and waiting; each prompt and each choice is one."""
        return self.max_num_seqs + self.max_waiting


class HttpConfig(Settings):
    """The limits on a client's use of the endpoint's HTTP server."""

    header_timeout_s: PositiveFloat = setting(10.0, "longest time for a request's headers, seconds")
    body_timeout_s: PositiveFloat = setting(15.0, "longest time for a request's body, seconds")
    write_timeout_s: PositiveFloat = setting(30.0, "longest time for a client that does not read, seconds")
    request_timeout_s: PositiveFloat = setting(600.0, "the most that x-request-timeout-seconds may ask for, seconds")
    max_connections: PositiveInt = setting(1000, "connections to a proxy; beyond it the longest idle one is closed")


class DeliveryConfig(Settings):
    """The rules by which a promoted checkpoint is judged, unless `raymill promote` says otherwise."""

    endpoint: str | None = setting(
        None,
        "name of this endpoint's state under endpoints/ in the storage, unique in that storage; host and "
        "port when unset",
        pattern=r"^[A-Za-z0-9._-]+$",
    )
    watch_s: NonNegativeFloat = setting(60.0, "how long a new version is watched and may be rolled back, seconds")
    max_loss_increase: NonNegativeFloat = setting(
        0.05, "largest increase over the live version's loss on the gate's text, nats per token"
    )
    max_error_rate: float = setting(0.01, "largest share of a new version's sequences that may fail", ge=0, le=1)
    max_latency_ratio: PositiveFloat | None = setting(
        3.0, "largest ratio of a new version's time for a token to that before it; not judged when unset"
    )


class ServeConfig(Settings):
    """Everything that the endpoint needs, except the model's shape, which comes from the checkpoint."""

    checkpoint: str = setting("latest", "path or URI of a checkpoint folder, or `latest`: the newest published one")
    model_name: str | None = setting(None, "id in /v1/models, whatever is promoted; the live run's id when unset")
    host: str = setting("127.0.0.1", "address to listen on; any but loopback needs an API key")
    port: int = setting(8000, "TCP port to listen on", ge=1, le=65535)
    api_key_file: str | None = setting(
        None, "file with one API key on each line; created with a new key (0600) if missing, reread on changes"
    )
    admin_key_file: str | None = setting(None, "file like api_key_file with /admin's keys; no /admin when unset")
    http: HttpConfig = HttpConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig(num_nodes=2)
    storage: StorageConfig = StorageConfig()
