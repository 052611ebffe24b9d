"""What only the jobs know before one is spent: the memory that a worker takes, and whether the run's settings are still
those that it was begun with.

python -m jobs.admission RUN.yaml
"""

import sys
from pathlib import Path
from typing import Any, get_args

from cluster.config import RunConfig, planned_vocabulary, with_precision
from cluster.flags import read_config
from cluster.parser import Parser
from cluster.stage_module import print_result
from jobs.memory_plan import gpu_memory, layout_of
from jobs.run_history import why_not_resumed
from jobs.run_plan import run_storage
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


def main() -> int:
    def run() -> dict[str, Any]:
        parser = Parser(prog="python -m jobs.admission", description=__doc__)
        parser.add_argument("run", type=Path, help="YAML file with the run's settings")
        return admission(read_config(parser.parse_args().run, RunConfig))

    return print_result(run)


if __name__ == "__main__":
    sys.exit(main())
