"""Trains runs one after the other on the cluster at RAY_ADDRESS, all driven by this process, which starts Ray once.

    python -m tests.e2e.train_in_turn CONFIG.yaml …

Prints a line of JSON for each, with its result.
"""

import json
import logging
import sys
from pathlib import Path

import ray

from cluster.settings.flags import read_config
from cluster.settings.run import RunConfig
from jobs.pretrain import pretrain
from tests.repository import REPOSITORY

if __name__ == "__main__":
    ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}})
    for path in sys.argv[1:]:
        print(json.dumps(pretrain(read_config(Path(path), RunConfig))), flush=True)
