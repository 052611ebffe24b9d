"""Notes incidents in storage at once, for the next attempt to write into the ledger, which has one
writer.

A worker that was killed can write nothing, and the process that killed it or saw it die must not
write into the ledger.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.storage.uris import Storage, StorageError
from jobs.run.ledger import LedgerWriter, Line
from jobs.workers.failures import Kind
from raymill.errors import UserError

INCIDENTS = "incidents"


def note(run: Storage, event: str, **fields: Any) -> None:
    line = {"event": event, "time": round(time.time(), 3), **fields}
    run.write_bytes(
        f"{INCIDENTS}/{time.time_ns()}-{secrets.token_hex(4)}.json", json.dumps(line).encode()
    )


@contextmanager
def noting_user_errors(run: Storage, *, rank: int) -> Iterator[None]:
    """Notes errors that the user can fix, by their own message; lost leases and outages concern
    this process alone."""
    try:
        yield
    except StorageError:
        raise
    except UserError as error:
        note(run, "failure", rank=rank, kind=Kind.USER_ERROR, reason=str(error))
        raise


def write_down(run: Storage, ledger: LedgerWriter) -> None:
    """Moves all notes into the ledger, in the order in which they came; a crash may leave a line
    there twice."""
    folder = run.child(INCIDENTS)
    keys = sorted(entry.key for entry in folder.list())
    for key in keys:
        line: Line = json.loads(folder.read_bytes(key))
        ledger.event(line.pop("event"), **line)
    for key in keys:
        folder.delete(key)
