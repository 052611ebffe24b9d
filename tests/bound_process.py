"""Processes that end with the thread that started them, also where the whole test is killed."""

import os
import signal
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from cluster.storage.process_identity import die_with_parent


def start_bound(
    command: list[str], *, log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a process; `environment` overrides this one's. The kernel sends SIGKILL when the
    calling thread ends."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | (environment or {}),
            start_new_session=True,
            preexec_fn=partial(die_with_parent, signal.SIGKILL),  # noqa: PLW1509 (it says why)
        )
