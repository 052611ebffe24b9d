"""Forgets an endpoint that has ended, for which the storage keeps the checkpoints that it served and
would return to."""

import ipaddress
from contextlib import suppress
from typing import Any

import httpx

from cluster.endpoint.endpoint import url_of
from cluster.output.result_text import date_of
from cluster.storage.registry import endpoint_files, served_by
from cluster.storage.uris import Storage, StorageError, join_uri
from raymill.errors import UserError

_ANSWER_S = 3.0


def forget(storage: Storage, name: str, *, yes: bool) -> dict[str, Any]:
    """Removes what the storage remembers of an endpoint if `yes`, and returns what that is: its
    orders stay. Raises `UserError` for an unknown one, and for one that answers."""
    known = endpoint_files(storage)
    if name not in known:
        names = ", ".join(known) or "none"
        raise UserError(
            f"no endpoint {name!r} is remembered in {storage.uri}; those that are: {names}"
        )
    url = _url_of(name)
    if url is not None and _answers(url):
        raise UserError(
            f"endpoint {name} stays: something answers at {url}. End that first; if it is another program, remove "
            f"{join_uri(storage.uri, known[name][0])}"
        )
    pinned: list[str] | None = None
    with suppress(StorageError):  # a damaged file, which may be why it is to be forgotten
        pinned = served_by(storage, name)
    told = {
        "endpoint": name,
        "files": [join_uri(storage.uri, key) for key in known[name]],
        "written": _written(storage, known[name][0]),
        "checked": url is not None,
        "kept_for_it": pinned,
    }
    for key in known[name] if yes else ():
        storage.delete(key)
    return told | {"forgotten": yes}


def _url_of(name: str) -> str | None:
    """Returns the address of an endpoint that is called by it, as it is without
    `delivery.endpoint`; None for any other."""
    host, _, port = name.rpartition("-")
    with suppress(ValueError):
        return url_of(str(ipaddress.ip_address(host)), int(port))
    return url_of(host, int(port)) if host == "localhost" and port.isdecimal() else None


def _answers(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=_ANSWER_S, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def _written(storage: Storage, key: str) -> str | None:
    """Returns when a file of this machine was written; None for any other."""
    path = storage.local_path(key)
    return None if path is None else date_of(path.stat().st_mtime)
