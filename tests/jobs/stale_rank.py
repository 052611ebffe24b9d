"""Trains a tiny run as rank 0, from a pickled plan: `python -m tests.jobs.stale_rank PLAN`."""

import pickle
import sys
from pathlib import Path

from cluster.storage.lease import LeaseLostError
from jobs.training.train_loop import train

if __name__ == "__main__":
    try:
        train(pickle.loads(Path(sys.argv[1]).read_bytes()), rank=0, world_size=1)
    except LeaseLostError as error:
        print(f"lost: {error}", flush=True)
