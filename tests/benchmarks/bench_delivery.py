"""What clients see of an endpoint's faults: `raymill serve` with two replicas on two nodes, and
clients that never stop.

    python -m tests.benchmarks.bench_delivery [--only NAME ...] [--repeat N] [--nodes N]

Each fault is made while one client asks for answers, two for streams and one for chats, each again
and again, mostly while a checkpoint is promoted. A request has failed if it got no whole answer: a
refusal counts, too. Prints a row for each fault as it ends, and the names that `--only` takes are
those of the rows. It takes five minutes on two quiet cores.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from model.config import GPTConfig
from model.gpt import GPT
from model.text.chat_format import ChatFormat
from model.text.tokenizer import Tokenizer, train_bpe
from tests.serving.endpoint_parts import children_with
from tests.serving.load import End
from tests.serving.serve_command import (
    CONTROLLER,
    COORDINATOR,
    MODEL,
    PROXY,
    REPLICA,
    ServeCommand,
    killed,
    serve_command,
)
from tests.serving.tiny_models import write_model
from tests.time_limits import limit_s
from tests.waiting import wait_in_loop_until

ADMIN_KEY = "sk-admin"
WATCH_S = 4.0
NUM_NODES, NUM_REPLICAS = 2, 2
KINDS = ("answer", "stream", "chat", "stream")  # of the clients
PAUSE_S = 0.02
BEFORE_S, AFTER_S = 1.5, 2.0
BURST = 200
NUM_UNFINISHED = 1000
LONG_ANSWER = 8000  # tokens
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BROKEN_TEMPLATE = "{% for m in messages %}{{ m.content "
CHECKPOINTS = {"first": (1, TEMPLATE), "second": (2, TEMPLATE), "broken": (3, BROKEN_TEMPLATE)}
WELL = (End.DONE,)


def body_of(kind: str, number: int, *, max_tokens: int = 20) -> tuple[str, dict[str, Any]]:
    """Returns the path and the body of a client's request."""
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if kind == "chat":
        return "/v1/chat/completions", body | {
            "messages": [{"role": "user", "content": f"the quick {number}"}]
        }
    return "/v1/completions", body | {"prompt": f"the quick {number}", "stream": kind == "stream"}


def end_of(status: int, content: bytes, *, streamed: bool) -> End:
    if status in (429, 503):
        return End.REFUSED
    if status != 200:
        return End.FAILED
    if not streamed or content.endswith(b"data: [DONE]\n\n"):
        return End.DONE
    return End.ERROR_EVENT if b'"error"' in content else End.CUT


@dataclass
class Clients:
    """Clients of one endpoint, and what became of their requests."""

    url: str
    num_begun: int = 0  # answers of which something has come
    ends: Counter[End] = field(default_factory=Counter)
    answered_s: list[float] = field(default_factory=list)  # when whole answers came

    async def ask(self, http: httpx.AsyncClient, kind: str, number: int, **options: Any) -> None:
        path, body = body_of(kind, number, **options)
        content = b""
        try:
            async with http.stream("POST", path, json=body) as answer:
                async for part in answer.aiter_raw():
                    self.num_begun += not content
                    content += part
            end = end_of(answer.status_code, content, streamed=kind == "stream")
        except httpx.TimeoutException:
            end = End.STUCK
        except httpx.TransportError:
            end = End.CUT
        self.ends[end] += 1
        if end is End.DONE:
            self.answered_s.append(time.monotonic())

    async def keep_asking(self, over: asyncio.Event) -> None:
        async def client(kind: str) -> None:
            number = 0
            while not over.is_set():
                number += 1
                await self.ask(http, kind, number)
                await asyncio.sleep(PAUSE_S)

        async with self.http() as http, asyncio.TaskGroup() as group:
            for kind in KINDS:
                group.create_task(client(kind))

    def http(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=limit_s(30), limits=limits)

    @property
    def num_requests(self) -> int:
        return self.ends.total()

    @property
    def num_failed(self) -> int:
        return self.num_requests - sum(self.ends[end] for end in WELL)

    def longest_silence_s(self, since_s: float) -> float:
        """Returns the longest time since then without a whole answer."""
        times = [since_s, *(answer_s for answer_s in self.answered_s if answer_s > since_s)]
        return max((after - before for before, after in pairwise(times)), default=0.0)


class Endpoint:
    """The endpoint that is disturbed, as its operator sees it."""

    def __init__(self, served: ServeCommand, models: Path) -> None:
        self.served, self.url, self.models = served, served.url, models
        self.clients = Clients(self.url)
        self._admin = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=limit_s(30)
        )

    def order(self, name: str, **asked: Any) -> httpx.Response:
        return self._admin.post(f"/admin/{name}", json=asked)

    def promote(self, name: str) -> httpx.Response:
        return self.order("promote", checkpoint=str(self.models / name), watch_s=WATCH_S)

    def candidate(self) -> str:
        """Returns the name of a whole checkpoint that is not live."""
        live = Path(self.wait_for("steady")["live"]["checkpoint"]).name
        return "second" if live == "first" else "first"

    def delivery(self) -> dict[str, Any]:
        """Returns the state, or nothing while nobody can tell."""
        try:
            return dict(self._admin.get("/admin/status").json().get("delivery") or {})
        except (httpx.TransportError, ValueError):
            return {}

    def wait_for(self, phase: str) -> dict[str, Any]:
        deadline_s = time.monotonic() + limit_s(30)
        while (state := self.delivery()).get("phase") != phase:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the endpoint is not {phase}: {state}")
            time.sleep(0.1)
        return state

    def outcome(self) -> str:
        """Returns how the promotion ended."""
        outcome = self.wait_for("steady")["outcome"] or {}
        reason = f": {outcome['reason']}" if outcome.get("reason") else ""
        return f"{outcome.get('result', 'none')}{reason[:80]}"

    def wait_until_whole(self, num_proxies: int) -> float:
        """Waits until every process is there and answers. Returns the seconds."""
        start_s = time.monotonic()
        while len(children_with(PROXY)) < num_proxies or len(children_with(REPLICA)) < NUM_REPLICAS:
            if time.monotonic() > start_s + limit_s(60):
                raise TimeoutError("the endpoint did not become whole again")
            time.sleep(0.1)
        return time.monotonic() - start_s


def promotion(endpoint: Endpoint) -> str:
    endpoint.promote(endpoint.candidate()).raise_for_status()
    return endpoint.outcome()


def template(endpoint: Endpoint) -> str:
    answer = endpoint.promote("broken")
    return (
        f"refused with {answer.status_code} {answer.json()['error']['code']}"
        if answer.is_error
        else "obeyed"
    )


def three_promotions(endpoint: Endpoint) -> str:
    candidate = endpoint.candidate()
    with ThreadPoolExecutor(3) as operators:
        answers = operators.map(endpoint.promote, (candidate, "broken", candidate))
    statuses = sorted(answer.status_code for answer in answers)
    return f"{', '.join(map(str, statuses))}; {endpoint.outcome()}"


def rollback_while_loading(endpoint: Endpoint) -> str:
    endpoint.promote(endpoint.candidate()).raise_for_status()
    endpoint.order("rollback", reason="an operator").raise_for_status()
    return endpoint.outcome()


def loss_while_loading(kind: str, endpoint: Endpoint) -> str:
    endpoint.promote(endpoint.candidate()).raise_for_status()
    killed(children_with(kind)[0])
    return endpoint.outcome()


def replica_loss_while_watching(endpoint: Endpoint) -> str:
    endpoint.promote(endpoint.candidate()).raise_for_status()
    endpoint.wait_for("watching")
    killed(children_with(REPLICA)[0])
    outcome = endpoint.outcome()
    endpoint.wait_until_whole(len(children_with(PROXY)))
    return outcome


def proxy_loss_while_loading(endpoint: Endpoint) -> str:
    proxies = children_with(PROXY)
    endpoint.promote(endpoint.candidate()).raise_for_status()
    began_s = time.monotonic()
    killed(proxies[0])
    whole_s = endpoint.wait_until_whole(len(proxies))
    outcome = endpoint.outcome()
    while not endpoint.clients.answered_s or endpoint.clients.answered_s[-1] < began_s + whole_s:
        time.sleep(0.1)
    silence_s = endpoint.clients.longest_silence_s(began_s)
    return (
        f"{outcome}; of {len(proxies)} proxies; the longest time without a whole answer was {silence_s:.1f} s, "
        f"and another proxy's process was there after {whole_s:.1f} s"
    )


def burst(endpoint: Endpoint) -> str:
    clients = Clients(endpoint.url)

    async def all_at_once() -> None:
        async with clients.http() as http, asyncio.TaskGroup() as group:
            for number in range(BURST):
                group.create_task(clients.ask(http, "answer", number, max_tokens=100))

    asyncio.run(all_at_once())
    return f"of {BURST} more: {counted(clients.ends)}"


def unfinished_bodies(endpoint: Endpoint) -> str:
    with open_bodies(endpoint.url, NUM_UNFINISHED):
        statuses = Counter(probe(endpoint.url) for _ in range(10))
        time.sleep(2.0)
    return f"probes: {dict(statuses)}"


@contextlib.contextmanager
def open_bodies(url: str, count: int) -> Iterator[None]:
    """Holds connections that have sent headers and no body."""
    address = (httpx.URL(url).host, httpx.URL(url).port or 80)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(address, timeout=limit_s(5)))
            connection.sendall(head)
        yield


def probe(url: str) -> str:
    try:
        return str(httpx.get(f"{url}/-/healthz", timeout=limit_s(5)).status_code)
    except httpx.TransportError as error:
        return type(error).__name__


def counted(ends: Counter[End]) -> str:
    return ", ".join(f"{count} {end}" for end, count in ends.most_common())


FAULTS: dict[str, Callable[[Endpoint], str]] = {
    "none, a promotion": promotion,
    "a candidate with a broken template": template,
    "three promotions at once": three_promotions,
    "a rollback while it loads": rollback_while_loading,
    "controller killed while it loads": partial(loss_while_loading, CONTROLLER),
    "coordinator killed while it loads": partial(loss_while_loading, COORDINATOR),
    "replica killed while it is watched": replica_loss_while_watching,
    "proxy killed while it loads": proxy_loss_while_loading,
    f"a burst of {BURST}": burst,
    f"{NUM_UNFINISHED} unfinished bodies": unfinished_bodies,
}
END = "SIGTERM with four long streams"


async def disturbed(endpoint: Endpoint, fault: Callable[[Endpoint], str]) -> str:
    """Makes the fault while clients ask. Returns its outcome."""
    endpoint.clients = Clients(endpoint.url)
    over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(endpoint.clients.keep_asking(over))
        try:
            await asyncio.sleep(BEFORE_S)
            outcome = await asyncio.to_thread(fault, endpoint)
            await asyncio.sleep(AFTER_S)
        finally:
            over.set()
    return outcome


async def ended_with_streams(endpoint: Endpoint) -> str:
    endpoint.clients = clients = Clients(endpoint.url)
    async with clients.http() as http, asyncio.TaskGroup() as group:
        for number in range(len(KINDS)):
            group.create_task(clients.ask(http, "stream", number, max_tokens=LONG_ANSWER))
        await wait_in_loop_until(lambda: clients.num_begun == len(KINDS))
        assert not clients.num_requests, (
            f"the streams are too short to be disturbed: {clients.ends}"
        )
        code = await asyncio.to_thread(endpoint.served.ended, timeout_s=150)
    return f"exit code {code}"


def write_checkpoints(folder: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog, and naïve cafés sell €5 tea\n"
    plain = train_bpe([text * 9], vocab_size=300, normalize=[])
    for name, (seed, chat_template) in CHECKPOINTS.items():
        tokenizer = Tokenizer(
            json.loads(plain.to_json()), ChatFormat(chat_template, "", "<|endoftext|>")
        )
        shape = GPTConfig(
            vocab_size=tokenizer.vocab_size, n_positions=8192, n_layer=2, n_head=4, n_embd=128
        )
        gpt = GPT(shape)
        gpt.init_weights(seed)
        write_model(folder / name, gpt.eval(), tokenizer, step=seed)


def show(name: str, clients: Clients, outcome: str) -> None:
    how = "" if not clients.num_failed else f" ({counted(clients.ends)})"
    print(
        f"| {name} | {clients.num_requests} | {clients.num_failed} | {outcome}{how} |", flush=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[*FAULTS, END], choices=[*FAULTS, END], metavar="NAME"
    )
    parser.add_argument("--repeat", type=int, default=1, help="times that each fault is made")
    parser.add_argument(
        "--nodes", type=int, default=NUM_NODES, help="of the local cluster; one has one proxy"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="delivery-") as scratch:
        folder = Path(scratch)
        write_checkpoints(folder)
        (folder / "admin").write_text(ADMIN_KEY)
        words = [
            "--replicas.min-replicas",
            str(NUM_REPLICAS),
            "--replicas.max-replicas",
            str(NUM_REPLICAS),
        ]
        words += [
            "--cluster.num-nodes",
            str(arguments.nodes),
            "--cluster.cpus-per-node",
            str(NUM_REPLICAS + 1),
        ]
        words += ["--admin-key-file", "admin", "--storage.uri", str(folder / "storage")]
        with serve_command(folder / "first", folder, *words) as served:
            endpoint = Endpoint(served, folder)
            load = ", ".join(f"{one:.1f}" for one in psutil.getloadavg())
            print(f"{os.cpu_count()} CPUs, load {load}", flush=True)
            print("| fault | requests | failed | outcome |\n| --- | --- | --- | --- |", flush=True)
            for name in arguments.only * arguments.repeat:
                if name != END:
                    outcome = asyncio.run(disturbed(endpoint, FAULTS[name]))
                    show(name, endpoint.clients, outcome)
            if END in arguments.only:
                outcome = asyncio.run(ended_with_streams(endpoint))
                show(END, endpoint.clients, outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
