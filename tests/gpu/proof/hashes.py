"""The table of `make proof` for a machine's GPUs: one worker, up to as many as there are cards and
four at least, one of four killed, and a number that changes.

    python -m tests.gpu.proof.hashes cuda|cpu GPUS STEPS

Prints the table and, last, one JSON object. The exit code is 1 if two hashes of raymill's differ.
"""

import json
import sys
import tempfile
from pathlib import Path

from raymill.proof.__main__ import main
from raymill.proof.rows import LEAST_WORKERS, NUM_LANES

_ROWS_ON_CPUS = ("1 worker", "4, one killed, 3")


def table(kind: str, num_gpus: int, num_steps: int) -> int:
    most_workers = min(NUM_LANES, max(LEAST_WORKERS, num_gpus))
    with tempfile.TemporaryDirectory(prefix="raymill-hashes-") as folder:
        file = Path(folder) / "table.json"
        words = ["--device", kind, "--steps", str(num_steps), "--json", str(file)]
        words += ["--most-workers", str(most_workers)]
        if kind == "cpu":
            words += ["--rows", *_ROWS_ON_CPUS]
        exit_code = main(words)
        print(json.dumps(json.loads(file.read_text())))
    return exit_code


if __name__ == "__main__":
    kind, num_gpus, num_steps = sys.argv[1:]
    sys.exit(table(kind, int(num_gpus), int(num_steps)))
