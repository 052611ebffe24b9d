"""API keys: reads and rereads their files, decides what a key opens, and counts the running requests of each."""

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cluster.settings.serve import ServeConfig
from model.errors import UserError
from serving.protocol.errors import ApiError, not_found, unauthorized
from serving.xray.page_routes import PAGE_PATHS

OPEN_PATHS = ("/health", "/ready", *PAGE_PATHS)  # for probes and navigation, which have no key
ADMIN_PATH = "/admin"
RELOAD_S = 2.0
_log = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class AccessRules:
    """The keys of users and of operators. Only their SHA-256 is kept."""

    user_key_hashes: tuple[str, ...] = ()  # if empty, everybody may come in
    admin_key_hashes: tuple[str, ...] = ()  # if empty, there is no /admin
    max_requests_per_key: int | None = None


def make_key_file(path: Path) -> None:
    """Writes a file with a fresh key if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"sk-{secrets.token_urlsafe(32)}\n")


def read_key_hashes(path: Path) -> tuple[str, ...]:
    """Returns the SHA-256 of each key in the file, one key a line. Replicas get only these hashes, so that no key is in
    the cluster's state or logs."""
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise UserError(
            f"the API key file {path} is empty: write one key on each line, or delete the file to have one created"
        )
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def read_rules(config: ServeConfig) -> AccessRules:
    """Reads the key files, and creates those that are missing. Raises `UserError` for a file without a key, and for a
    key that is in both."""
    for file in (config.api_key_file, config.admin_key_file):
        if file is not None:
            make_key_file(Path(file))
    user = read_key_hashes(Path(config.api_key_file)) if config.api_key_file else ()
    admin = read_key_hashes(Path(config.admin_key_file)) if config.admin_key_file else ()
    if both := set(user) & set(admin):
        raise UserError(
            f"{len(both)} of the keys in {config.admin_key_file} are API keys too; an admin key opens /admin only"
        )
    return AccessRules(user, admin, config.replicas.max_requests_per_key)


class CurrentAccess:
    """The rules as the key files have them now, so that keys are added and revoked without a restart. A file that
    cannot be read or has no key changes nothing: it would admit everybody or nobody."""

    def __init__(self, rules: AccessRules, *, user_file: str | None = None, admin_file: str | None = None) -> None:
        """`rules` apply until the files can be read."""
        self.rules = rules
        self._user_file, self._admin_file = user_file, admin_file
        self._problems: dict[str, str] = {}  # by file

    def reload(self) -> None:
        """Rereads the files, which may block. It reads the few lines each time: a file's modification time is too
        coarse."""
        user = self._reread(self._user_file, self.rules.user_key_hashes, excluded=self.rules.admin_key_hashes)
        admin = self._reread(self._admin_file, self.rules.admin_key_hashes, excluded=user)
        rules = AccessRules(user, admin, self.rules.max_requests_per_key)
        if rules != self.rules:
            _log.warning("the API keys have changed: %d for users and %d for admins now", len(user), len(admin))
            self.rules = rules

    async def keep(self, *, every_s: float = RELOAD_S) -> NoReturn:
        while True:
            await asyncio.to_thread(self.reload)
            await asyncio.sleep(every_s)

    def _reread(self, file: str | None, before: tuple[str, ...], *, excluded: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the keys of one file, none of which may be in the other."""
        if file is None:
            return before
        try:
            now = read_key_hashes(Path(file))
            problem = "a key in it is in the other key file too" if set(now) & set(excluded) else ""
        except (UserError, OSError, ValueError) as error:
            problem = str(error)
        if problem and problem != self._problems.get(file):
            _log.error("%s: %s. Its keys from before stay valid, and none is added or revoked", file, problem)
        self._problems[file] = problem
        return before if problem else now


def presented_key(headers: Headers, key_hashes: Sequence[str]) -> str | None:
    """Returns the hash of the key in the single Authorization header if it is known. Takes the same time for any wrong
    key."""
    values = [value for name, value in headers if name == b"authorization"]
    scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    presented = hashlib.sha256(key.strip()).hexdigest()
    known = [hmac.compare_digest(presented, key_hash) for key_hash in key_hashes]
    return presented if scheme.lower() == b"bearer" and any(known) else None


def authorize(path: str, headers: Headers, rules: AccessRules) -> str | None:
    """Returns the hash of a request's key, or None if it needs none. Everything under /admin, also routes that are
    added later, needs an admin key, which opens nothing else. Raises `ApiError` (401, 403, 404)."""
    if path == ADMIN_PATH or path.startswith(f"{ADMIN_PATH}/"):
        if not rules.admin_key_hashes:
            raise not_found(path)
        if (key := presented_key(headers, rules.admin_key_hashes)) is None:
            if presented_key(headers, rules.user_key_hashes) is None:
                raise unauthorized()
            message = "This key does not open /admin; use a key of admin_key_file."
            raise ApiError(403, message, code="admin_key_required")
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
        """Counts one more request of `key` during the context; None is not counted. Raises `ApiError` (429) at the
        limit."""
        if key is None or self._limit is None:
            yield
            return
        if self._running[key] >= self._limit:
            message = f"This key has its limit of {self._limit} requests in flight; wait for one to end"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self._running[key] += 1
        try:
            yield
        finally:
            self._running[key] -= 1
