"""The typed settings: `RunConfig` for a run, `EvaluateConfig` for an evaluation (`ServeConfig` is in `serve`).

Each is a key of the YAML file and a flag (`--train.learning-rate 1e-3`); help.toml says what each is for. The trees are
frozen and refuse unknown keys. Secrets are never settings: they come from the environment or from files named by a
setting.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
)
from pydantic.functional_serializers import PlainSerializer
from pydantic.functional_validators import BeforeValidator, field_validator, model_validator

from cluster.settings.amounts import is_whole_number, whole_number
from cluster.settings.batch_schedule import BatchSchedule
from cluster.settings.shard import Shard, divided_by
from cluster.storage.uris import Storage, open_storage
from model.config import GPTConfig, preset_fields
from model.numerics import NUMERICS, Numerics, Precision


def _model_shape(value: Any) -> Any:
    return preset_fields(value) if isinstance(value, dict) else value


ModelShape = Annotated[GPTConfig, BeforeValidator(_model_shape), PlainSerializer(dataclasses.asdict)]


class Settings(BaseModel):
    """The base of every branch: frozen, and refusing unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _counted(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads a number with a unit where a count or bytes are meant."""
        name = str(info.field_name)
        if not isinstance(value, str) or not is_whole_number(cls.model_fields[name].annotation):
            return value
        number = whole_number(value, is_bytes=name.endswith("_bytes"))
        return value if number is None else number


TOKENS = "tokens://"
"""Prefix in `data.source` of a finished token store's location, whose shards are used as they are."""

Compute = Literal["plain", "compiled", "cpu"]
"""Ways to compute a training step."""

"""What the workers of a run may divide among them."""

QualityRule = Literal["word_count", "word_length", "symbol_ratio", "line_marks", "alphabetic_words", "stop_words"]
"""Names of `data.quality_rules`."""

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
"""The name of a text in `data.validation`."""


READ_ENDINGS = (".txt", ".jsonl", ".csv", ".parquet", ".gz", ".zst")
"""Endings of files that are read by themselves."""

TextEnding = Annotated[str, Field(pattern=r"^\.[A-Za-z0-9_+.-]+$")]
"""The ending of files that are read as text."""

Sources = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Locations of text; a single one may stand without its list."""


class TextConfig(Settings):
    """The text to read."""

    source: Sources = []
    format: Literal["text", "chat"] = "text"
    text_field: str = "text"
    text_endings: list[TextEnding] = []

    @model_validator(mode="after")
    def _endings_are_others(self) -> Self:
        if known := [ending for ending in self.text_endings if ending.lower().endswith(READ_ENDINGS)]:
            raise ValueError(f"text_endings: {known[0]} is read already; name only endings of other files")
        return self


class DataConfig(TextConfig):
    """The way from text to token shards."""

    weights: list[PositiveFloat] = []
    validation: dict[SetName, str] = {}
    tokenizer: str | None = None
    vocab_size: int = Field(default=4096, ge=257, le=1_000_000)
    normalize: list[Literal["nfc", "lowercase", "collapse_spaces"]] = []
    tokenizer_sample_bytes: PositiveInt = 256 << 20
    invalid_utf8: Literal["replace", "skip", "fail"] = "replace"
    max_document_bytes: PositiveInt = 16 << 20
    max_compression_ratio: float = Field(default=100.0, gt=1)
    max_unreadable_fraction: float = Field(default=1.0, ge=0, le=1)
    dedup: bool = True
    near_dedup_threshold: float | None = Field(default=None, ge=0.1, le=1)
    quality_rules: list[QualityRule] = []
    decontaminate_ngram: int | None = Field(default=None, ge=4)
    val_fraction: float = Field(default=0.05, ge=0, lt=1)
    val_max_documents: PositiveInt | None = None
    shard_bytes: NonNegativeInt = 0
    selection_task_bytes: PositiveInt = 32 << 20

    @model_validator(mode="after")
    def _one_weight_a_source(self) -> Self:
        if self.weights and len(self.weights) != len(self.source):
            raise ValueError(f"{len(self.weights)} weights for {len(self.source)} sources; give one a source, or none")
        return self


class TrainConfig(Settings):
    """The way from tokens to weights. The global batch is the same for any number of workers."""

    max_tokens: PositiveInt = 10_000_000
    global_batch_size: PositiveInt = 64
    micro_batch_size: PositiveInt = 8
    micro_batches_per_lane: PositiveInt = 1
    batch_ramp_tokens: NonNegativeInt = 0
    batch_ramp_start: PositiveInt | None = None
    seq_len: PositiveInt | None = None
    learning_rate: PositiveFloat = 6e-4
    schedule: Literal["cosine", "wsd"] = "cosine"
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    warmup_tokens: NonNegativeInt | None = None
    decay_tokens: PositiveInt | None = None
    cooldown_tokens: PositiveInt | None = None
    weight_decay: NonNegativeFloat = 0.1
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    grad_clip: NonNegativeFloat = 1.0
    precision: Literal["auto", Precision] = "auto"
    compute: Literal["auto", Compute] = "auto"
    recompute: bool = False
    exact: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)
    init_from: str | None = None
    max_skipped_steps: NonNegativeInt = 3
    max_rollbacks: NonNegativeInt = 3
    spike_factor: NonNegativeFloat = 0.0
    shuffle_window_rows: PositiveInt = 1 << 20
    document_mask: bool = False
    eval_every_steps: PositiveInt = 100
    eval_max_tokens: PositiveInt = 1_000_000
    sample_prompts: list[str] = []
    layer_statistics_every_steps: NonNegativeInt = 50
    hash_every_steps: NonNegativeInt = 0

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
    def numerics(self) -> Numerics:
        """The numbers in which the run computes, once `auto` is settled."""
        assert self.precision != "auto", "the precision is decided before a run starts"
        return NUMERICS[self.precision]

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

    min_workers: PositiveInt = 1
    max_workers: PositiveInt = 2
    threads_per_worker: PositiveInt = 1
    use_gpu: bool = False
    shard: Shard = "none"
    shard_group: PositiveInt | None = None
    mixed_hardware: Literal["refuse", "allow"] = "refuse"
    shard_cache_bytes: NonNegativeInt = 8 << 30  # half of the scratch space that the manifests give a pod
    resize_check_s: PositiveFloat = 10.0
    max_fruitless_attempts: PositiveInt = 6
    hang_timeout_s: NonNegativeFloat = 30.0
    price_per_device_hour: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers={self.min_workers} exceeds max_workers={self.max_workers}")
        if self.shard_group and not divided_by(self.shard).gradient:
            raise ValueError(f"scaling.shard_group is for scaling.shard=gradients or parameters; it is {self.shard}")
        return self

    def group_size(self, world_size: int) -> int:
        """Returns the number of workers that hold one copy of what is sharded: not fewer than were asked for, whose
        memory might not hold their shares."""
        least = min(self.shard_group or world_size, world_size)
        return next(size for size in range(least, world_size + 1) if world_size % size == 0)


class ClusterConfig(Settings):
    """The Ray cluster to use."""

    address: str | None = None
    num_nodes: int = Field(default=3, ge=1, le=16)
    cpus_per_node: PositiveInt | None = None


class StorageConfig(Settings):
    """The place of everything durable."""

    uri: str = ".raymill"


class CheckpointConfig(Settings):
    """The checkpoints to write and to keep."""

    save_every_steps: PositiveInt = 100
    num_to_keep: PositiveInt = 3
    keep_best: NonNegativeInt = 0
    keep_every_steps: PositiveInt | None = None
    snapshot_bytes: NonNegativeInt | None = None
    publish: bool = True


class RunConfig(Settings):
    """The settings of a run."""

    run_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
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
        if divided_by(self.scaling.shard).vectors and not train.exact:
            raise ValueError(
                f"scaling.shard={self.scaling.shard} needs train.exact: shards are what the exact sum's workers own"
            )
        schedule, batch = batch_schedule(self), "batch_ramp_start" if train.batch_ramp_start else "global_batch_size"
        num_lanes = schedule.num_lanes(1)
        if num_lanes < self.scaling.max_workers:
            raise ValueError(
                f"scaling.max_workers={self.scaling.max_workers} is more than a step has parts for: "
                f"{num_lanes} lane{'s' * (num_lanes != 1)} (train.{batch} / {train.lane_in_words}); lower it, or raise "
                f"train.{batch}"
            )
        if seq_len(self) > self.model.n_positions:
            raise ValueError(f"train.seq_len={seq_len(self)} exceeds model.n_positions={self.model.n_positions}")
        if schedule.max_steps < 1:
            raise ValueError(
                f"train.max_tokens={train.max_tokens} is less than one step of {schedule.step_tokens(1)} tokens "
                f"(train.{batch} x sequence length)"
            )
        return self


def run_storage(config: RunConfig) -> Storage:
    """Returns the folder of the run's ledger, checkpoints and report."""
    return open_storage(config.storage.uri).child(f"runs/{config.run_id}")


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

    checkpoint: str = "latest"
    data: TextConfig = TextConfig()
    """The text to evaluate on; the validation split that the checkpoint was trained with when unset."""
    max_tokens: PositiveInt = 10_000_000
    batch_size: PositiveInt = 8
    seq_len: PositiveInt | None = None
    precision: Literal["auto", Precision] = "auto"
    num_workers: PositiveInt = 2
    threads_per_worker: PositiveInt = 1
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()


def to_yaml(config: Settings) -> str:
    """Returns the whole tree as YAML; `read_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def write_config(config: Settings, path: Path) -> None:
    path.write_text(to_yaml(config), encoding="utf-8")
