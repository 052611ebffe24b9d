"""The typed settings of the endpoint: `ServeConfig`, of the same kind as the trees in run.py."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.functional_validators import BeforeValidator, model_validator

from cluster.settings.run import ClusterConfig, StorageConfig
from cluster.settings.setting import Settings, setting
from model.tables import read_table

CPU_NUM_SEQS, CPU_PREFILL_TOKENS = 16, 256  # of settings that are unset; on a GPU vLLM has its own

NOT_VLLM_ARGS: dict[str, str] = read_table(__file__, "not_vllm_args")
"""vLLM's arguments that follow from other settings, and what to do instead."""


def _from_json(value: Any) -> Any:
    """Reads what a flag gives: a list of one text, or of several if the shell has split it."""
    if not isinstance(value, list):
        return value
    try:
        return json.loads(" ".join(value))
    except ValueError as error:
        raise ValueError(
            f"expected one JSON object, such as '{{\"enforce_eager\": true}}': {error}"
        ) from None


VllmArgs = Annotated[dict[str, Any], BeforeValidator(_from_json)]


class ReplicaConfig(Settings):
    """The number of replicas, and what each may use."""

    min_replicas: NonNegativeInt = setting(1, "replicas kept when idle; 0 scales to zero")
    max_replicas: PositiveInt = setting(1, "replicas under load")
    target_ongoing_requests: PositiveFloat | None = setting(
        None,
        "requests per replica that autoscaling aims at; 8 when unset, 128 on a GPU",
    )
    max_ongoing_requests: PositiveInt | None = setting(
        None,
        "completions a replica takes on at once; more get 429; 64 when unset, 1024 on a GPU",
    )
    max_requests_per_key: PositiveInt | None = setting(
        None,
        "requests of one API key in flight on all replicas together; more get 429",
    )
    scale_up_after_s: NonNegativeFloat = setting(
        2.0, "seconds of higher load before replicas are added"
    )
    scale_down_after_s: NonNegativeFloat = setting(
        180.0, "seconds of lower load before replicas are drained"
    )
    scale_to_zero_after_s: NonNegativeFloat = setting(
        300.0,
        "seconds without a request before the last replica ends, if min_replicas is 0",
    )
    threads_per_replica: PositiveInt = setting(1, "compute threads, and logical CPUs, of a replica")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas} exceeds max_replicas={self.max_replicas}"
            )
        return self


class EngineConfig(Settings):
    """The engine of one replica."""

    max_num_seqs: PositiveInt | None = setting(
        None,
        "sequences decoded together; 16 when unset, on a GPU vLLM's own number",
    )
    max_waiting: NonNegativeInt | None = setting(
        None,
        "sequences that may wait for a slot; more get 429; 128 when unset, 1024 on a GPU",
    )
    max_queue_s: PositiveFloat = setting(
        30.0,
        "longest wait until a request is started, seconds; one that waits, or would wait, longer gets 429",
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = setting(
        "auto",
        "precision of weights and KV cache; int8 needs the native kernels and has a bfloat16 cache; auto: "
        "bfloat16 if the run computed in it and this processor does so at speed, and on any GPU that "
        "does; otherwise float32",
    )
    device: Literal["cpu", "cuda"] = setting(
        "cpu", "cuda: as many GPUs for each replica as tensor_parallel_size says"
    )
    backend: Literal["auto", "raymill", "vllm"] = setting(
        "auto",
        "raymill: its own engine, on CPUs only; vllm: the same checkpoint and API, computed by vLLM; "
        "auto: vllm on a GPU, raymill on CPUs",
    )
    vllm_python: str | None = setting(
        None,
        "Python of vLLM's own environment, with its torch; $RAYMILL_VLLM_PYTHON or raymill's when unset",
    )
    vllm_args: VllmArgs = setting(
        {},
        "further arguments of vLLM's engine, by their names in its EngineArgs; as a flag one JSON object",
    )
    tensor_parallel_size: PositiveInt = setting(1, "GPUs of one pod that share the model, by vLLM")
    max_adapters: NonNegativeInt | None = setting(
        None,
        "adapters that vLLM computes at a time beside their base; during a promotion both versions of an adapter "
        "count. When unset: 0 for an endpoint without adapters, else 8, or 2 more than are named if that is more",
    )
    max_adapter_rank: int = setting(
        64, "largest rank of these adapters; a larger one takes more memory", ge=1, le=512
    )
    batch_invariant: bool = setting(
        False,
        "have vLLM compute the same bits for a sequence whatever shares its steps, on GPUs that can; slower",
    )
    kernels: Literal["auto", "native", "torch"] = setting(
        "auto",
        "native: compiled for this CPU at first use, by g++ or $CXX; torch: PyTorch's own; auto: native if available",
    )
    max_context: int | None = setting(
        None,
        "tokens of a prompt and its answer together that are served at most; the model's whole context when unset",
        ge=16,
    )
    clip_max_tokens: bool = setting(
        False,
        "answer a request whose max_tokens does not fit after its prompt with as many as do, instead of "
        "400: for clients that send large ones by default",
    )
    kv_cache_tokens: int | None = setting(
        None,
        "tokens in the KV cache; when unset max_num_seqs whole contexts, or what 40% of the free memory "
        "holds; on a GPU all that fits",
        ge=16,
    )
    prefix_cache: bool = setting(
        True, "read the common start of prompts only once while the cache holds it"
    )
    prefix_cache_scope: Literal["endpoint", "key"] = setting(
        "endpoint",
        "endpoint: prompts of all keys share it, so that a key can tell by the time whether another one "
        "has sent a prompt; key: only those of one key's name do",
    )
    prefill_tokens_per_step: PositiveInt | None = setting(
        None,
        "prompt tokens that a step reads while running sequences wait; 256 when unset, on a GPU vLLM's own number",
    )

    @property
    def runs_vllm(self) -> bool:
        return self.backend == "vllm" or (self.backend == "auto" and self.device == "cuda")

    @property
    def waiting_room(self) -> int:
        """The number of sequences that may wait."""
        return (
            self.max_waiting
            if self.max_waiting is not None
            else 1024
            if self.device == "cuda"
            else 128
        )

    @model_validator(mode="after")
    def _what_the_engine_has(self) -> Self:
        if self.backend == "raymill" and self.device == "cuda":
            raise ValueError(
                "backend=raymill computes on CPUs; with device=cuda expected backend auto or vllm"
            )
        if not self.runs_vllm and (self.vllm_args or self.tensor_parallel_size > 1):
            raise ValueError(
                "vllm_args and tensor_parallel_size are vLLM's; expected backend=vllm or device=cuda"
            )
        if self.runs_vllm and self.kernels != "auto":
            raise ValueError(
                f"kernels={self.kernels} is of raymill's own engine, and vLLM has others; leave it out"
            )
        if self.batch_invariant and self.device == "cpu":
            raise ValueError(
                "batch_invariant needs device=cuda; on CPUs a sequence has the same bits in any batch by raymill's own "
                "kernels (backend=raymill), and never by vLLM"
            )
        if self.max_adapters and not self.runs_vllm:
            raise ValueError(
                "max_adapters is vLLM's; expected backend=vllm or device=cuda, or adapters that `raymill export "
                "--merge` has made whole"
            )
        for name in self.vllm_args.keys() & NOT_VLLM_ARGS.keys():
            raise ValueError(f"vllm_args cannot have {name}: {NOT_VLLM_ARGS[name]}")
        return self


class HttpConfig(Settings):
    """The limits on a client's use of the endpoint's HTTP server."""

    header_timeout_s: PositiveFloat = setting(10.0, "longest time for a request's headers, seconds")
    body_timeout_s: PositiveFloat = setting(15.0, "longest time for a request's body, seconds")
    write_timeout_s: PositiveFloat = setting(
        30.0, "longest time for a client that does not read, seconds"
    )
    request_log: str | None = setting(
        None,
        "file for a line of JSON about each request, without text; - for standard output; none when unset",
    )
    max_connections: PositiveInt = setting(
        1000, "connections to a proxy; beyond it the longest idle one is closed"
    )
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s*]+)$")]] = setting(
        [],
        "origins whose pages may use the endpoint in a browser, such as https://app.example.com; * allows all",
    )


class DeliveryConfig(Settings):
    """The rules by which a promoted checkpoint is judged, unless `raymill promote` says
    otherwise."""

    endpoint: str | None = setting(
        None,
        "name of this endpoint's state under endpoints/ in the storage, unique in that storage; host and "
        "port when unset",
        pattern=r"^[A-Za-z0-9._-]+$",
    )
    weights: Literal["auto", "beside", "in_place"] = setting(
        "auto",
        "beside: a second engine for the new version, beside the live one; in_place: its weights replace "
        "those of the live version in turns, in the memory of one engine, which vLLM can; auto: in_place "
        "with vLLM",
    )
    allowed_checkpoints: list[str] = setting(
        [],
        "paths and URIs under which a promoted checkpoint lies, such as s3://bucket/runs; any when unset, "
        "and `latest` always",
    )
    watch_s: NonNegativeFloat = setting(
        60.0, "how long a new version is watched and may be rolled back, seconds"
    )
    max_loss_increase: NonNegativeFloat = setting(
        0.05,
        "largest increase over the live version's loss on the gate's text, nats per token",
    )
    max_error_rate: float = setting(
        0.01, "largest share of a new version's sequences that may fail", ge=0, le=1
    )
    max_latency_ratio: PositiveFloat | None = setting(
        3.0,
        "largest ratio of a new version's time per step to the previous version's, at equally many "
        "sequences; not judged when unset",
    )


class ServeConfig(Settings):
    """Everything that the endpoint needs, except the model's shape, which comes from the
    checkpoint."""

    checkpoint: str = setting(
        "latest", "path or URI of a checkpoint folder, or `latest`: the newest published one"
    )
    adapters: dict[str, str] = setting(
        {},
        "adapters of the checkpoint to serve beside it, each as NAME=CHECKPOINT: the name that clients give "
        "as model",
    )
    model_name: str | None = setting(
        None, "id in /v1/models, whatever is promoted; the live run's id when unset"
    )
    host: str = setting("127.0.0.1", "address to listen on; any but loopback needs an API key")
    port: int = setting(8000, "TCP port to listen on", ge=1, le=65535)
    api_key_file: str | None = setting(
        None,
        "file with one API key on each line; created with a new key (0600) if missing, reread on changes",
    )
    admin_key_file: str | None = setting(
        None, "file like api_key_file with /admin's keys; no /admin when unset"
    )
    receipt_key_file: str | None = setting(
        None,
        "private key, a PEM file, that signs an answer if its request asks for a receipt",
    )
    xray: Literal["auto", "off", "admin", "user"] = setting(
        "auto",
        "who may look inside a query, in a process of its own with the model's memory: nobody (off), "
        "admin keys, or users too; auto: users on a loopback address, else admins",
    )
    trace: str | None = setting(
        None,
        "path or URI of the token store, with its trace index, that the checkpoint was trained on: keys with may=trace "
        "are told which parts of a text it learned word for word, and where (/v1/trace); no such route when unset",
    )
    log_format: Literal["text", "json"] | None = setting(
        None,
        "how replicas, their engines, the coordinator and the proxies write their logs: text, or json, an object a "
        "line; as the environment variable RAYMILL_LOG_FORMAT says when unset, else text",
    )
    http: HttpConfig = HttpConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig(num_nodes=2)
    storage: StorageConfig = StorageConfig()

    @property
    def num_adapter_places(self) -> int:
        """The number of adapters for which an engine has room that serves any: when unset also for
        a promoted one, and for the model itself, which may be an adapter."""
        most = self.engine.max_adapters
        return max(8, len(self.adapters) + 2) if most is None else most

    @property
    def max_ongoing_requests(self) -> int:
        """The number of requests that a replica takes on."""
        return self.replicas.max_ongoing_requests or (1024 if self.engine.device == "cuda" else 64)

    @property
    def target_ongoing_requests(self) -> float:
        """The number of requests per replica that autoscaling aims at."""
        return self.replicas.target_ongoing_requests or (128 if self.engine.device == "cuda" else 8)

    @model_validator(mode="after")
    def _adapters_have_an_engine(self) -> Self:
        if self.adapters and not self.engine.runs_vllm:
            raise ValueError(
                "adapters are computed by vLLM; expected engine.backend=vllm or device=cuda, or adapters that "
                "`raymill export --merge` has made whole"
            )
        most = self.engine.max_adapters
        if most is not None and most < len(self.adapters):
            raise ValueError(
                f"engine.max_adapters={most} is less than the {len(self.adapters)} adapters that are named"
            )
        if self.model_name in self.adapters:
            raise ValueError(f"model_name={self.model_name} is the name of an adapter too")
        return self

    @model_validator(mode="after")
    def _trace_has_keys(self) -> Self:
        if self.trace is not None and self.api_key_file is None and self.admin_key_file is None:
            raise ValueError(
                "trace shows training text, to keys that may see it alone; expected api_key_file or admin_key_file, "
                "with may=trace on such a key's line"
            )
        return self

    @model_validator(mode="after")
    def _in_place(self) -> Self:
        if self.delivery.weights == "in_place" and not self.engine.runs_vllm:
            raise ValueError(
                "delivery.weights=in_place needs vLLM; expected auto or beside with raymill's engine, whose weights "
                "cannot be replaced"
            )
        return self
