"""Owns a local cluster in the background while one job runs there: `python -m cluster.submission.run_local_job`.

Prints `{"job": NAME}` once the job is submitted. SIGTERM has the job save and end. A lost head is restarted and so is
the job.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

from cluster.local.local_cluster import STOP_WAIT_S, ClusterError, LocalCluster, cpus_per_node
from cluster.output.progress import say
from cluster.settings.flags import read_config
from cluster.settings.run import RunConfig
from cluster.stages.jobs_api import JobsApi, Token
from cluster.stages.stage import attempt_name, connected, submit_stage
from model.errors import UserError

_POLL_S = 0.5
_STOP_MARGIN_S = 5.0


def main() -> int:
    module, path, job = sys.argv[1:]
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: asked_to_stop.set())
    try:
        config = read_config(Path(path), RunConfig)
        os.chdir("/")  # the folder is removed once the job is submitted
        with connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection:
            submit_stage(connection, module, config, job=job)
            sys.stdout.write(json.dumps({"job": job}) + "\n")
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the submitting process may be gone
            cluster = connection.local
            assert cluster is not None, "its settings name no address"
            attempt = 0
            while not _ended(cluster, attempt_name(job, attempt), asked_to_stop):
                cluster.restart_head()
                attempt += 1
                submit_stage(connection, module, config, job=job, attempt=attempt)
    except (UserError, RuntimeError) as error:
        say(f"error: {error}")
        return 1
    return 0


def _ended(cluster: LocalCluster, name: str, asked_to_stop: threading.Event) -> bool:
    """Waits for the job's end; returns False if the head was lost first, and the job with it."""
    api, deadline_s = JobsApi(cluster.jobs_url, Token(cluster.token, "the cluster")), math.inf
    while time.monotonic() < deadline_s:
        try:
            found = api.job(name)
            if found is None or found["status"] not in ("PENDING", "RUNNING"):
                return True
            if asked_to_stop.is_set() and deadline_s == math.inf:
                api.stop(name)
                deadline_s = time.monotonic() + STOP_WAIT_S + _STOP_MARGIN_S
        except ClusterError:  # a head that is only slow answers the next time
            if cluster.lost_head():
                return asked_to_stop.is_set()
        time.sleep(_POLL_S)
    return True


if __name__ == "__main__":
    sys.exit(main())
