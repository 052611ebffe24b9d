"""Tokenizes the corpus of a config file on a fresh one-node cluster and prints the result: a job to be killed."""

import json
import sys
from pathlib import Path

import ray

from cluster.config import RunConfig
from jobs.tokenize_corpus import tokenize

if __name__ == "__main__":
    config_file, num_workers = sys.argv[1:]
    ray.init(
        address="local",
        num_cpus=int(num_workers),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
    )
    print(json.dumps(tokenize(RunConfig.model_validate_json(Path(config_file).read_text()))))
