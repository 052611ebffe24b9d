"""Owns a local cluster in the background while one job runs there: `python -m
cluster.submission.run_local_job`.

Prints a line once the job is submitted, and is silent from then on. SIGTERM has the job save and
end.
"""

import os
import signal
import sys
from pathlib import Path

from cluster.local.local_cluster import cpus_per_node
from cluster.output.progress import say
from cluster.settings.flags import read_config
from cluster.settings.run import RunConfig
from cluster.stages.stage import connected, run_stage
from cluster.stages.stage_module import exit_on_signal
from raymill.errors import UserError


def main() -> int:
    module, path, job = sys.argv[1:]
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        config = read_config(Path(path), RunConfig)
        with connected(config.cluster, cpus_per_node=cpus_per_node(config)) as connection:
            run_stage(connection, module, config, job=job, when_submitted=_report)
    except (UserError, RuntimeError) as error:
        say(f"error: {error}")
        return 1
    return 0


def _report() -> None:
    """Tells the submitting process, which may be gone afterwards, so what follows goes nowhere."""
    sys.stdout.write("submitted\n")
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
