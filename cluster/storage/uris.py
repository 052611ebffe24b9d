"""Storages by URI: a path, file://, s3://bucket/prefix or hf://… (cluster/storage/hub.py)."""

import glob
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cluster.storage.folder import LocalStorage
from cluster.storage.interface import (  # noqa: F401 (also for those who open storages)
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

_MAX_LINKS = 40  # in a path, as for the kernel
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")
_FEW_SLASHES = re.compile(r"(s3|hf|file):(?!//)")
_ROOT = re.compile(r"s3://[^/]+|hf://(datasets/)?[^/]+/[^/]+")
"""Matches a bucket or a whole repository of the Hub, which has no folder above it."""


def open_storage(uri: str) -> Storage:
    """Returns the storage rooted at a path or URI. Touches neither disk nor network."""
    # Their libraries take 0.2 s to import, which every worker that reads local files would pay.
    if uri.startswith("s3://"):
        _require_bucket(uri)
        from cluster.storage.s3 import S3Storage  # noqa: PLC0415

        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return S3Storage(bucket=bucket, prefix=prefix.strip("/"))
    return _hub(uri) if uri.startswith(HF) else LocalStorage(_local_path(uri))


def _hub(uri: str) -> "HubStorage":
    from cluster.storage.hub import HubStorage  # noqa: PLC0415

    return HubStorage.at(uri)


def absolute_uri(uri: str) -> str:
    """Returns a plain absolute path for a local location, and a Hub URI with its revision."""
    if uri.startswith(HF):
        return _hub(uri).uri
    if uri.startswith("s3://"):
        _require_bucket(uri)
        return uri.rstrip("/")
    return str(_local_path(uri))


def _require_bucket(uri: str) -> None:
    if not uri.removeprefix("s3://").partition("/")[0]:
        raise StorageError(f"{uri!r} names no bucket: expected s3://BUCKET or s3://BUCKET/PREFIX")


def place_of(uri: str) -> str:
    """Returns one text for all the ways to write a location: the real path of one on this machine,
    through all links, and for one on the Hub the same at each revision."""
    return places_to(uri)[-1]


def places_to(uri: str) -> list[str]:
    """Returns the place of each folder on the way to a location, also of those through which only
    links lead, and at the end its own. Without any of them the location is gone."""
    if uri.startswith(HF):
        return _with_parents(replace(_hub(uri), revision="main").uri)
    whole = absolute_uri(uri)
    return _with_parents(open_storage(whole).uri) if "://" in whole else _walked(whole)


def _with_parents(uri: str) -> list[str]:
    scheme, _, path = uri.partition("://")
    names = path.split("/")
    return [f"{scheme}://{'/'.join(names[: depth + 1])}" for depth in range(len(names))]


def _walked(path: str) -> list[str]:
    """Returns the real folders that the kernel enters on its way to a path, which need not exist,
    and where it arrives."""
    here, num_links = Path("/"), 0
    names, places = [*reversed(Path(path).parts)], list[str]()
    while names:
        match names.pop():
            case "/" | "//":
                step = Path("/")
            case "..":
                step = here.parent
            case name:
                step = here / name
        target = _target(step)
        if target is None or num_links == _MAX_LINKS:
            here = step
            places.append(str(here))
        else:
            names += reversed(target.parts)
            num_links += 1
    return places


def _target(path: Path) -> Path | None:
    """Returns where a link leads; None for anything else, and for nothing."""
    try:
        return path.readlink()
    except OSError:
        return None


def pinned(uri: str) -> tuple[str, str]:
    """Returns a location whose bytes stay the same, and its commit, by asking the Hub for a
    branch's or tag's commit; other locations unchanged, with "" as the commit."""
    if not uri.startswith(HF):
        return uri, ""
    storage = _hub(uri).pinned()
    return storage.uri, storage.revision


def split_uri(uri: str) -> tuple[Storage, str]:
    """Returns the storage of a file's folder, and the file's key in it: empty for a bucket or a
    whole repository."""
    whole = absolute_uri(uri)
    if _ROOT.fullmatch(whole):
        return open_storage(whole), ""
    folder, _, name = whole.rpartition("/")
    return open_storage(folder or "/"), name


def glob_uris(pattern: str, *, names_others: bool = False) -> Iterator[Entry]:
    """Finds the files that a location names, with absolute URIs as keys, in the order of their
    paths.

    A location is a file, a folder (everything below it), or a pattern in which `*`, `?` and `[...]`
    stay within one path component and `**` crosses them. Links to folders are not followed; with
    `names_others` those below which files might match are entries too, whose keys end with a slash,
    and so is what matches and holds no bytes. Raises `NotFoundError` if nothing matches.
    """
    uri = absolute_uri(pattern)
    storage, name = split_uri(uri)
    if name and (entry := storage.stat(name)):
        return iter([replace(entry, key=uri)])
    folder = open_storage(uri)
    entries = (
        folder.walk(names_others=names_others)
        if isinstance(folder, LocalStorage)
        else folder.entries()
    )
    matches = _matches(uri, names_others=names_others) if glob.has_magic(uri) else iter(())
    for found in (_below(uri, entries), matches):
        if first := next(found, None):
            return chain([first], found)
    raise NotFoundError(f"nothing is at {uri!r}; check the path or pattern")


def _below(folder: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    return (
        Entry(join_uri(folder, entry.key), entry.size, entry.version, entry.has_bytes)
        for entry in entries
    )


def _matches(pattern: str, *, names_others: bool) -> Iterator[Entry]:
    literal = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    folder = literal.rpartition("/")[0] or "/"
    storage = open_storage(folder)
    if isinstance(storage, LocalStorage):
        # Without `**` no match lies deeper than the pattern: `~/*.txt` does not walk a whole home
        # folder.
        depth = None if "**" in pattern else pattern.removeprefix(folder).lstrip("/").count("/")
        entries = storage.walk(max_depth=depth, names_others=names_others)
    else:
        entries = storage.entries(literal.rpartition("/")[2])
    regex = re.compile(_pattern_regex(pattern), re.DOTALL)
    return (
        entry
        for entry in _below(folder, entries)
        if (
            _may_hold(pattern, entry.key) if entry.key.endswith("/") else regex.fullmatch(entry.key)
        )
    )


def _may_hold(pattern: str, folder: str) -> bool:
    """Says whether the pattern may match what lies below a folder, whose path ends with a slash."""
    parts, names = pattern.split("/"), folder.rstrip("/").split("/")
    for part, name in zip(parts, names, strict=False):
        if "**" in part:
            return True
        if not re.fullmatch(_pattern_regex(part), name, re.DOTALL):
            return False
    return len(names) < len(parts)


def _pattern_regex(pattern: str) -> str:
    """Returns the regex of a pattern, the same for all storages, as `glob.translate` in Python 3.13
    gives it."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    is_class = re.compile(r"\[[^]]+\]").fullmatch
    return "".join(
        wild.get(part) or (part.replace("[!", "[^", 1) if is_class(part) else re.escape(part))
        for part in parts
    )


def _local_path(uri: str) -> Path:
    path = uri
    if "://" in uri:
        parts = urlsplit(uri)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            shown = uri.rpartition("@")[2]
            raise StorageError(
                f"cannot open {shown!r}: expected a path, file:///absolute/path, "
                "s3://bucket/prefix, hf://owner/name or hf://datasets/owner/name"
            )
        path = unquote(parts.path)
    elif few := _FEW_SLASHES.match(uri):
        raise StorageError(f"{uri!r} is no path: expected {few[0]}//…, with two slashes")
    elif _WINDOWS.match(uri):
        raise StorageError(
            f"{uri!r} is a path of Windows: expected one of Linux, such as /mnt/{uri[0].lower()}/… under WSL"
        )
    # `Path.resolve` would follow symbolic links, and `Path.expanduser` refuses a file such as
    # ~t.txt.
    return Path(os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111


def storage_flag(uri: str) -> str:
    """Returns the flag by which a command that is typed here finds the storage; empty for the
    default one."""
    is_default = absolute_uri(uri) == absolute_uri(".raymill")
    return "" if is_default else f" --storage.uri {shlex.quote(uri)}"
