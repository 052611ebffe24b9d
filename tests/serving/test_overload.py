"""Five times more requests than there is room for: who is taken in waits little, others are told so, memory is flat."""

import asyncio
from collections.abc import Iterator

import psutil
import pytest

from cluster.serve_config import EngineConfig, ServeConfig
from model.checkpoint import Metadata, parameter_hash, write_checkpoint
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer
from serving.admission import predicted_wait_s
from serving.app import run
from tests.serving.endpoint_parts import children_with, free_port, ray_cluster
from tests.serving.load import End, Load, greedy_asks, percentile

MODEL = "long"
NUM_SLOTS, MAX_TOKENS = 4, 400
OVERLOAD = 5
MAX_GROWTH_BYTES = 48 << 20


def test_the_wait_is_that_for_the_slots_that_become_free_before() -> None:
    assert predicted_wait_s(num_open=3, num_slots=4, residence_s=8) == 0
    assert predicted_wait_s(num_open=4, num_slots=4, residence_s=8) == 2
    assert predicted_wait_s(num_open=11, num_slots=4, residence_s=8) == 16


@pytest.fixture(scope="module")
def load(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """Long answers, beside which the cost of a refusal is small."""
    model = GPT(
        GPTConfig(vocab_size=tokenizer.vocab_size, n_positions=512, n_layer=2, n_head=2, n_embd=32, initializer_range=0.3)
    ).eval()  # fmt: skip
    model.init_weights(1)
    folder = tmp_path_factory.mktemp("checkpoints") / "long-1"
    metadata = Metadata(
        run_id=MODEL,
        step=1,
        tokens_seen=1,
        data_manifest_hash="d" * 64,
        code_version="test",
        parameter_hash=parameter_hash(model.state_dict()),
        val_loss=None,
        val_bits_per_byte=None,
    )
    write_checkpoint(folder, model=model, tokenizer=tokenizer, metadata=metadata, train_state=None)
    config = ServeConfig(
        checkpoint=str(folder), port=free_port(), engine=EngineConfig(max_num_seqs=NUM_SLOTS, max_queue_s=0.5)
    )
    asks = greedy_asks(model, tokenizer, [[1], [2, 3]], max_tokens=MAX_TOKENS)
    with ray_cluster():
        yield Load(str(run(config)["url"]), MODEL, asks)


def memory_bytes() -> int:
    """Of proxy, replica and engine process."""
    processes = [p for word in ("ServeReplica", "ProxyActor", "long-1") for p in children_with(word)]
    assert len(processes) == 3, processes
    return sum(psutil.Process(p.pid).memory_info().rss for p in processes)


@pytest.mark.parametrize("num_requests", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_five_times_too_many(load: Load, num_requests: int) -> None:
    def latencies_s() -> list[float]:
        done = [outcome.latency_s for outcome in load.outcomes if outcome.end is End.DONE]
        load.check(allowed={(False, End.DONE), (False, End.REFUSED)})
        load.outcomes.clear()
        return done

    load.outcomes.clear()
    asyncio.run(load.run_clients(1, until=lambda: False, max_requests=6, seed=1))
    alone_s = max(latencies_s()[1:])  # the first one warms up
    # As many as there are slots: nobody waits, and this is what the replica can do.
    asyncio.run(load.run_clients(NUM_SLOTS, until=lambda: False, max_requests=4 * NUM_SLOTS, seed=1))
    unloaded = latencies_s()
    capacity_per_s = NUM_SLOTS / (sum(unloaded) / len(unloaded))
    before_bytes = memory_bytes()
    asyncio.run(load.run_arrivals(OVERLOAD * capacity_per_s, num_requests=num_requests))
    num_refused = sum(outcome.end is End.REFUSED for outcome in load.outcomes)
    accepted = latencies_s()
    growth_bytes = memory_bytes() - before_bytes
    p99_s = percentile(accepted, 0.99)
    print(
        f"{capacity_per_s:.1f} requests/s fit; of {num_requests} at {OVERLOAD} times as many {num_refused} were refused; "
        f"p99 of the others {p99_s:.2f} s, unloaded {max(unloaded):.2f} s, alone {alone_s:.2f} s; "
        f"memory grew by {growth_bytes / 2**20:.1f} MiB"
    )
    assert len(accepted) >= num_requests / OVERLOAD / 2 and num_refused > num_requests / 2
    assert p99_s <= 2 * max(unloaded)
    assert growth_bytes < MAX_GROWTH_BYTES
