"""A bounded cache of remote checkpoints on this machine, for serving, evaluating and exporting
them.

A copy has what a model needs to compute, and never the training state, which is twice as large. The
processes of a machine share the cache:

- One process fetches at a time (`flock`): of replicas that start together one fetches, and the others find the copy. A
  copy appears by a rename, never half.
- Before fetching it makes room: the least recently used copies go, except those that are held. A replica holds the
  checkpoints that its delivery knows (live, candidate, previous) before it loads them, by a shared `flock` for each,
  which ends with its process.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from cluster.storage.interface import Entries
from cluster.storage.uris import NotFoundError, Storage, open_storage

# Half of the scratch space that the manifests give a pod; what is held may exceed it
MAX_BYTES = 8 << 30
MAX_COPIES = 4  # the three that a delivery knows, and one to look at
NEEDED = re.compile(
    r"manifest\.json|config\.json|raymill\.json|tokenizer\.json|tokenizer_config\.json|vocab\.json|merges\.txt"
    r"|chat_template\.jinja|model((-shard)?-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter_config\.json|adapter_model\.safetensors|(model|training)\.sig"
)
"""Files that are copied, of raymill's checkpoints and of folders that transformers saved."""

_log = logging.getLogger(__name__)


def fetch(storage: Storage) -> Path:
    """Returns a folder with the files of the checkpoint at a remote storage's root, fetched if
    there is no copy yet or a file has changed. Raises `StorageError`."""
    files = [entry for entry in storage.list() if NEEDED.fullmatch(entry.key)]
    if not files:
        raise NotFoundError(
            f"{storage.uri} is empty or does not exist, or holds no checkpoint; check the location"
        )
    versions = repr([(entry.key, entry.version) for entry in files])
    copy = (
        _cache("checkpoints")
        / f"{_name(storage.uri)}--{hashlib.sha256(versions.encode()).hexdigest()[:32]}"
    )
    if not _is_usable(copy, files):
        with _locked("lock", fcntl.LOCK_EX):
            if not _is_usable(copy, files):
                _make_room(sum(entry.size for entry in files))
                partial = _cache("checkpoint-fetch") / "partial"
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
                partial.mkdir(parents=True)
                for entry in files:
                    storage.download_file(entry.key, partial / entry.key)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(copy, ignore_errors=True)  # a damaged one
                partial.rename(copy)
    return copy


def is_left_behind(name: str) -> bool:
    """Tells whether a copy is without a file of the checkpoint."""
    return NEEDED.fullmatch(name) is None


def discard(copy: Path) -> None:
    """Removes a damaged copy, so that it is fetched again."""
    with _locked("lock", fcntl.LOCK_EX):
        shutil.rmtree(copy, ignore_errors=True)


class Holds:
    """The checkpoints whose copies must stay while this process lives and needs them."""

    def __init__(self) -> None:
        self._locks: dict[str, TextIO] = {}  # by URI

    def keep(self, uris: Collection[str]) -> None:
        """Holds these checkpoints, which need not be here yet, and no others."""
        for uri in self._locks.keys() - set(uris):
            self._locks.pop(uri).close()
        for uri in uris:
            storage = open_storage(uri)
            if uri not in self._locks and storage.local_path("") is None:
                self._locks[uri] = _locked(f"held/{_name(storage.uri)}", fcntl.LOCK_SH)


def _make_room(num_bytes: int) -> None:
    """Makes room for a copy of that size; called only by the process that fetches."""
    folder = _cache("checkpoints")
    copies = (
        sorted((path.stat().st_mtime_ns, path) for path in folder.iterdir())
        if folder.is_dir()
        else []
    )
    sizes = {
        copy: sum(file.stat().st_size for file in copy.rglob("*") if file.is_file())
        for _, copy in copies
    }
    for copy, size in list(sizes.items()):
        if len(sizes) < MAX_COPIES and sum(sizes.values()) + num_bytes <= MAX_BYTES:
            return
        if _evicted(copy):
            _log.info("%s was removed, %d bytes, to make room", copy, size)
            del sizes[copy]


def _evicted(copy: Path) -> bool:
    """Removes a copy that no process holds, by a rename first: no replica waits for files to be
    removed."""
    evicted = _cache("checkpoint-fetch") / "evicted"
    shutil.rmtree(evicted, ignore_errors=True)  # left by a killed process
    try:
        with _locked(f"held/{copy.name.rpartition('--')[0]}", fcntl.LOCK_EX | fcntl.LOCK_NB):
            copy.rename(evicted)
    except BlockingIOError:
        return False
    shutil.rmtree(evicted)
    return True


def _is_usable(copy: Path, files: Entries) -> bool:
    """Says whether the copy has all its files, and marks it as used now."""
    if not all((copy / entry.key).is_file() for entry in files):
        return False
    with suppress(FileNotFoundError):
        os.utime(copy)
        return True
    return False


def _name(uri: str) -> str:
    return re.sub(r"^\w+://", "", uri).replace("/", "--")


def _cache(name: str) -> Path:
    return Path.home() / ".cache" / "raymill" / name


def _locked(name: str, how: int) -> TextIO:
    """Returns an open lock file, which is locked until it is closed; it stays, as others may wait
    for it."""
    path = _cache("checkpoint-fetch") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    fcntl.flock(file, how)
    return file
