"""Decides which attempt may write for a run: each takes the next number, and one that finds a newer
number stops.

Nothing waits: a rank that hangs, or that is cut off from the others but not from the storage, is
overtaken at once, and finds that out by the check before it publishes. Attempts belong to a
launcher; those of an older one are refused.
"""

import json
import os
import socket
from typing import Any

from cluster.storage.lease import LeaseLostError, read_with_version
from cluster.storage.uris import AlreadyExistsError, ConflictError, Storage, StorageError, join_uri
from model.files.failpoints import failpoint

WRITER = "WRITER"


class Fence:
    """The right to write for a run, until another writer takes the next number."""

    def __init__(self, run: Storage, *, launcher: int | None) -> None:
        """Takes the next number for an attempt of `launcher`, or for a new launcher if that is
        None.

        Raises `LeaseLostError` when a newer launcher writes this run, `StorageError` in an outage.
        """
        self._run = run
        self._uri = join_uri(run.uri, WRITER)
        while True:
            writer, version = self._read()
            before = writer["launcher"]
            if launcher is not None and before > launcher:
                raise LeaseLostError(
                    f"{self._uri}: launcher {before} on {writer['host']} took this run over from launcher {launcher}, "
                    "which writes nothing more; wait until the other ends"
                )
            self.generation: int = writer["generation"] + 1
            content = {
                "generation": self.generation,  # grows by one with each attempt and each launcher
                "launcher": self.generation if launcher is None else launcher,
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            try:
                data = json.dumps(content).encode()
                self._version = run.write_bytes(
                    WRITER, data, if_absent=version is None, if_version=version
                )
                break
            except (AlreadyExistsError, ConflictError):
                continue  # another writer was faster, or the answer to our own write was lost
        failpoint("after_lease")

    def check(self) -> None:
        """Raises `LeaseLostError` when a newer writer is there, `StorageError` in an outage."""
        entry = self._run.stat(WRITER)
        if entry is None or entry.version != self._version:
            writer = self._read()[0]
            raise LeaseLostError(
                f"{self._uri}: writer {self.generation} was replaced by writer {writer['generation']}, process "
                f"{writer['pid']} on {writer['host']}; this one, {os.getpid()}, writes nothing more"
            )

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """Returns the newest writer and its version; number 0 and None where there was none."""
        content, version = read_with_version(self._run, WRITER)
        if version is None:
            return {"generation": 0, "launcher": 0, "host": "an unknown host", "pid": 0}, None
        try:
            return dict(json.loads(content)), version
        except ValueError as error:
            raise StorageError(
                f"{self._uri} is damaged; once no process writes the run, delete it"
            ) from error
