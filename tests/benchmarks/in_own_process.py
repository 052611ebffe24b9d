"""A process of `bench_gpu`, before it imports PyTorch: its own group, its output in a file."""

import json
import os
from pathlib import Path
from typing import Any


def run_contender(task: dict[str, Any], folder: Path) -> None:
    """Writes `result.json` into the folder; what is printed meanwhile goes into its `log`."""
    os.setpgid(0, 0)  # it is ended with the processes that compile for it
    with (folder / "log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from tests.benchmarks.gpu_contenders import found

    result = found(task)
    part = folder / "result.part"
    part.write_text(json.dumps(result))
    part.rename(folder / "result.json")
