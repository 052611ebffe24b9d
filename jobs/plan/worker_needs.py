"""What only the jobs know before one is spent: the memory that a worker takes, and whether the run's settings are still
those that it was begun with.
"""

from typing import Any, get_args

from cluster.settings.run import RunConfig, planned_vocabulary, with_precision
from jobs.plan.memory import gpu_memory, layout_of
from jobs.run.history import why_not_resumed
from jobs.run.run_plan import run_storage
from model.processor import Precision

_PROCESS_BYTES = 0.5e9
"""Python, PyTorch and Ray of a worker that trains a tiny model (measured: 0.4 to 0.5 GB)."""


def admission(config: RunConfig) -> dict[str, Any]:
    """`worker_bytes` of a node's memory, `device_bytes` of a GPU's, and `problems` in words."""
    planned, scaling = planned_vocabulary(config), config.scaling
    layout = layout_of(planned.model)
    # Precision `auto` is settled where the workers run: room for either.
    either = [with_precision(planned, precision) for precision in get_args(Precision)]
    sharded = config.train.shard_optimizer
    training = max(
        sum(gpu_memory(run, layout, world_size=scaling.min_workers, shard_optimizer=sharded).values()) for run in either
    )
    on_device = training if scaling.use_gpu else 0.0
    return {
        "worker_bytes": round(_PROCESS_BYTES + training - on_device),
        "device_bytes": round(on_device),
        "problems": [reason] if (reason := why_not_resumed(run_storage(config), config)) else [],
    }
