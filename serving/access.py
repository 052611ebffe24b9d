"""API keys: the files that hold them, what a key opens, and how many requests of one key run at once."""

import hashlib
import hmac
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from serving.errors import forbidden, not_found, too_many_requests, unauthorized
from serving.page_routes import PAGE_PATHS

OPEN_PATHS = ("/health", "/ready", *PAGE_PATHS)  # for probes and navigation, which have no key
ADMIN_PATH = "/admin"

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class AccessRules:
    """Whose keys open what. Keys are known by their SHA-256 only."""

    user_key_hashes: tuple[str, ...] = ()  # none lets everybody in
    admin_key_hashes: tuple[str, ...] = ()  # none: nothing under /admin exists
    max_requests_per_key: int | None = None


def read_key_hashes(path: Path) -> tuple[str, ...]:
    """SHA-256 of each key in the file, one key a line; the file is made with a fresh key where it is missing. Only
    the hashes are handed to replicas, so that no key stands in the cluster's state or logs."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"sk-{secrets.token_urlsafe(32)}\n")
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise UserError(f"the API key file {path} is empty: write one key a line, or delete it to have one made")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def presented_key(headers: Headers, key_hashes: Sequence[str]) -> str | None:
    """The hash of the key in the one Authorization header, if it is known. Takes the same time for any wrong key."""
    values = [value for name, value in headers if name == b"authorization"]
    scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    presented = hashlib.sha256(key.strip()).hexdigest()
    known = [hmac.compare_digest(presented, key_hash) for key_hash in key_hashes]
    return presented if scheme.lower() == b"bearer" and any(known) else None


def authorize(path: str, headers: Headers, rules: AccessRules) -> str | None:
    """The hash of the key that a request came with, or None where it needed none. Everything under /admin needs an
    admin key, also what is routed there later; such a key opens nothing else. Raises `ApiError` (401, 403, 404)."""
    if path == ADMIN_PATH or path.startswith(f"{ADMIN_PATH}/"):
        if not rules.admin_key_hashes:
            raise not_found(path)
        if (key := presented_key(headers, rules.admin_key_hashes)) is None:
            raise forbidden() if presented_key(headers, rules.user_key_hashes) else unauthorized()
        return key
    if path in OPEN_PATHS or not rules.user_key_hashes:
        return None
    if (key := presented_key(headers, rules.user_key_hashes)) is None:
        raise unauthorized()
    return key


class RequestsInFlight:
    """Counts the running requests of each key."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._running: Counter[str] = Counter()

    @contextmanager
    def of(self, key: str | None) -> Iterator[None]:
        """One more while the context lasts; of nobody when `key` is None. Raises `ApiError` (429) at the limit."""
        if key is None or self._limit is None:
            yield
            return
        if self._running[key] >= self._limit:
            raise too_many_requests(self._limit)
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1
