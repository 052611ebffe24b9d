"""API keys: rereads their files, and decides what a key opens."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NoReturn, assert_never

from cluster.endpoint.endpoint import is_loopback
from cluster.settings.serve import ServeConfig
from raymill.errors import UserError
from serving.api.keys import ApiKey, make_key_file, read_keys
from serving.api.route_facts import Opens, RouteFacts
from serving.protocol.errors import error_of

ADMIN_PATH = "/admin"
RELOAD_S = 2.0
_log = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]


XrayAccess = Literal["off", "admin", "user"]


@dataclass(frozen=True)
class AccessRules:
    """The keys of users and of operators."""

    user_keys: tuple[ApiKey, ...] = ()  # if empty, everybody may come in
    admin_keys: tuple[ApiKey, ...] = ()  # if empty, there is no /admin
    xray: XrayAccess = "user"
    traces: bool = False  # whether texts are traced here, for keys that may see it

    @property
    def names(self) -> set[str]:
        """The names of all keys that may ask the model."""
        asking = self.user_keys + (self.admin_keys if self.xray == "admin" else ())
        return {key.name for key in (*asking, *self.tracing_keys)}

    @property
    def tracing_keys(self) -> tuple[ApiKey, ...]:
        """The keys of either file that may see what the model was trained on."""
        keys = self.user_keys + self.admin_keys if self.traces else ()
        return tuple(key for key in keys if key.may_trace)


def read_rules(config: ServeConfig) -> AccessRules:
    """Reads the key files, and creates missing ones. Raises `UserError` for a file without a key,
    and for a key that is in both."""
    files = [Path(file) if file else None for file in (config.api_key_file, config.admin_key_file)]
    for file in filter(None, files):
        make_key_file(file)
    user, admin = (read_keys(file) if file else () for file in files)
    if both := _hashes(user) & _hashes(admin):
        raise UserError(
            f"{len(both)} of the keys in {config.admin_key_file} are API keys too; an admin key opens /admin only"
        )
    return AccessRules(user, admin, xray_access(config), traces=config.trace is not None)


def xray_access(config: ServeConfig) -> XrayAccess:
    """Returns who may look inside a query."""
    if config.xray == "auto":
        return "user" if is_loopback(config.host) else "admin"
    return config.xray


class CurrentAccess:
    """The rules as the key files have them now, so that keys are added and revoked without a
    restart. A file that cannot be read or has no key changes nothing: it would admit everybody or
    nobody."""

    def __init__(
        self, rules: AccessRules, *, user_file: str | None = None, admin_file: str | None = None
    ) -> None:
        """`rules` apply until the files can be read."""
        self.rules = rules
        self._user_file, self._admin_file = user_file, admin_file
        self._problems: dict[str, str] = {}  # by file

    def reload(self) -> None:
        """Rereads the files, which may block. It reads the few lines each time: a file's
        modification time is too coarse."""
        user = self._reread(self._user_file, self.rules.user_keys, excluded=self.rules.admin_keys)
        admin = self._reread(self._admin_file, self.rules.admin_keys, excluded=user)
        rules = replace(self.rules, user_keys=user, admin_keys=admin)
        if rules != self.rules:
            _log.warning(
                "the API keys have changed: %d for users and %d for admins now",
                len(user),
                len(admin),
            )
            self.rules = rules

    async def keep(self) -> NoReturn:
        while True:
            await asyncio.to_thread(self.reload)
            await asyncio.sleep(RELOAD_S)

    def _reread(
        self, file: str | None, before: tuple[ApiKey, ...], *, excluded: tuple[ApiKey, ...]
    ) -> tuple[ApiKey, ...]:
        """Returns the keys of one file, none of which may be in the other."""
        if file is None:
            return before
        try:
            now = read_keys(Path(file))
            problem = (
                "a key in it is in the other key file too"
                if _hashes(now) & _hashes(excluded)
                else ""
            )
        except (UserError, OSError) as error:
            problem = str(error)
        if problem and problem != self._problems.get(file):
            _log.error(
                "%s: %s. Its keys from before stay valid, and none is added or revoked",
                file,
                problem,
            )
        self._problems[file] = problem
        return before if problem else now


def _hashes(keys: tuple[ApiKey, ...]) -> set[str]:
    return {key.hash for key in keys}


def presented_key(headers: Headers, keys: Sequence[ApiKey]) -> ApiKey | None:
    """Returns the key in the single Authorization header if it is known. Takes the same time for
    any wrong key."""
    values = [value for name, value in headers if name == b"authorization"]
    scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    presented = hashlib.sha256(key.strip()).hexdigest()
    known = [known for known in keys if hmac.compare_digest(presented, known.hash)]
    return known[0] if scheme.lower() == b"bearer" and known else None


def authorize(path: str, facts: RouteFacts, headers: Headers, rules: AccessRules) -> ApiKey | None:
    """Returns a request's key, or None if it needs none. Everything under /admin, also what is no
    route, needs an admin key, which opens nothing else but the inside of a query where only
    operators may look there. What a model was trained on needs a key of either kind with that
    right, also where other routes need none. Raises `ApiError` (401, 403, 404)."""
    key: ApiKey | None
    opens = facts.opens
    if path == ADMIN_PATH or path.startswith(f"{ADMIN_PATH}/"):
        if not rules.admin_keys:
            raise error_of("not_found", path=path[:64])
        key = _admin_key(headers, rules)
    elif opens in (Opens.INSIDE, Opens.INSIDE_PAGE) and rules.xray == "off":
        raise error_of("not_found", path=path[:64])
    elif opens is Opens.TO_TRACERS and rules.traces:
        key = _tracing_key(headers, rules)
    elif opens is Opens.INSIDE and rules.xray == "admin":
        if not rules.admin_keys:
            raise error_of("xray_closed")
        key = _admin_key(headers, rules)
    elif (
        facts.is_read_by_pages
        and rules.xray == "admin"
        and presented_key(headers, rules.admin_keys) is not None
    ):
        key = _admin_key(headers, rules)
    elif opens in (Opens.TO_ALL, Opens.INSIDE_PAGE) or not rules.user_keys:
        return None
    elif (key := presented_key(headers, rules.user_keys)) is None:
        raise error_of("invalid_api_key")
    if key.expires_s is not None and time.time() >= key.expires_s:
        since = datetime.fromtimestamp(key.expires_s, UTC).isoformat(timespec="seconds")
        raise error_of("expired_api_key", name=key.name, since=since)
    return key


def _tracing_key(headers: Headers, rules: AccessRules) -> ApiKey:
    """Returns a request's key that may trace. Raises `ApiError` (401, 403)."""
    key = presented_key(headers, rules.user_keys + rules.admin_keys)
    if key is None:
        raise error_of("invalid_api_key")
    if not key.may_trace:
        raise error_of("trace_right_required")
    return key


def may_look_inside(key: ApiKey | None, rules: AccessRules) -> bool:
    """Whether a request with this key, which `authorize` has returned, may look inside a query, and
    so may ask for a version by its name."""
    match rules.xray:
        case "off":
            return False
        case "user":
            return True
        case "admin":
            return key in rules.admin_keys
        case _:
            assert_never(rules.xray)


def _admin_key(headers: Headers, rules: AccessRules) -> ApiKey:
    """Returns a request's admin key. Raises `ApiError` (401, 403)."""
    if (key := presented_key(headers, rules.admin_keys)) is not None:
        return key
    is_user = presented_key(headers, rules.user_keys) is not None
    raise error_of("admin_key_required") if is_user else error_of("invalid_api_key")
