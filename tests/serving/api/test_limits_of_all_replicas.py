"""The limits of a key hold for all replicas together: real replicas over HTTP, with a coordinator
between them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError

from cluster.settings.run import StorageConfig
from cluster.settings.serve import EngineConfig, ServeConfig
from serving.api import key_limits
from serving.api.access import AccessRules
from serving.api.keys import ApiKey
from serving.delivery.coordinator import Coordinator
from serving.delivery.follower import Follower
from serving.limits.usage_report import Account, QuotaKind
from tests.serving.endpoint_parts import loopback_server, routes_of
from tests.time_limits import limit_s
from tests.waiting import wait_in_loop_until

pytestmark = pytest.mark.more

MODEL = "tiny"
KEYS = {
    "one": "max_requests=1",
    "dying": "max_requests=1",
    "shared": "max_requests=4",
    "day": "tokens_per_day=100",
    "early": "tokens_per_day=100",
    "minute": "tokens_per_minute=100",
    "open": "tokens_per_day=100",
    "broken": "tokens_per_day=1000",
    "invalid": "",
    "free": "",
}
ASKED = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 7, "ignore_eos": True, "seed": 3}
ENDLESS = ASKED | {"prompt": [[5, 6, 7]] * 200, "n": 8, "max_tokens": 100, "stream": True}
NUM_REPLICAS = 2


@dataclass
class Link:
    """A replica's way to the coordinator, which can be cut."""

    fleet: "Fleet"
    is_cut: bool = False
    num_answers: int = 0

    def __post_init__(self) -> None:
        self.exchange = SimpleNamespace(
            remote=lambda *report: self._asked(lambda one: one.exchange(*report))
        )
        self.begin = SimpleNamespace(remote=lambda *live: self._asked(lambda one: one.begin(*live)))

    async def _asked(self, call: Callable[[Coordinator], Coroutine[Any, Any, Any]]) -> Any:
        if self.is_cut:
            raise ActorDiedError()
        answer = await call(self.fleet.coordinator)
        self.num_answers += 1
        return answer


class Fleet:
    """Replicas, each with an engine process and a port of its own, and their coordinator."""

    def __init__(self, checkpoint: Path, storage: Path) -> None:
        engine = EngineConfig(max_num_seqs=2)
        storage_config = StorageConfig(uri=str(storage))
        self.config = ServeConfig(
            checkpoint=str(checkpoint), model_name=MODEL, engine=engine, storage=storage_config
        )
        self.links: list[Link] = []
        self.followers: list[Follower] = []
        self.urls: list[str] = []
        self.start_coordinator()

    def start_coordinator(self) -> None:
        """Starts the first one, or a new one that knows what the storage has."""
        self.coordinator = Coordinator(self.config, deployment="d")

    @contextlib.asynccontextmanager
    async def replica(self) -> AsyncIterator[int]:
        """Starts one more replica, and gives its number."""
        number = len(self.links)
        link: Any = Link(self)
        follower = Follower(
            self.config, link, deployment="d", replica=f"r{number}", on_live_death=print
        )
        await follower.start()
        keys = tuple(
            ApiKey.read(f"sk-{name} name={name} {limits}") for name, limits in KEYS.items()
        )
        app = routes_of(
            follower.versions,
            access=AccessRules(keys),
            usage=follower.usage,
            replica=f"r{number}",
        )
        try:
            async with loopback_server(app) as url:
                self.links.append(link)
                self.followers.append(follower)
                self.urls.append(url)
                yield number
        finally:
            await follower.close()

    def client(self, number: int, name: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer sk-{name}", "x-request-id": "r"}
        return httpx.AsyncClient(base_url=self.urls[number], headers=headers, timeout=limit_s(60))

    async def ask(
        self, number: int, name: str, path: str = "/v1/completions", **fields: Any
    ) -> httpx.Response:
        async with self.client(number, name) as http:
            return await http.post(path, json=ASKED | fields)

    @contextlib.asynccontextmanager
    async def streaming(self, number: int, name: str) -> AsyncIterator[None]:
        """A request that runs."""
        async with (
            self.client(number, name) as http,
            http.stream("POST", "/v1/completions", json=ENDLESS) as answer,
        ):
            assert answer.status_code == 200
            lines = answer.aiter_lines()  # the answer ends with its iterator
            await anext(lines)
            yield

    @contextlib.contextmanager
    def cut(self, *numbers: int) -> Iterator[None]:
        """Nobody hears of these replicas meanwhile, nor do they of others."""
        for number in numbers:
            self.links[number].is_cut = True
        try:
            yield
        finally:
            for number in numbers:
                self.links[number].is_cut = False

    async def heard(self) -> None:
        """Waits until every replica has reported, and then heard of it."""
        for _ in range(2):
            goals = [link.num_answers + 2 for link in self.links]  # one may have been under way
            await wait_in_loop_until(partial(self._have_answers, goals))

    def _have_answers(self, goals: list[int]) -> bool:
        return all(link.num_answers >= goal for link, goal in zip(self.links, goals, strict=True))


@pytest.fixture(scope="module")
def run(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., None]]:
    """Runs a test's body beside a fleet that all of them share."""
    fleet = Fleet(checkpoint, tmp_path_factory.mktemp("storage"))
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setattr("serving.delivery.follower.POLL_S", 0.05)
        stack = contextlib.AsyncExitStack()
        for _ in range(NUM_REPLICAS):
            runner.run(stack.enter_async_context(fleet.replica()))
        yield lambda check: runner.run(check(fleet))
        runner.run(stack.aclose())


def refusal(answer: httpx.Response) -> dict[str, Any]:
    """Returns the error of an answer that a limit of its key refuses."""
    assert answer.status_code == 429, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert (error["code"], error["param"]) == ("rate_limit_exceeded", None)
    return error


def no_tokens(answer: httpx.Response) -> str:
    """Returns the message of an answer that OpenAI's clients take for a quota of tokens."""
    error = refusal(answer)
    assert error["type"] == "tokens"
    return str(error["message"])


Run = Callable[[Callable[[Fleet], Coroutine[Any, Any, None]]], None]


def test_a_request_on_one_replica_counts_on_the_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(fleet: Fleet) -> None:
        async with fleet.streaming(0, "one"):
            await fleet.heard()
            answer = await fleet.ask(1, "one")
            assert refusal(answer)["type"] == "rate_limit_error"
            assert answer.headers["Retry-After"] == "1"
            assert (await fleet.ask(1, "free")).status_code == 200
        monkeypatch.setattr(key_limits, "FRESH_S", limit_s(1.5))
        assert (await fleet.ask(1, "one")).status_code == 200, (
            "it waits until the end there is known here"
        )

    run(check)


def test_the_requests_of_a_replica_that_dies_end_with_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(fleet: Fleet) -> None:
        async with fleet.streaming(0, "dying"):
            await fleet.heard()
            refusal(await fleet.ask(1, "dying"))
            with fleet.cut(0):
                await wait_in_loop_until(
                    lambda: fleet.followers[1].usage.num_elsewhere("dying") == 0
                )
                assert (await fleet.ask(1, "dying")).status_code == 200

    run(check)


def test_tokens_used_on_one_replica_are_used_up_on_the_other(run: Run) -> None:
    async def check(fleet: Fleet) -> None:
        await fleet.heard()  # what a replica that nobody hears charges counts for all
        used = [
            (await fleet.ask(number, "day", max_tokens=37)).json()["usage"]["total_tokens"]
            for number in (0, 1)
        ]
        assert used == [40, 40]
        await fleet.heard()
        for number in (0, 1):
            answer = await fleet.ask(number, "day", max_tokens=37)
            assert "100 tokens per day, 80 used, 40 requested" in no_tokens(answer)
            assert 864 * 20 - 30 * limit_s(1) < int(answer.headers["Retry-After"]) <= 864 * 20
        assert (await fleet.ask(1, "day", max_tokens=10)).status_code == 200, "13 are left"

    run(check)


def test_a_minute_s_tokens_come_back(run: Run) -> None:
    async def check(fleet: Fleet) -> None:
        began_s = time.monotonic()
        assert (await fleet.ask(0, "minute", max_tokens=97)).status_code == 200
        await fleet.heard()
        answer = await fleet.ask(1, "minute", max_tokens=97)
        assert "100 tokens per minute" in no_tokens(answer)
        assert 0 < int(answer.headers["Retry-After"]) <= 60
        while (answer := await fleet.ask(1, "minute", max_tokens=7)).status_code == 429:
            await asyncio.sleep(int(answer.headers["Retry-After"]))
        assert answer.status_code == 200 and time.monotonic() - began_s >= 6, (
            "ten of a hundred tokens"
        )

    run(check)


def test_a_chat_that_leaves_its_length_open_reserves_its_prompt_alone(run: Run) -> None:
    async def check(fleet: Fleet) -> None:
        chat = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "the quick"}],
            "ignore_eos": True,
        }
        async with fleet.client(0, "open") as http:
            answer = await http.post("/v1/chat/completions", json=chat | {"max_tokens": 101})
            assert (
                "too large for the key open" in no_tokens(answer)
                and "Retry-After" not in answer.headers
            )
            answer = await http.post("/v1/chat/completions", json=chat)
            assert answer.status_code == 200, answer.text
        used = answer.json()["usage"]["total_tokens"]
        assert used > 100
        await fleet.heard()
        assert f"{used} used, 4 requested" in no_tokens(await fleet.ask(1, "open", max_tokens=1))

    run(check)


def test_a_client_that_leaves_is_charged_for_what_it_has_got(run: Run) -> None:
    async def check(fleet: Fleet) -> None:
        account = Account("broken", QuotaKind.TOKENS_PER_DAY)

        def num_charged(number: int) -> float:
            return fleet.followers[number].usage.debt_s(account) / 86.4

        reserved = 3 + 8 * 120
        async with fleet.client(0, "broken") as http:
            asked = ASKED | {"n": 8, "max_tokens": 120, "stream": True}
            async with http.stream("POST", "/v1/completions", json=asked) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                assert num_charged(0) == pytest.approx(reserved, abs=1)
        await wait_in_loop_until(lambda: num_charged(0) < reserved - 1)
        charged = num_charged(0)
        assert charged >= 3
        await fleet.heard()
        assert num_charged(1) == pytest.approx(charged, abs=1)

    run(check)


def test_invalid_bodies_sent_to_one_replica_are_held_against_the_key_at_the_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgiven_in_an_hour = replace(key_limits.INVALID_BODIES, window_s=3600.0)
    monkeypatch.setattr(key_limits, "INVALID_BODIES", forgiven_in_an_hour)

    async def check(fleet: Fleet) -> None:
        body = b"[" + b"x" * ((1 << 20) - 2)
        headers = {"content-type": "application/json"}
        async with fleet.client(0, "invalid") as first, fleet.client(1, "invalid") as second:
            for http in (first, second):
                for _ in range(20):  # neither refuses so many by itself
                    assert (
                        await http.post("/tokenize", content=body, headers=headers)
                    ).status_code in (400, 429)
            await fleet.heard()
            for http in (first, second):
                assert (
                    "invalid bodies"
                    in refusal(await http.post("/tokenize", json={"prompt": "a"}))["message"]
                )
        assert (await fleet.ask(0, "free")).status_code == 200

    run(check)


def test_a_new_coordinator_and_a_new_replica_know_what_was_used(run: Run) -> None:
    async def check(fleet: Fleet) -> None:
        assert (await fleet.ask(0, "early", max_tokens=87)).status_code == 200
        await fleet.heard()
        fleet.start_coordinator()
        await fleet.heard()
        no_tokens(await fleet.ask(1, "early", max_tokens=20))
        async with fleet.replica() as late:
            no_tokens(await fleet.ask(late, "early", max_tokens=20))
            for things in (fleet.links, fleet.followers, fleet.urls):
                things.pop()

    run(check)


def test_without_the_coordinator_each_replica_gives_its_share(run: Run) -> None:
    async def check(fleet: Fleet) -> None:
        async with contextlib.AsyncExitStack() as running:
            await running.enter_async_context(fleet.streaming(0, "shared"))
            await fleet.heard()
            running.enter_context(fleet.cut(0, 1))
            await wait_in_loop_until(
                lambda: all(follower.usage.is_alone for follower in fleet.followers)
            )
            await running.enter_async_context(fleet.streaming(0, "shared"))
            refusal(await fleet.ask(0, "shared"))  # two of four run here
            await running.enter_async_context(fleet.streaming(1, "shared"))
            assert (await fleet.ask(1, "shared")).status_code == 200

    run(check)


def test_each_key_sees_its_own_counters(run: Run) -> None:
    async def check(fleet: Fleet) -> None:
        async with fleet.client(0, "free") as http:
            before = counters((await http.get("/metrics")).text)
            answer = await http.post("/v1/completions", json=ASKED)
            usage = answer.json()["usage"]
            await http.post(
                "/v1/completions", json=ASKED | {"prompt": [[1]] * 250, "n": 8, "max_tokens": -1}
            )
            after = counters((await http.get("/metrics")).text)
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        assert grown["raymill:key_requests_total"] == 2
        assert grown["raymill:key_prompt_tokens_total"] == usage["prompt_tokens"]
        assert grown["raymill:key_generation_tokens_total"] == usage["completion_tokens"]
        async with fleet.client(0, "one") as http:
            text = (await http.get("/metrics")).text
        assert 'key="free"' not in text
        assert "vllm:prompt_tokens_total" in text

    def counters(text: str) -> dict[str, float]:
        lines = [
            line for line in text.splitlines() if 'key="free"' in line and "reason" not in line
        ]
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}

    run(check)
