"""Tokenizes the corpus of a config file on a fresh one-node cluster and prints the result: a job to
be killed."""

import json
import sys
from pathlib import Path

from cluster.settings.run import RunConfig
from jobs.tokens.build_store import tokenize
from tests.local_ray import local_ray

if __name__ == "__main__":
    config_file, num_workers = sys.argv[1:]
    with local_ray(num_cpus=int(num_workers)):
        print(json.dumps(tokenize(RunConfig.model_validate_json(Path(config_file).read_text()))))
