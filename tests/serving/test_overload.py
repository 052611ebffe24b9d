"""Five times more requests than there is room for: who is taken in waits little, others are told so, memory is flat."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.serve_config import EngineConfig, ServeConfig
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer
from serving.admission import predicted_wait_s
from serving.app import run
from tests.serving.delivery_parts import write_model
from tests.serving.endpoint_parts import children_with, free_port, ray_cluster, replica_app
from tests.serving.load import Ask, End, Load, greedy_asks, percentile

pytestmark = pytest.mark.cluster

MODEL = "long"
NUM_SLOTS, MAX_TOKENS = 4, 250
MAX_QUEUE_S = 0.4  # about half of what an answer takes
ENGINE = EngineConfig(max_num_seqs=NUM_SLOTS, max_queue_s=MAX_QUEUE_S)
OVERLOAD = 5
MAX_GROWTH_BYTES = 48 << 20


def test_the_wait_is_that_for_the_slots_that_become_free_before() -> None:
    assert predicted_wait_s(num_open=3, num_slots=4, residence_s=8) == 0
    assert predicted_wait_s(num_open=4, num_slots=4, residence_s=8) == 2
    assert predicted_wait_s(num_open=11, num_slots=4, residence_s=8) == 16


@pytest.fixture(scope="module")
def long_model(tokenizer: Tokenizer) -> GPT:
    """Large enough that refusals, on the same two processors, cost little beside its answers."""
    shape = {"n_positions": 256, "n_layer": 8, "n_head": 8, "n_embd": 512}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    model.init_weights(1)
    return model.eval()


@pytest.fixture(scope="module")
def folder(long_model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoints") / "long-1", long_model, tokenizer)


@pytest.fixture(scope="module")
def asks(long_model: GPT, tokenizer: Tokenizer) -> list[Ask]:
    return greedy_asks(long_model, tokenizer, [[1], [2, 3]], max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Overloaded:
    alone_s: float  # the slowest of some requests, one after the other
    unloaded_s: float  # the slowest of as many at a time as there are slots
    p99_s: float  # of those that were taken in
    num_accepted: int
    num_refused: int
    growth_bytes: int


async def overload(load: Load, *, num_requests: int, processes: list[psutil.Process]) -> Overloaded:
    """Requests at five times the rate that can be answered."""

    def latencies_s() -> list[float]:
        load.check(allowed={(False, End.DONE), (False, End.REFUSED)})
        done = [outcome.latency_s for outcome in load.outcomes if outcome.end is End.DONE]
        load.outcomes.clear()
        return done

    def memory_bytes() -> int:
        return sum(process.memory_info().rss for process in processes)

    await load.run_clients(1, until=lambda: False, max_requests=3, seed=1, streams=False)
    alone_s = max(latencies_s()[1:])  # the first one warms up
    await load.run_clients(NUM_SLOTS, until=lambda: False, max_requests=3 * NUM_SLOTS, seed=1, streams=False)
    unloaded = latencies_s()
    rate_per_s = OVERLOAD * NUM_SLOTS / (sum(unloaded) / len(unloaded))
    before_bytes = memory_bytes()
    await load.run_arrivals(rate_per_s, num_requests=num_requests)
    num_refused = sum(outcome.end is End.REFUSED for outcome in load.outcomes)
    accepted = latencies_s()
    seen = Overloaded(
        alone_s=alone_s,
        unloaded_s=max(unloaded),
        p99_s=percentile(accepted, 0.99),
        num_accepted=len(accepted),
        num_refused=num_refused,
        growth_bytes=memory_bytes() - before_bytes,
    )
    print(f"{num_requests} requests, {rate_per_s:.1f} a second: {seen}")
    return seen


def check(seen: Overloaded, *, num_requests: int) -> None:
    assert seen.num_accepted + seen.num_refused == num_requests
    assert seen.num_accepted >= num_requests / OVERLOAD / 2 and seen.num_refused > num_requests / 2
    assert seen.p99_s <= 2 * seen.unloaded_s
    assert seen.growth_bytes < MAX_GROWTH_BYTES


def test_five_times_too_many_for_a_replica(folder: Path, asks: list[Ask]) -> None:
    """A replica's routes and its engine process, without Ray."""

    async def scenario() -> Overloaded:
        async with replica_app(folder, name=MODEL, config=ServeConfig(engine=ENGINE)) as (app, versions):
            load = Load("http://replica", MODEL, asks, app=app)
            processes = [psutil.Process(), psutil.Process(versions.live.engine.pid)]
            return await overload(load, num_requests=60, processes=processes)

    check(asyncio.run(scenario()), num_requests=60)


@pytest.mark.slow
def test_five_times_too_many_for_an_endpoint(folder: Path, asks: list[Ask]) -> None:
    config = ServeConfig(
        checkpoint=str(folder),
        model_name=MODEL,
        port=free_port(),
        engine=ENGINE,
    )
    with ray_cluster():
        load = Load(str(run(config)["url"]), MODEL, asks)
        processes = [
            p for word in ("ServeReplica:raymill:Replica", "ProxyActor", "long-1") for p in children_with(word)
        ]
        assert len(processes) == 3, processes
        check(asyncio.run(overload(load, num_requests=400, processes=processes)), num_requests=400)
