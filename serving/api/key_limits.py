"""Refuses what exceeds a key's limits: requests in flight, tokens, and invalid bodies, on all
replicas together."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request

from serving.api.key_metrics import KeyMetrics, KeyRefusal
from serving.api.keys import ApiKey
from serving.delivery.follower import POLL_S
from serving.limits.asker import Asker
from serving.limits.key_usage import KeyUsage
from serving.limits.token_bucket import Quota
from serving.limits.usage_report import Account, QuotaKind
from serving.protocol.errors import error_of

INVALID_BODIES = Quota(amount=32 << 20, window_s=32.0)  # bytes
INVALID_BASE_BYTES = 1 << 10  # of a request whose body is empty
COSTLY_BYTES = 8 << 20  # for each second of processor time that a schema takes to compile
FRESH_S = 3 * POLL_S  # in which a request that has ended elsewhere is known here
ROOM_POLL_S = 0.05
_WINDOWS = {QuotaKind.TOKENS_PER_MINUTE: "per minute", QuotaKind.TOKENS_PER_DAY: "per day"}
KEY_IN_SCOPE = "raymill.api_key"


def key_of(request: Request) -> ApiKey | None:
    """Returns a request's key, which the gate has put into its scope."""
    key: ApiKey | None = request.scope.get(KEY_IN_SCOPE)
    return key


@dataclass(eq=False)
class Reservation:
    """The tokens that a request may use. Once it has ended it is charged what it has used."""

    usage: KeyUsage
    metrics: KeyMetrics
    key: ApiKey | None
    num_tokens: int = 0
    weight: int = field(init=False)
    is_settled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.weight = self.usage.weight
        self._charge(self.num_tokens)

    def settle(self, *, prompt_tokens: int, generated_tokens: int) -> None:
        """Corrects the charge, once."""
        if self.key is None or self.is_settled:
            return
        self.is_settled = True
        self._charge(prompt_tokens + generated_tokens - self.num_tokens)
        counted = self.metrics.of(self.key.name)
        counted.prompt_tokens.inc(prompt_tokens)
        counted.generation_tokens.inc(generated_tokens)

    def _charge(self, num_tokens: int) -> None:
        if self.key is None or num_tokens == 0:
            return
        for kind, quota in self.key.token_quotas.items():
            self.usage.charge(
                Account(self.key.name, kind), self.weight * quota.seconds_of(num_tokens)
            )


class KeyLimits:
    """The limits of all keys, on one replica."""

    def __init__(self, usage: KeyUsage, metrics: KeyMetrics, *, max_requests: int | None) -> None:
        """`max_requests` is the limit of a key without one of its own."""
        self._usage = usage
        self._metrics = metrics
        self._max_requests = max_requests
        self._waiting: Counter[str] = Counter()

    def count_request(self, key: ApiKey | None) -> None:
        if key is not None:
            self._metrics.of(key.name).requests.inc()

    def count_refusal(self, key: ApiKey | None, reason: KeyRefusal) -> None:
        if key is not None:
            self._metrics.of(key.name).refused[reason].inc()

    @asynccontextmanager
    async def running(self, key: ApiKey | None) -> AsyncIterator[None]:
        """Counts one more request of `key` during the context; None is not counted. Raises
        `ApiError` (429) at the limit."""
        limit = None if key is None else key.max_requests or self._max_requests
        if key is None or limit is None:
            yield
            return
        if not await self._has_room(key.name, limit):
            self.count_refusal(key, KeyRefusal.REQUESTS)
            raise error_of("rate_limit_exceeded", limit=limit)
        with self._usage.running(key.name):
            yield

    async def _has_room(self, name: str, limit: int) -> bool:
        """Tells whether one more request may run. What the other replicas have reported may have
        ended meanwhile: where only that speaks against it, it waits for their next reports."""
        usage = self._usage
        if usage.num_here(name) + self._waiting[name] >= usage.share_of(limit):
            return False
        self._waiting[name] += 1
        try:
            async with asyncio.timeout(FRESH_S):
                while usage.num_here(name) + usage.num_elsewhere(name) >= usage.share_of(limit):
                    await asyncio.sleep(ROOM_POLL_S)
        except TimeoutError:
            return False
        finally:
            self._waiting[name] -= 1
        return True

    def charge_invalid(self, key: ApiKey | None, num_bytes: int) -> None:
        """Holds a body against a key that was read in vain: reading it took time from others'
        streams, and a refusal costs its sender nothing."""
        seconds = INVALID_BODIES.seconds_of(num_bytes + INVALID_BASE_BYTES)
        self._usage.charge(_invalid_of(key), self._usage.weight * seconds)

    def asker(self, key: ApiKey | None, *, connection: Any) -> Asker:
        """Returns who asks with a key, which pays for what takes long. Without one each connection
        is on its own, and nobody pays: all would for one."""
        if key is None:
            return Asker(str(connection), has_key=False, charge=lambda seconds: None)
        return Asker(key.name, has_key=True, charge=partial(self._charge_costly, key))

    def _charge_costly(self, key: ApiKey, seconds: float) -> None:
        bucket_s = INVALID_BODIES.seconds_of(COSTLY_BYTES * seconds)
        self._usage.charge(_invalid_of(key), self._usage.weight * bucket_s)

    def require_few_invalid(self, key: ApiKey | None) -> None:
        """Raises `ApiError` (429) while too much is held against a key."""
        wait_s = INVALID_BODIES.wait_s(self._usage.debt_s(_invalid_of(key)), 0)
        if wait_s > 0:
            self.count_refusal(key, KeyRefusal.INVALID_BYTES)
            error = error_of("too_many_invalid", wait_s=math.ceil(wait_s))
            error.headers["Retry-After"] = str(math.ceil(wait_s))
            raise error

    def reserve(self, key: ApiKey | None, num_tokens: int) -> Reservation:
        """Charges a request beforehand with what it may use. Raises `ApiError` (429) if that
        exceeds a quota."""
        if key is not None:
            self._require_tokens(key, num_tokens)
        return Reservation(self._usage, self._metrics, key, num_tokens)

    def _require_tokens(self, key: ApiKey, num_tokens: int) -> None:
        debts_s = {kind: self._usage.debt_s(Account(key.name, kind)) for kind in key.token_quotas}
        waits_s = {
            kind: quota.wait_s(debts_s[kind], num_tokens)
            for kind, quota in key.token_quotas.items()
        }
        kind = max(waits_s, key=lambda kind: waits_s[kind], default=None)
        if kind is None or waits_s[kind] == 0:
            return
        self.count_refusal(key, KeyRefusal(kind))
        quota, window = key.token_quotas[kind], _WINDOWS[kind]
        if math.isinf(waits_s[kind]):
            raise error_of(
                "token_quota_too_small",
                name=key.name,
                limit=quota.amount,
                window=window,
                requested=num_tokens,
            )
        wait_s = math.ceil(waits_s[kind])
        used = math.ceil(debts_s[kind] / quota.window_s * quota.amount)
        error = error_of(
            "token_quota",
            name=key.name,
            limit=quota.amount,
            window=window,
            used=used,
            requested=num_tokens,
            wait_s=wait_s,
        )
        error.headers["Retry-After"] = str(wait_s)
        raise error


def _invalid_of(key: ApiKey | None) -> Account:
    return Account("" if key is None else key.name, QuotaKind.INVALID_BYTES)
