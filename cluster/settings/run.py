"""The typed settings: `RunConfig` for a run, `EvaluateConfig` for an evaluation (`ServeConfig` is in `serve`).

Each is a key of the YAML file and a flag (`--train.learning-rate 1e-3`). The trees are frozen and refuse unknown keys.
Secrets are never settings: they come from the environment or from files named by a setting.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from cluster.settings.batch_schedule import BatchSchedule
from model.config import GPTConfig, preset_fields
from model.processor import Precision


def _model_shape(value: Any) -> Any:
    return preset_fields(value) if isinstance(value, dict) else value


ModelShape = Annotated[GPTConfig, BeforeValidator(_model_shape), PlainSerializer(dataclasses.asdict)]


class Settings(BaseModel):
    """The base of every branch: frozen, and refusing unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def setting(default: Any, about: str, **bounds: Any) -> Any:
    """Returns a setting's default, its line of help, and bounds that its type does not say."""
    return Field(default, description=about, **bounds)


TOKENS = "tokens://"
"""Prefix in `data.source` of a finished token store's location, whose shards are used as they are."""

Compute = Literal["plain", "compiled", "cpu"]
"""Ways to compute a training step."""

Shard = Literal["none", "optimizer", "gradients", "parameters"]
"""What the workers of a run may divide among them."""

QualityRule = Literal["word_count", "word_length", "symbol_ratio", "line_marks", "alphabetic_words", "stop_words"]
"""Names of `data.quality_rules`."""

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
"""The name of a text in `data.validation`."""


class TextConfig(Settings):
    """The text to read."""

    source: str | list[str] = setting(
        [],
        "corpus: a path, file://, s3:// or hf://datasets/OWNER/NAME@REVISION URI, or a list of them; globs "
        "allowed; tokens://PATH is a finished token store. Endings: .txt .jsonl .csv .parquet, .gz and .zst of the "
        "first three",
    )
    text_field: str = setting("text", "field (jsonl) or column (csv, parquet) that holds the text")


class DataConfig(TextConfig):
    """The way from text to token shards."""

    weights: list[PositiveFloat] = setting(
        [], "share of the training rows from each source, relative to each other; by their sizes when empty"
    )
    validation: dict[SetName, str] = setting({}, "further texts to validate on, by name; as a flag NAME=SOURCE ...")
    tokenizer: str | None = setting(None, "tokenizer.json's URI, or its folder's; trained on the corpus when unset")
    vocab_size: int = setting(4096, "ids of the trained vocabulary", ge=257, le=1_000_000)
    normalize: list[Literal["nfc", "lowercase", "collapse_spaces"]] = setting(
        [], "text normalization of a trained tokenizer, recorded in it; GPT-2 has none"
    )
    tokenizer_sample_bytes: PositiveInt = setting(
        256 << 20, "bytes of text, from places all over the corpus, that the tokenizer is trained on"
    )
    invalid_utf8: Literal["replace", "skip", "fail"] = setting(
        "replace", "what to do with a document that is not UTF-8: put U+FFFD, drop it, or stop"
    )
    max_document_bytes: PositiveInt = setting(
        16 << 20, "bytes above which a document is dropped and counted; a longer txt file is cut"
    )
    max_compression_ratio: float = setting(
        100.0, "a .gz or .zst that unpacks to more than this many times its size is refused", gt=1
    )
    max_unreadable_fraction: float = setting(
        1.0, "stop when a larger share of the documents is binary, not UTF-8 or without the text field", ge=0, le=1
    )
    dedup: bool = setting(True, "drop documents whose text occurred before, ignoring case, blanks and Unicode form")
    near_dedup_threshold: float | None = setting(
        None, "drop documents at least this similar (Jaccard, word 3-grams) to another", gt=0, le=1
    )
    quality_rules: list[QualityRule] = setting([], "rules for documents, with Gopher's bounds (Rae et al., 2021)")
    decontaminate_ngram: int | None = setting(
        None, "drop training documents that share this many words in a row with validation", ge=4
    )
    val_fraction: float = setting(0.05, "share of documents held out, chosen by each document's own hash", ge=0, lt=1)
    shard_bytes: PositiveInt = setting(16 << 20, "source bytes per shard: the unit of work and of resuming")

    @model_validator(mode="after")
    def _one_weight_a_source(self) -> Self:
        num_sources = 1 if isinstance(self.source, str) else len(self.source)
        if self.weights and len(self.weights) != num_sources:
            raise ValueError(f"{len(self.weights)} weights for {num_sources} sources; give one a source, or none")
        return self


class TrainConfig(Settings):
    """The way from tokens to weights. The global batch is the same for any number of workers."""

    max_tokens: PositiveInt = setting(10_000_000, "tokens to train on; never exceeded")
    global_batch_size: PositiveInt = setting(64, "sequences per optimizer step, over all workers")
    micro_batch_size: PositiveInt = setting(8, "sequences computed together")
    micro_batches_per_lane: PositiveInt = setting(
        1,
        "micro-batches that are added up in order before the exact sum takes them, as one lane: more need less memory "
        "and pass less often over the gradient; they are part of the bits. A lane's size divides global_batch_size",
    )
    batch_ramp_tokens: NonNegativeInt = setting(
        0, "tokens over which the batch grows linearly to global_batch_size; 0: full from the start"
    )
    batch_ramp_start: PositiveInt | None = setting(None, "sequences of the first step of a growing batch")
    seq_len: PositiveInt | None = setting(None, "tokens per sequence; model.n_positions when unset")
    learning_rate: PositiveFloat = setting(6e-4, "peak learning rate")
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine",
        "learning rate after the warm-up: cosine down to the horizon; or wsd, the peak until a last, "
        "linear stretch of cooldown_tokens down to the horizon",
    )
    min_learning_rate_ratio: float = setting(0.1, "learning rate at the horizon, as a share of the peak", ge=0, le=1)
    warmup_tokens: NonNegativeInt | None = setting(
        None, "linear warm-up, tokens; 375M or 2% of max_tokens, the smaller, when unset"
    )
    decay_tokens: PositiveInt | None = setting(None, "horizon of the learning rate, tokens; max_tokens when unset")
    cooldown_tokens: PositiveInt | None = setting(None, "end of schedule wsd, tokens; 20% of the horizon when unset")
    weight_decay: NonNegativeFloat = setting(0.1, "AdamW decay of matrices; biases and LayerNorms have none")
    beta1: float = setting(0.9, "AdamW, decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW, decay of the second moment", ge=0, lt=1)
    grad_clip: NonNegativeFloat = setting(1.0, "largest norm of the summed gradient; 0 never clips")
    precision: Literal["auto", Precision] = setting(
        "auto",
        "compute precision; bf16 is autocast over fp32 master weights; auto: bf16 where the workers' "
        "processor computes it at speed when the run first starts, else fp32, and the same for the rest of the run",
    )
    compute: Literal["auto", Compute] = setting(
        "auto",
        "operations of the model: PyTorch's own (plain), these in fused kernels (compiled), or some with gradients "
        "written for CPUs (cpu); auto: compiled on GPUs, else cpu",
    )
    recompute: bool = setting(
        False, "keep each block's input alone for backward, which computes the rest again: less memory, the same bits"
    )
    exact: bool = setting(True, "the same bits for any number of workers; false is stock DistributedDataParallel")
    seed: int = setting(0, "initial weights, sample order, dropout", ge=0, lt=2**63)
    max_skipped_steps: NonNegativeInt = setting(3, "bad steps in a row that are skipped before the run is rolled back")
    max_rollbacks: NonNegativeInt = setting(3, "rollbacks after which a run stops instead of rolling back")
    spike_factor: NonNegativeFloat = setting(
        0.0, "a loss this many median absolute deviations above the median is bad; 0 is off"
    )
    shuffle_window_rows: PositiveInt = setting(
        1 << 20, "rows shuffled together; windows follow each other in the order of the store"
    )
    document_mask: bool = setting(False, "no token attends to another document in its row; positions restart at each")
    while_tokenizing: bool = setting(False, "start on the sealed part of the token store while the rest is written")
    eval_every_steps: PositiveInt = setting(100, "steps between validations; the last step always validates")
    eval_max_tokens: PositiveInt = setting(1_000_000, "validation tokens, from the front of the split")
    sample_prompts: list[str] = setting([], "prompts completed at every validation, with a fixed seed")
    layer_statistics_every_steps: NonNegativeInt = setting(
        50, "steps between measurements of each layer's gradient, weights and update; 0 never"
    )
    hash_every_steps: NonNegativeInt = setting(0, "steps between parameter hashes in the ledger; 0 at checkpoints only")

    @model_validator(mode="after")
    def _cooldown_fits(self) -> Self:
        if self.cooldown_tokens is None:
            return self
        if self.schedule != "wsd":
            raise ValueError(f"train.cooldown_tokens={self.cooldown_tokens} needs train.schedule=wsd; cosine has none")
        horizon, warmup = self.decay_tokens or self.max_tokens, self.warmup_tokens or 0
        if warmup + self.cooldown_tokens > horizon:
            raise ValueError(
                f"train.cooldown_tokens={self.cooldown_tokens} after train.warmup_tokens={warmup} exceeds the horizon "
                f"of {horizon} tokens (train.decay_tokens, or else train.max_tokens)"
            )
        return self

    @property
    def lane_size(self) -> int:
        """Sequences of a lane, the unit of the exact sum."""
        return self.micro_batch_size * self.micro_batches_per_lane

    @property
    def lane_in_words(self) -> str:
        lane = f"train.micro_batch_size={self.micro_batch_size}"
        several = self.micro_batches_per_lane > 1
        return f"{lane} times train.micro_batches_per_lane={self.micro_batches_per_lane}" if several else lane

    @model_validator(mode="after")
    def _ramp_fits(self) -> Self:
        start, lane = self.batch_ramp_start, self.lane_size
        if (start is None) != (self.batch_ramp_tokens == 0):
            raise ValueError("train.batch_ramp_tokens and train.batch_ramp_start belong together; set both, or neither")
        if start is not None and (start % lane or start >= self.global_batch_size):
            raise ValueError(
                f"train.batch_ramp_start={start} has to be a multiple of {self.lane_in_words}, less than "
                f"train.global_batch_size={self.global_batch_size}"
            )
        return self


class ScalingConfig(Settings):
    """The number of training workers, and what each may use."""

    min_workers: PositiveInt = setting(1, "training waits below this many workers")
    max_workers: PositiveInt = setting(2, "training grows up to this many workers")
    threads_per_worker: PositiveInt = setting(1, "compute threads, and logical CPUs, of a worker")
    use_gpu: bool = setting(False, "one GPU per worker")
    shard: Shard = setting(
        "none",
        "what a worker keeps its own part of alone: optimizer, AdamW's moments (ZeRO-1); gradients, their sums too "
        "(ZeRO-2); parameters, the weights too (ZeRO-3). The bits are the same, and a resume may choose another one",
    )
    shard_group: PositiveInt | None = setting(
        None,
        "workers that hold one copy of what shard=gradients or parameters divides, usually a node's: the largest such "
        "number that divides the workers is taken; all of them when unset",
    )
    resize_check_s: PositiveFloat = setting(10.0, "seconds between looks for newly available workers")
    max_fruitless_attempts: PositiveInt = setting(6, "attempts in a row without progress after which the run gives up")
    hang_timeout_s: NonNegativeFloat = setting(30.0, "silent seconds after which a worker is killed; 0 never does")
    price_per_device_hour: NonNegativeFloat | None = setting(
        None, "price of an hour of a GPU, or of a CPU where workers have none, for the cost metrics"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers={self.min_workers} exceeds max_workers={self.max_workers}")
        if self.shard_group and self.shard not in ("gradients", "parameters"):
            raise ValueError(f"scaling.shard_group is for scaling.shard=gradients or parameters; it is {self.shard}")
        return self

    def group_size(self, world_size: int) -> int:
        """Returns the number of workers that hold one copy of what is sharded."""
        most = min(self.shard_group or world_size, world_size)
        return next(size for size in range(most, 0, -1) if world_size % size == 0)


class ClusterConfig(Settings):
    """The Ray cluster to use."""

    address: str | None = setting(None, "Ray Jobs address (http://host:8265) of a cluster; a local one when unset")
    num_nodes: int = setting(3, "raylets of the local cluster, the head among them", ge=1, le=16)
    cpus_per_node: PositiveInt | None = setting(None, "CPUs of a local node; enough for max_workers when unset")


class StorageConfig(Settings):
    """The place of everything durable."""

    uri: str = setting(".raymill", "root of tokens, runs and checkpoints: a path, file:// or s3://bucket/prefix")


class CheckpointConfig(Settings):
    """The checkpoints to write and to keep."""

    save_every_steps: PositiveInt = setting(100, "steps between checkpoints; the last step always saves")
    num_to_keep: PositiveInt = setting(3, "newest checkpoints to keep, at least two; published ones are kept besides")
    keep_best: NonNegativeInt = setting(0, "checkpoints of the lowest validation loss to keep besides")
    keep_every_steps: PositiveInt | None = setting(None, "keep each checkpoint of a multiple of these steps besides")
    snapshot_bytes: NonNegativeInt | None = setting(
        None, "most memory of a node for copies of the training state; half of the node's when unset, 0 keeps none"
    )


FORMER_SETTINGS: dict[str, Any] = {
    "train.epsilon": 1e-8,
    "train.spike_window": 64,
    "train.sample_tokens": None,
    "train.timing": None,
    "train.shard_optimizer": None,
    "scaling.max_failures": None,
    "scaling.start_timeout_s": None,
    "scaling.standby": None,
    "checkpoint.spool_bytes": None,
}
"""Settings that earlier versions recorded and that are constants now: the value, where a run's bits depend on it."""


class RunConfig(Settings):
    """The settings of a run."""

    run_id: str | None = setting(
        None,
        "name of the run; naming an existing one resumes it. A new one is made when unset",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    )
    data: DataConfig = DataConfig()
    model: ModelShape = GPTConfig()
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        train = self.train
        if train.global_batch_size % train.lane_size:
            raise ValueError(f"{train.lane_in_words} does not divide train.global_batch_size={train.global_batch_size}")
        if train.compute == "cpu" and self.scaling.use_gpu:
            raise ValueError("train.compute=cpu is for CPUs, and scaling.use_gpu is set; leave out one of them")
        if self.scaling.shard != "none" and not train.exact:
            raise ValueError(
                f"scaling.shard={self.scaling.shard} needs train.exact: shards are what the exact sum's workers own"
            )
        schedule, batch = batch_schedule(self), "batch_ramp_start" if train.batch_ramp_start else "global_batch_size"
        if schedule.num_lanes(1) < self.scaling.max_workers:
            raise ValueError(
                f"scaling.max_workers={self.scaling.max_workers} exceeds the {schedule.num_lanes(1)} lanes of a step "
                f"(train.{batch} / {train.lane_in_words}): a worker would have nothing to do"
            )
        if seq_len(self) > self.model.n_positions:
            raise ValueError(f"train.seq_len={seq_len(self)} exceeds model.n_positions={self.model.n_positions}")
        if schedule.max_steps < 1:
            raise ValueError(
                f"train.max_tokens={train.max_tokens} is less than one step of {schedule.step_tokens(1)} tokens "
                f"(train.{batch} x sequence length)"
            )
        return self


def seq_len(config: RunConfig) -> int:
    """Returns the tokens of a training sequence."""
    return config.train.seq_len or config.model.n_positions


def planned_vocabulary(config: RunConfig) -> RunConfig:
    """Returns the settings with the vocabulary that the run will have: `data.vocab_size` where it trains a tokenizer,
    else the model's."""
    if not config.data.source or config.data.tokenizer is not None:
        return config
    return config.model_copy(update={"model": dataclasses.replace(config.model, vocab_size=config.data.vocab_size)})


def with_precision(config: RunConfig, precision: Precision) -> RunConfig:
    """Returns the run with this precision instead of `auto`; unchanged where another one is set."""
    if config.train.precision != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def way_to_compute(config: RunConfig) -> Compute:
    """Returns `train.compute`, with `auto` settled by the workers' device."""
    if config.train.compute == "auto":
        return "compiled" if config.scaling.use_gpu else "cpu"
    return config.train.compute


def batch_schedule(config: RunConfig) -> BatchSchedule:
    """Returns the lanes, samples and tokens of every step."""
    train = config.train
    return BatchSchedule(
        seq_len=seq_len(config),
        lane_size=train.lane_size,
        full_lanes=train.global_batch_size // train.lane_size,
        max_tokens=train.max_tokens,
        start_lanes=(train.batch_ramp_start or train.global_batch_size) // train.lane_size,
        ramp_tokens=train.batch_ramp_tokens,
    )


def max_steps(config: RunConfig) -> int:
    """Returns the optimizer steps of the whole run: `train.max_tokens` is never exceeded."""
    return batch_schedule(config).max_steps


def warmup_tokens(config: RunConfig) -> int:
    """Returns 375M tokens as in GPT-3, or 2% of a run that is shorter than 18.75B tokens, when unset."""
    if config.train.warmup_tokens is not None:
        return config.train.warmup_tokens
    return min(375_000_000, config.train.max_tokens // 50)


def cooldown_tokens(config: RunConfig) -> int | None:
    """Returns the last stretch of schedule wsd, 20% of the horizon when unset; None with the cosine."""
    train = config.train
    if train.schedule == "cosine":
        return None
    return train.cooldown_tokens or (train.decay_tokens or train.max_tokens) // 5


class EvaluateConfig(Settings):
    """The settings of an evaluation. The model's shape and its tokenizer come from the checkpoint."""

    checkpoint: str = setting("latest", "path or URI of a checkpoint's or run's folder, or `latest`: newest published")
    data: TextConfig = TextConfig()
    """The text to evaluate on; the validation split that the checkpoint was trained with when unset."""
    max_tokens: PositiveInt = setting(10_000_000, "tokens to evaluate on, from the front")
    batch_size: PositiveInt = setting(8, "sequences computed together")
    seq_len: PositiveInt | None = setting(None, "tokens per sequence; as the run trained, or n_positions, when unset")
    precision: Literal["auto", Precision] = setting(
        "auto", "compute precision, bf16 is autocast; auto: as the run trained, or else fp32"
    )
    num_workers: PositiveInt = setting(2, "batches computed at once; the result does not depend on it")
    threads_per_worker: PositiveInt = setting(1, "compute threads, and logical CPUs, of a worker")
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()


def to_yaml(config: Settings) -> str:
    """Returns the whole tree as YAML; `read_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def write_config(config: Settings, path: Path) -> None:
    path.write_text(to_yaml(config), encoding="utf-8")
