"""Bytes by URI: a path, file://, s3://bucket/prefix or hf://datasets/owner/name, behind the one `Storage` interface."""

import glob
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cluster.storage.folder import LocalStorage
from cluster.storage.interface import (
    HF,
    AlreadyExistsError,
    ConflictError,
    Entry,
    NotFoundError,
    Storage,
    StorageError,
    join_uri,
)

if TYPE_CHECKING:
    from cluster.storage.hub import HubStorage

__all__ = [
    "AlreadyExistsError",
    "ConflictError",
    "Entry",
    "NotFoundError",
    "Storage",
    "StorageError",
    "absolute_uri",
    "glob_uris",
    "join_uri",
    "open_storage",
    "pinned",
    "split_uri",
]

_ROOT = re.compile(r"s3://[^/]+|hf://[^/]+/[^/]+/[^/]+")
"""Has no folder above it, unlike what lies below."""


def open_storage(uri: str) -> Storage:
    """The storage rooted at a path or URI. Touches neither disk nor network."""
    # Their libraries take 0.2 s to import, which every worker that reads local files would pay.
    if uri.startswith("s3://"):
        from cluster.storage.s3 import S3Storage  # noqa: PLC0415

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return S3Storage(bucket=bucket, prefix=prefix.strip("/"))
    return _hub(uri) if uri.startswith(HF) else LocalStorage(_local_path(uri))


def _hub(uri: str) -> "HubStorage":
    from cluster.storage.hub import HubStorage  # noqa: PLC0415

    return HubStorage.at(uri)


def absolute_uri(uri: str) -> str:
    """A plain absolute path for anything local, the URI itself for S3, with the revision for the Hub."""
    if uri.startswith(HF):
        return _hub(uri).uri
    return uri.rstrip("/") if uri.startswith("s3://") else str(_local_path(uri))


def pinned(uri: str) -> tuple[str, str]:
    """A location whose bytes stay the same, and its commit: asks the Hub for the commit that a branch or tag is now.

    Other locations come back unchanged, with "" as the commit.
    """
    if not uri.startswith(HF):
        return uri, ""
    storage = _hub(uri).pinned()
    return storage.uri, storage.revision


def split_uri(uri: str) -> tuple[Storage, str]:
    """The storage of a file's folder, and the file's key in it, which is empty for a bucket or a whole dataset."""
    whole = absolute_uri(uri)
    if _ROOT.fullmatch(whole):
        return open_storage(whole), ""
    folder, _, name = whole.rpartition("/")
    return open_storage(folder or "/"), name


def glob_uris(pattern: str) -> list[Entry]:
    """The files that a location names, with absolute URIs as keys, in the order of their paths.

    A location is a file, a folder (everything below it), or a pattern in which `*`, `?` and `[...]` stay
    within one path component and `**` crosses them. Raises `NotFoundError` when nothing matches.
    """
    uri = absolute_uri(pattern)
    storage, name = split_uri(uri)
    if name and (entry := storage.stat(name)):
        return [Entry(uri, entry.size, entry.version)]
    found = _below(uri, open_storage(uri).list()) or (_matches(uri) if glob.has_magic(uri) else [])
    if not found:
        raise NotFoundError(f"nothing is at {pattern!r} (looked for {uri}); check the path or pattern")
    return found


def _below(folder: str, entries: list[Entry]) -> list[Entry]:
    return [Entry(join_uri(folder, entry.key), entry.size, entry.version) for entry in entries]


def _matches(pattern: str) -> list[Entry]:
    literal = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    folder = literal.rpartition("/")[0] or "/"
    storage = open_storage(folder)
    if isinstance(storage, LocalStorage):
        # Without `**` no match lies deeper than the pattern: `~/*.txt` does not walk a whole home folder.
        depth = None if "**" in pattern else pattern.removeprefix(folder).lstrip("/").count("/")
        entries = storage.walk(max_depth=depth)
    else:
        entries = storage.list(literal.rpartition("/")[2])
    regex = re.compile(_pattern_regex(pattern))
    return [entry for entry in _below(folder, entries) if regex.fullmatch(entry.key)]


def _pattern_regex(pattern: str) -> str:
    """One meaning of patterns for all storages, the one of `glob.translate` in Python 3.13."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    return "".join(wild.get(part) or _class_or_literal(part) for part in parts)


def _class_or_literal(part: str) -> str:
    return part.replace("[!", "[^", 1) if re.fullmatch(r"\[[^]]+\]", part) else re.escape(part)


def _local_path(uri: str) -> Path:
    path = uri
    if "://" in uri:
        parts = urlsplit(uri)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            shown = uri.rpartition("@")[2]
            raise StorageError(
                f"cannot open {shown!r}: expected a path, file:///absolute/path, "
                "s3://bucket/prefix or hf://datasets/owner/name"
            )
        path = unquote(parts.path)
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 (`resolve` would follow symbolic links)
