"""Runs the tokenize stage of a config file with so many workers on a cluster of its own, between
two lines of input."""

import json
import sys
from pathlib import Path

from cluster.settings.run import RunConfig
from jobs.tokens.build_store import tokenize
from tests.local_ray import local_ray

if __name__ == "__main__":
    with local_ray(num_cpus=int(sys.argv[2]), object_store_memory=256 << 20):
        config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(tokenize(config)), flush=True)
        sys.stdin.readline()  # the processes' figures are read while they live
