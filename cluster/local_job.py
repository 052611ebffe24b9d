"""Owns a local cluster in the background for as long as one job runs there: `python -m cluster.local_job`.

Says `{"job": NAME}` on standard output once the job is submitted. SIGTERM has the job save and end, and the cluster.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from cluster.config import RunConfig
from cluster.flags import read_config
from cluster.jobs_api import JobsApi, Token
from cluster.local import STOP_WAIT_S
from cluster.stage import connected, cpus_per_node, submit_stage
from model.errors import UserError

_POLL_S = 0.5
_STOP_MARGIN_S = 5.0


def main() -> int:
    module, path, job = sys.argv[1:]
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: asked_to_stop.set())
    try:
        config = read_config(Path(path), RunConfig)
        os.chdir("/")  # the folder goes once the job is submitted
        with connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection:
            assert connection.local is not None, "there is no address among its settings"
            submit_stage(connection, module, config, job=job)
            sys.stdout.write(json.dumps({"job": job}) + "\n")
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever submitted may be gone
            _wait(JobsApi(connection.jobs_url, Token(connection.local.token, "the cluster")), job, asked_to_stop)
    except (UserError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _wait(api: JobsApi, job: str, asked_to_stop: threading.Event) -> None:
    deadline_s = None
    while (found := api.job(job)) is not None and found["status"] in ("PENDING", "RUNNING"):
        if asked_to_stop.is_set() and deadline_s is None:
            api.stop(job)
            deadline_s = time.monotonic() + STOP_WAIT_S + _STOP_MARGIN_S
        if deadline_s is not None and time.monotonic() > deadline_s:
            return
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main())
