"""The typed settings of a run, `RunConfig` (`ServeConfig` is in `serve`; the settings of an
evaluation and of a trace index are in `stages`).

Each is a key of the YAML file and a flag (`--train.learning-rate 1e-3`), declared once
(setting.py): `data` and `train` have those that shape tokens and weights. The trees are frozen and
refuse unknown keys. Secrets are never settings: they come from the environment or from files named
by a setting.
"""

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, assert_never

import yaml
from pydantic import (
    GetCoreSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.functional_serializers import PlainSerializer
from pydantic.functional_validators import BeforeValidator, WrapValidator, model_validator

from cluster.settings import recipe
from cluster.settings.amounts import gpu_or_not, require_own_gpu
from cluster.settings.batch_schedule import BatchSchedule
from cluster.settings.computing import require_computed
from cluster.settings.data import DataConfig
from cluster.settings.setting import Settings, setting
from cluster.settings.train import Compute, TrainConfig
from cluster.storage.uris import Storage, StorageError, open_storage, split_uri
from model.adapters.lora import Adapter
from model.config import GPTConfig, Shape, preset_fields
from model.files.hf_config import config_to_hf, shape_from_hf
from model.foreign_config import ForeignConfig
from model.numerics import FP32, Precision
from model.signing.floor import NO_FLOOR, Floor, utc_time
from model.signing.signature import Trusted, trusted_by_file
from raymill.state.shard import WHOLE, Shard, divided_by

CONFIG = "config"
"""The setting that names a config.json, or has its content."""

_ADAPTER = "adapter"
"""The record of a run that has begun: the adapter that `train.lora_rank` asked for."""

CONFIG_HELP = (
    "config.json of any causal language model of transformers, a path or URI, in place of a preset and of all "
    "other fields; needs the extra hf unless it is a GPT-2's or a Llama's"
)


def _validated(value: Any, as_ours: Callable[[Any], GPTConfig]) -> Shape:
    if isinstance(value, ForeignConfig):
        return value
    if not isinstance(value, dict):
        return as_ours(value)
    if value.get(CONFIG) is None:
        return as_ours(preset_fields({name: value[name] for name in value if name != CONFIG}))
    allowed = (CONFIG, _ADAPTER)
    others = sorted(name for name in value if name not in allowed and value[name] is not None)
    if others:
        raise ValueError(
            f"config is set, so {', '.join(others)} must not be: change the config.json instead"
        )
    content = value[CONFIG]
    values = content if isinstance(content, dict) else _read(str(content))
    if value.get(_ADAPTER) is None:
        return shape_from_hf(values)
    return dataclasses.replace(ForeignConfig.of(values), adapter=Adapter(**value[_ADAPTER]))


def _read(uri: str) -> dict[str, Any]:
    """Raises `ValueError`, or `StorageError` where the storage cannot be asked."""
    folder, name = split_uri(uri)
    try:
        content = folder.find_bytes(name)
    except (IsADirectoryError, StorageError) as error:
        raise ValueError(f"config={uri} cannot be read: {error}") from error
    if content is None:
        raise ValueError(f"config={uri} does not exist; name a config.json")
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"config={uri} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config={uri} holds no settings; expected a model's config.json")
    return values


def _dumped(shape: Shape) -> dict[str, Any]:
    match shape:
        case GPTConfig():
            return dataclasses.asdict(shape)
        case ForeignConfig():
            adapter = {_ADAPTER: dataclasses.asdict(shape.adapter)} if shape.adapter else {}
            return {CONFIG: shape.values, **adapter}
        case _:
            assert_never(shape)


class _AsSettings:
    """Tells pydantic how a shape is read and written; problems are those of our fields."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(
            Annotated[GPTConfig, WrapValidator(_validated), PlainSerializer(_dumped)]
        )


ModelShape = Annotated[Shape, _AsSettings()]


class ScalingConfig(Settings):
    """The number of training workers, and what each may use."""

    min_workers: PositiveInt = setting(1, "training waits below this many workers")
    max_workers: PositiveInt = setting(2, "training grows up to this many workers")
    threads_per_worker: PositiveInt = setting(1, "compute threads, and logical CPUs, of a worker")
    use_gpu: Annotated[bool, BeforeValidator(gpu_or_not)] = setting(
        False, "one GPU per worker; auto: if PyTorch sees one on the machine where this is typed"
    )
    shard: Shard = setting(
        "none",
        "what the workers divide, so that each keeps a part: optimizer, its moments (ZeRO-1); gradients, "
        "the summed gradient too (ZeRO-2); parameters, the weights too (ZeRO-3). The bits are the same, "
        "and a resume may choose another one",
    )
    shard_group: PositiveInt | None = setting(
        None,
        "workers that together hold one copy of what shard=gradients or parameters divides, usually a "
        "node's; all of them when unset. If it does not divide the workers, an elastic run keeps "
        "some of them spare, or takes the next larger number that does",
    )
    mixed_hardware: Literal["refuse", "allow"] = setting(
        "refuse",
        "refuse: the run stops where its workers differ from one another, or from those that it began "
        "with, in what decides how they round (processor, GPU, library versions, threads); allow: it goes "
        "on without the promise of the same bits. Nothing is refused with train.exact=false",
    )
    # half of the scratch space that the manifests give a pod
    shard_cache_bytes: NonNegativeInt = setting(
        8 << 30,
        "bytes of each node's disk for copies of a remote token store's shards; with room for two "
        "windows of rows, reading takes few requests",
    )
    resize_check_s: PositiveFloat = setting(
        10.0, "seconds between looks for newly available workers"
    )
    max_fruitless_attempts: PositiveInt = setting(
        6, "attempts in a row without progress after which the run gives up"
    )
    hang_timeout_s: NonNegativeFloat = setting(
        30.0,
        "seconds of silence after which a worker is killed, and seconds without progress of any "
        "worker after which the one that holds up the others is killed; 0 never kills",
    )
    price_per_device_hour: NonNegativeFloat | None = setting(
        None,
        "price of an hour of a GPU, or of a CPU where workers have none: for the costs that are shown, and max_cost",
    )
    spot_price_per_device_hour: NonNegativeFloat | None = setting(
        None,
        "the same on a node that Ray labels ray.io/market-type=spot; on others, and when unset, the price above counts",
    )
    max_cost: PositiveFloat | None = setting(
        None,
        "money that all attempts of the run may cost together, in the currency of the prices: then it is saved, "
        "published and ends, at most a step later; a resume with a higher one continues it",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"min_workers={self.min_workers} exceeds max_workers={self.max_workers}"
            )
        if self.shard_group and not divided_by(self.shard).gradient:
            raise ValueError(
                f"scaling.shard_group is for scaling.shard=gradients or parameters; it is {self.shard}"
            )
        for name in ("spot_price_per_device_hour", "max_cost"):
            if getattr(self, name) is not None and self.price_per_device_hour is None:
                raise ValueError(
                    f"scaling.{name} needs scaling.price_per_device_hour, which counts on each node that Ray does not "
                    "label as a spot one"
                )
        return self

    def group_size(self, world_size: int) -> int:
        """Returns the number of workers that hold one copy of the sharded state: not fewer than
        were asked for, whose memory might not hold their shares."""
        least = min(self.shard_group or world_size, world_size)
        return next(size for size in range(least, world_size + 1) if world_size % size == 0)


class ClusterConfig(Settings):
    """The Ray cluster to use."""

    address: str | None = setting(
        None, "Ray Jobs address (http://host:8265) of a cluster; a local one when unset"
    )
    num_nodes: int = setting(1, "raylets of the local cluster, the head among them", ge=1, le=16)
    cpus_per_node: PositiveInt | None = setting(
        None, "CPUs of a local node; enough for max_workers when unset"
    )


class StorageConfig(Settings):
    """The place of everything durable."""

    uri: str = setting(
        ".raymill", "root of tokens, runs and checkpoints: a path, file:// or s3://bucket/prefix"
    )
    signed_by: str | None = setting(
        None,
        "public key or certificates, a PEM file, or an identity, a JSON file; a checkpoint to begin from, evaluate or "
        "serve must be signed by its holder (`raymill sign`)",
    )
    timestamped_by: str | None = setting(
        None,
        "root certificates of time stamp authorities, a PEM file; each such signature must then have a time stamp of "
        "one, and its certificate have been valid at that time",
    )
    signed_from_step: NonNegativeInt | None = setting(
        None,
        "earliest step, in its signed statement, of a checkpoint to begin from, evaluate or serve; older ones are "
        "refused, even if they are signed",
    )
    signed_from_date: Annotated[datetime, BeforeValidator(utc_time)] | None = setting(
        None,
        "earliest time, in its signed statement, of its signature: a day or a time in UTC, such as 2026-01-31 or "
        "2026-01-31T12:00",
    )

    @model_validator(mode="after")
    def _says_who_signs(self) -> Self:
        if self.timestamped_by and not self.signed_by:
            raise ValueError("timestamped_by is for signatures: name whose they are with signed_by")
        if not self.signed_by and self.floor != NO_FLOOR:
            raise ValueError(
                "signed_from_step and signed_from_date are for signatures: name whose they are with signed_by"
            )
        return self

    @property
    def floor(self) -> Floor:
        """The earliest signed checkpoint that is taken."""
        return Floor(self.signed_from_step, self.signed_from_date)

    @property
    def signer(self) -> Trusted | None:
        """Who must have signed what is begun from, evaluated or served; None where anybody may."""
        return trusted_by_file(self.signed_by, self.timestamped_by, floor=self.floor)


class CheckpointConfig(Settings):
    """The checkpoints to write and to keep."""

    save_every_steps: PositiveInt = setting(
        100, "steps between checkpoints; the last step always saves"
    )
    num_to_keep: PositiveInt = setting(
        3, "newest checkpoints to keep, at least two; published ones are kept besides"
    )
    keep_best: NonNegativeInt = setting(
        0, "checkpoints of the lowest validation loss to keep besides"
    )
    keep_every_steps: PositiveInt | None = setting(
        None, "keep each checkpoint of a multiple of these steps besides"
    )
    snapshot_bytes: NonNegativeInt | None = setting(
        None,
        "most memory of a node for copies of the training state; half of the node's when unset, 0 keeps none",
    )
    publish: bool = setting(
        True,
        "make the run's last checkpoint the latest one, which `serve latest` means; --no-publish is the same as false",
    )


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

    @model_validator(mode="before")
    @classmethod
    def _follow_the_depth(cls, values: Any) -> Any:
        require_own_gpu(values)
        return recipe.with_depth(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        train = self.train
        if train.global_batch_size % train.lane_size:
            raise ValueError(
                f"{train.lane_in_words} does not divide train.global_batch_size={train.global_batch_size}"
            )
        if train.compute in ("cpu", "portable") and self.scaling.use_gpu:
            raise ValueError(
                f"train.compute={train.compute} is for CPUs, and scaling.use_gpu is set; leave out one of them"
            )
        require_computed(self.model, train)
        if divided_by(self.scaling.shard).vectors and not train.exact:
            raise ValueError(
                f"scaling.shard={self.scaling.shard} needs train.exact: shards are what the exact sum's workers own"
            )
        schedule = batch_schedule(self)
        batch = "batch_ramp_start" if train.batch_ramp_start else "global_batch_size"
        num_lanes = schedule.num_lanes(1)
        if num_lanes < self.scaling.max_workers:
            raise ValueError(
                f"scaling.max_workers={self.scaling.max_workers} is more than a step has parts for: "
                f"{num_lanes} lane{'s' * (num_lanes != 1)} (train.{batch} / {train.lane_in_words}); lower it, or raise "
                f"train.{batch}"
            )
        if seq_len(self) > self.model.n_positions:
            raise ValueError(
                f"train.seq_len={seq_len(self)} exceeds model.n_positions={self.model.n_positions}"
            )
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


def adapted(shape: Shape, train: TrainConfig) -> Shape:
    """Returns the shape with the adapter that the settings ask for, if they do: transformers' module
    then computes ours too. Raises `AdapterError` for layers that there are not."""
    if train.lora_rank is None:
        return shape
    if isinstance(shape, GPTConfig):
        shape = ForeignConfig.of(config_to_hf(shape, start_id=0, end_ids=[0]))
    alpha = train.lora_alpha or 2 * train.lora_rank
    return shape.with_adapter(Adapter(train.lora_rank, alpha, tuple(train.lora_targets)))


def state_scaling(config: RunConfig) -> ScalingConfig:
    """Returns what divides the training state: an adapter's is small, and whole on each worker;
    `scaling.shard` then divides the frozen weights alone."""
    if config.train.lora_rank is None:
        return config.scaling
    return config.scaling.model_copy(update={"shard": WHOLE, "shard_group": None})


def planned_vocabulary(config: RunConfig) -> RunConfig:
    """Returns the settings with the vocabulary that the run will have: `data.vocab_size` where it
    trains a tokenizer, else the model's."""
    if not config.data.source or config.data.tokenizer is not None:
        return config
    shape = config.model.with_vocabulary(config.data.vocab_size)
    return config.model_copy(update={"model": shape})


def with_precision(config: RunConfig, precision: Precision) -> RunConfig:
    """Returns the run with this precision instead of `auto`; unchanged where another one is set.
    Portable kernels compute in fp32."""
    if config.train.precision != "auto":
        return config
    if config.train.compute == "portable":
        precision = FP32.name
    return config.model_copy(
        update={"train": config.train.model_copy(update={"precision": precision})}
    )


def way_to_compute(config: RunConfig) -> Compute:
    """Returns `train.compute`, with `auto` settled by the workers' device and by who made the
    model's modules."""
    if config.train.compute == "auto":
        if config.model.by_transformers:
            return "plain"
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
    """Returns 375M tokens as in GPT-3, or 2% of a run that is shorter than 18.75B tokens, when
    unset."""
    if config.train.warmup_tokens is not None:
        return config.train.warmup_tokens
    return recipe.warmup_tokens(config.train.max_tokens)


def cooldown_tokens(config: RunConfig) -> int | None:
    """Returns the last stretch of schedule wsd, 20% of the horizon when unset; None with the
    cosine."""
    train = config.train
    if train.schedule == "cosine":
        return None
    return train.cooldown_tokens or (train.decay_tokens or train.max_tokens) // 5


def to_yaml(config: Settings) -> str:
    """Returns the whole tree as YAML; `read_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def write_config(config: Settings, path: Path) -> None:
    path.write_text(to_yaml(config), encoding="utf-8")
