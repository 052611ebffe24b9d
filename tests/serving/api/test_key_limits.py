"""Limits of a key on one replica: requests in flight, tokens that are reserved and corrected,
invalid bodies."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest

from cluster.metrics.metric_export import Metrics
from cluster.metrics.metric_table import Exporter
from serving.api import key_limits
from serving.api.key_limits import INVALID_BODIES, KeyLimits
from serving.api.key_metrics import KeyMetrics, KeyRefusal
from serving.api.keys import ApiKey
from serving.limits.key_usage import KeyUsage
from serving.limits.usage_board import UsageBoard
from serving.protocol.errors import ApiError

MIB = 1 << 20


@dataclass
class Replica:
    """The limits on one replica, with a clock of the test's."""

    max_requests: int | None = None
    now_s: float = 0.0
    metrics: KeyMetrics = field(init=False)
    usage: KeyUsage = field(init=False)
    limits: KeyLimits = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = KeyMetrics(Metrics(Exporter.REPLICA, model_name="tiny", replica="r"))
        self.usage = KeyUsage(clock=lambda: self.now_s)
        self.limits = KeyLimits(self.usage, self.metrics, max_requests=self.max_requests)

    def tokens_wait_s(self, key: ApiKey, num_tokens: int) -> int:
        """How long the key has to wait for so many tokens, which it does not take; 0 if it has
        them."""
        try:
            reservation = self.limits.reserve(key, num_tokens)
        except ApiError as error:
            assert (error.status, error.code, error.body()["error"]["type"]) == (
                429,
                "rate_limit_exceeded",
                "tokens",
            )
            return int(error.headers["Retry-After"])
        reservation.settle(prompt_tokens=0, generated_tokens=0)
        return 0

    def num_refused(self, name: str, reason: KeyRefusal) -> float:
        return float(self.metrics.of(name).refused[reason]._value.get())


async def refused(limits: KeyLimits, key: ApiKey) -> str:
    """Asks for one more request, and returns why there is none."""
    with pytest.raises(ApiError) as caught:
        async with limits.running(key):
            pass
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
    return caught.value.message


def test_requests_in_flight_are_counted_by_name() -> None:
    a, b, wide = ApiKey.read("a"), ApiKey.read("b"), ApiKey.read("c name=wide max_requests=3")
    also_wide = ApiKey.read("d name=wide max_requests=3")

    async def scenario() -> None:
        replica = Replica(max_requests=2)
        limits = replica.limits
        async with limits.running(a), limits.running(a), limits.running(b), limits.running(None):
            assert "its limit of 2" in await refused(limits, a)
            async with limits.running(wide), limits.running(wide), limits.running(also_wide):
                assert "of 3" in await refused(limits, also_wide)
        with pytest.raises(ValueError, match="x"):
            async with limits.running(a):
                raise ValueError("x")
        async with limits.running(a), limits.running(a):
            pass
        assert (
            replica.num_refused(a.name, KeyRefusal.REQUESTS)
            == replica.num_refused("wide", KeyRefusal.REQUESTS)
            == 1
        )
        without_limit = Replica().limits
        async with contextlib.AsyncExitStack() as running:
            for key in (a, a, a, wide, wide, wide):
                await running.enter_async_context(without_limit.running(key))
            assert "its limit of 3" in await refused(without_limit, wide)

    asyncio.run(scenario())


def test_a_request_waits_for_the_end_of_one_elsewhere_before_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(key_limits, "ROOM_POLL_S", 0.001)
    key = ApiKey.read("a name=alice max_requests=1")

    async def scenario() -> None:
        here, there = Replica(), Replica()
        board = UsageBoard(clock=lambda: 0.0)

        def exchange(replica: Replica) -> None:
            report = replica.usage.report()
            replica.usage.adopt(board.exchange(str(id(replica)), report), report, asked_at_s=0.0)

        async def ask() -> None:
            async with here.limits.running(key):
                pass

        async with there.limits.running(key):
            exchange(there)
            exchange(here)
            asking = asyncio.create_task(ask())
            await asyncio.sleep(0.01)
            assert not asking.done()
            assert "its limit of 1" in await refused(here.limits, key), (
                "one waits for the one place already"
            )
        exchange(there)
        exchange(here)
        await asking
        async with there.limits.running(key):
            exchange(there)
            exchange(here)
            monkeypatch.setattr(key_limits, "FRESH_S", 0.01)
            assert "its limit of 1" in await refused(here.limits, key)

    asyncio.run(scenario())


def test_tokens_are_reserved_and_then_charged_as_they_were_used() -> None:
    replica, key = Replica(), ApiKey.read("a name=alice tokens_per_minute=600")
    first = replica.limits.reserve(key, 500)
    assert replica.tokens_wait_s(key, 100) == 0
    assert replica.tokens_wait_s(key, 200) == 10
    first.settle(prompt_tokens=50, generated_tokens=250)
    assert replica.tokens_wait_s(key, 300) == 0
    assert replica.tokens_wait_s(key, 301) == 1
    first.settle(prompt_tokens=0, generated_tokens=0)
    assert replica.tokens_wait_s(key, 301) == 1, "once is enough"
    replica.now_s = 1.0
    assert replica.tokens_wait_s(key, 310) == 0
    counted = replica.metrics.of("alice")
    assert (counted.prompt_tokens._value.get(), counted.generation_tokens._value.get()) == (50, 250)
    assert replica.num_refused("alice", KeyRefusal.TOKENS_PER_MINUTE) == 3


def test_an_answer_that_was_longer_than_reserved_leaves_a_debt() -> None:
    replica, key = Replica(), ApiKey.read("a name=alice tokens_per_minute=600")
    replica.limits.reserve(key, 10).settle(prompt_tokens=10, generated_tokens=1190)
    assert replica.tokens_wait_s(key, 1) == 61  # 60.1: 600 tokens of debt, and one more


def test_of_two_quotas_the_one_that_takes_longer_speaks() -> None:
    replica, key = Replica(), ApiKey.read("a name=alice tokens_per_minute=600 tokens_per_day=1000")
    replica.limits.reserve(key, 600)
    assert replica.tokens_wait_s(key, 100) == 10
    replica.now_s = 60.0
    with pytest.raises(ApiError) as caught:
        replica.limits.reserve(key, 500)
    assert caught.value.headers["Retry-After"] == str(round(86.4 * 100 - 60)), (
        "86.4 s for each token"
    )
    assert "alice: 1000 tokens per day, 600 used, 500 requested" in caught.value.message
    assert replica.num_refused("alice", KeyRefusal.TOKENS_PER_DAY) == 1
    assert replica.num_refused("alice", KeyRefusal.TOKENS_PER_MINUTE) == 1


def test_what_no_waiting_makes_possible_is_not_to_be_tried_again() -> None:
    replica, key = Replica(), ApiKey.read("a name=alice tokens_per_minute=600")
    with pytest.raises(
        ApiError, match="too large for the key alice: 600 tokens per minute, 601 requested"
    ) as caught:
        replica.limits.reserve(key, 601)
    assert caught.value.headers == {"x-should-retry": "false"}


def test_a_key_without_a_quota_and_a_client_without_a_key_have_none() -> None:
    replica = Replica()
    for key in (None, ApiKey.read("a name=alice")):
        replica.limits.reserve(key, 10**9).settle(prompt_tokens=7, generated_tokens=2)
    assert replica.metrics.of("alice").prompt_tokens._value.get() == 7
    assert not replica.usage.report().debts_s


def test_who_sends_many_invalid_bodies_waits_and_nobody_else_does() -> None:
    replica, mallory, alice = Replica(), ApiKey.read("m name=mallory"), ApiKey.read("a name=alice")
    for _ in range(INVALID_BODIES.amount // MIB):
        replica.limits.require_few_invalid(mallory)
        replica.limits.charge_invalid(mallory, MIB)
    replica.limits.charge_invalid(mallory, 2 * MIB)
    with pytest.raises(ApiError) as caught:
        replica.limits.require_few_invalid(mallory)
    assert caught.value.status == 429 and caught.value.code == "rate_limit_exceeded"
    replica.limits.require_few_invalid(alice)
    replica.limits.require_few_invalid(None)
    replica.now_s = float(caught.value.headers["Retry-After"])
    replica.limits.require_few_invalid(mallory)
    assert replica.num_refused("mallory", KeyRefusal.INVALID_BYTES) == 1


def test_processor_time_of_schemas_is_held_against_their_key_alone() -> None:
    replica, mallory, alice = Replica(), ApiKey.read("m name=mallory"), ApiKey.read("a name=alice")
    connection = ("127.0.0.1", 50_000)
    replica.limits.asker(mallory, connection=connection).charge(1.95)
    replica.limits.require_few_invalid(mallory)
    for _ in range(2):
        replica.limits.asker(mallory, connection=connection).charge(1.95)
    with pytest.raises(ApiError, match="schemas that take long to compile"):
        replica.limits.require_few_invalid(mallory)
    unknown = replica.limits.asker(None, connection=connection)
    unknown.charge(100.0)
    replica.limits.require_few_invalid(None)
    replica.limits.require_few_invalid(alice)
    assert unknown.name != replica.limits.asker(None, connection=("127.0.0.1", 50_001)).name


def test_the_series_of_a_name_begin_and_end_with_it() -> None:
    exported = Metrics(Exporter.REPLICA, model_name="tiny", replica="r")
    metrics = KeyMetrics(exported)

    def names() -> set[str]:
        families = exported.collectors.collect()
        return {
            sample.labels["key"]
            for family in families
            for sample in family.samples
            if "key" in sample.labels
        }

    metrics.keep({"alice", "bob"})
    assert names() == {"alice", "bob"}
    metrics.of("alice").requests.inc()
    metrics.keep({"alice"})
    assert names() == {"alice"}
    assert metrics.of("alice").requests._value.get() == 1
