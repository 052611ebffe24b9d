"""The typed settings of the stages beside a run: `EvaluateConfig` for an evaluation, `IndexConfig` for
a trace index."""

from typing import Literal

from pydantic import PositiveInt

from cluster.settings.data import TextConfig
from cluster.settings.run import ClusterConfig, ScalingConfig, StorageConfig
from cluster.settings.setting import Settings, setting
from model.numerics import Precision


class EvaluateConfig(Settings):
    """The settings of an evaluation. The model's shape and its tokenizer come from the
    checkpoint."""

    checkpoint: str = setting(
        "latest", "path or URI of a checkpoint's or run's folder, or `latest`: newest published"
    )
    data: TextConfig = TextConfig()
    """The text to evaluate on; the validation split that the checkpoint was trained with when
    unset."""
    max_tokens: PositiveInt = setting(10_000_000, "tokens to evaluate on, from the front")
    batch_size: PositiveInt = setting(8, "sequences computed together")
    seq_len: PositiveInt | None = setting(
        None, "tokens per sequence; as the run trained, or n_positions, when unset"
    )
    precision: Literal["auto", Precision] = setting(
        "auto",
        "compute precision, bf16 is autocast; auto: as the run trained, or else fp32",
    )
    num_workers: PositiveInt = setting(
        2, "batches computed at once; the result does not depend on it"
    )
    threads_per_worker: PositiveInt = setting(1, "compute threads, and logical CPUs, of a worker")
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()


class WorkersConfig(Settings):
    """The settings of a run that may be others each time that it is continued."""

    scaling: ScalingConfig = ScalingConfig()
    cluster: ClusterConfig = ClusterConfig()


class IndexConfig(Settings):
    """The settings of a trace index."""

    store: str | None = setting(
        None, "folder, manifest or key of a token store; the only one in the storage when unset"
    )
    num_workers: PositiveInt = setting(
        2, "tasks at once for which a local cluster has room; the bytes do not depend on it"
    )
    cluster: ClusterConfig = ClusterConfig()
    storage: StorageConfig = StorageConfig()
