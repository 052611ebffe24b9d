"""Who waits for whom: a key for itself, and no other key for long, on the real engine too and with
the same tokens."""

import asyncio
from collections import defaultdict
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from serving.engine.messages import SequenceRequest
from serving.engine_process.client import EngineClient
from serving.engine_process.fair_queue import FairLine, FairQueue
from serving.engine_process.generation import Generation
from tests.serving.engine_processes import engine
from tests.waiting import wait_in_loop_until

GREEDY = SamplingParams(temperature=0.0)
LONGEST = 30  # tokens of a prompt, and of an answer


def sequence(seq_id: int, num_tokens: int = 10) -> SequenceRequest:
    return SequenceRequest(seq_id, [1] * (num_tokens - num_tokens // 2), num_tokens // 2, GREEDY)


def queue_of(*keys: str) -> FairQueue:
    """One sequence for each, numbered from 0."""
    queue = FairQueue()
    for seq_id, key in enumerate(keys):
        queue.put(sequence(seq_id), key=key)
    return queue


def taken(queue: FairQueue) -> list[int]:
    return [queue.take().seq_id for _ in range(len(queue))]


def test_one_key_is_served_in_order_of_arrival() -> None:
    assert taken(queue_of(*"aaaa")) == [0, 1, 2, 3]


def test_keys_take_turns() -> None:
    assert taken(queue_of(*"aaaaabbc")) == [0, 5, 7, 1, 6, 2, 3, 4]


def test_a_key_that_comes_later_is_next_and_has_nothing_to_catch_up_on() -> None:
    queue = queue_of(*"aaaaaaaaa")
    assert [queue.take().seq_id for _ in range(4)] == [0, 1, 2, 3]
    for seq_id in (20, 21, 22):
        queue.put(sequence(seq_id), key="b")
    assert taken(queue) == [20, 4, 21, 5, 22, 6, 7, 8]


def test_turns_are_counted_in_tokens() -> None:
    queue = FairQueue()
    for seq_id in range(4):
        queue.put(sequence(seq_id, 40), key="a")
    for seq_id in range(10, 18):
        queue.put(sequence(seq_id, 10), key="b")
    assert taken(queue) == [0, 10, 11, 12, 13, 1, 14, 15, 16, 17, 2, 3]


def test_what_is_not_wanted_any_more_costs_its_key_nothing() -> None:
    queue = queue_of(*"aaaab")
    assert queue.remove(0) and queue.remove(2) and not queue.remove(2)
    queue.put(sequence(9), key="a")
    queue.put(sequence(10), key="b")
    assert taken(queue) == [1, 4, 3, 10, 9]


def test_what_is_not_wanted_any_more_moves_no_other_key() -> None:
    queue = queue_of(*"aabb")
    assert queue.remove(1)
    queue.put(sequence(9), key="c")
    assert taken(queue) == [0, 2, 9, 3]


def test_a_key_takes_back_the_turns_of_what_is_not_wanted_any_more() -> None:
    queue = queue_of(*"aabbbb")
    assert queue.remove(1)
    queue.put(sequence(9), key="a")
    assert taken(queue) == [0, 2, 3, 9, 4, 5]


def test_what_costs_more_or_less_than_was_expected_moves_its_keys_next_turn() -> None:
    line: FairLine[str] = FairLine()
    for number in range(4):
        line.hold(f"a{number}", key="a", number=number, cost=20)
    assert line.take() == "a0"
    line.charge("a", 100)
    for number, key in enumerate("bbbba", 4):
        line.hold(f"{key}{number}", key=key, number=number, cost=20)
        line.charge(key, -15)
    assert [line.take() for _ in range(len(line))] == [
        "b4",
        "b5",
        "b6",
        "b7",
        "a1",
        "a2",
        "a3",
        "a8",
    ]


def test_what_a_key_is_given_back_before_its_first_item_puts_it_before_no_other() -> None:
    line: FairLine[str] = FairLine()
    line.charge("b", -5)
    line.hold("a0", key="a", number=0, cost=20)
    line.hold("b1", key="b", number=1, cost=20)
    assert [line.take(), line.take()] == ["a0", "b1"]


def test_those_behind_are_those_that_a_new_one_would_pass() -> None:
    queue = queue_of(*"aaaab")
    assert [request.seq_id for request in queue.behind("c")] == [1, 2, 3]
    assert [request.seq_id for request in queue.behind("b")] == [2, 3]
    assert queue.behind("a") == []


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(2, 50),
        st.sampled_from(["put", "put", "take", "remove"]),
    )
)


@given(ACTIONS)
def test_whatever_happens_each_key_has_its_order_and_loses_nothing(
    actions: list[tuple[str, int, str]],
) -> None:
    queue, waiting, came_out = FairQueue(), defaultdict[str, list[int]](list), []
    key_of: dict[int, str] = {}

    def take() -> None:
        seq_id = queue.take().seq_id
        assert waiting[key_of[seq_id]].pop(0) == seq_id
        came_out.append(seq_id)

    for seq_id, (key, num_tokens, action) in enumerate(actions):
        if action == "put":
            before = [request.seq_id for request in queue.behind(key)]
            queue.put(sequence(seq_id, num_tokens), key=key)
            key_of[seq_id] = key
            waiting[key].append(seq_id)
            assert len(queue) == sum(map(len, waiting.values())) and set(before).isdisjoint(
                waiting[key]
            )
        elif action == "take" and len(queue):
            take()
        elif action == "remove" and waiting[key]:
            assert queue.remove(waiting[key].pop(num_tokens % len(waiting[key])))
    while len(queue):
        take()
    assert not any(waiting.values())


@given(
    st.lists(st.integers(2, 50), min_size=30, max_size=30),
    st.lists(st.integers(2, 50), min_size=30, max_size=30),
)
def test_keys_that_wait_get_the_same_number_of_tokens(of_a: list[int], of_b: list[int]) -> None:
    queue = FairQueue()
    sizes = dict(enumerate(of_a)) | dict(enumerate(of_b, 100))
    for seq_id, num_tokens in sizes.items():
        queue.put(sequence(seq_id, num_tokens), key="a" if seq_id < 100 else "b")
    given_tokens = {"a": 0, "b": 0}
    left = {"a": 30, "b": 30}
    while all(left.values()):
        assert abs(given_tokens["a"] - given_tokens["b"]) <= 50
        seq_id = queue.take().seq_id
        key = "a" if seq_id < 100 else "b"
        given_tokens[key] += sizes[seq_id]
        left[key] -= 1


async def collect(name: str, generation: Generation, ended: list[str]) -> list[int | None]:
    tokens = [event.token_id async for event in generation]
    ended.append(name)
    return tokens


def asked(client: EngineClient, prompt_ids: list[int]) -> SequenceRequest:
    return SequenceRequest(client.next_seq_id(), prompt_ids, LONGEST, GREEDY)


def test_a_key_with_a_long_queue_keeps_no_other_waiting(
    checkpoint: Path, model: GPT, prompts: list[list[int]]
) -> None:
    async def scenario() -> None:
        async with engine(checkpoint, num_slots=2) as client:
            ended: list[str] = []
            many = [
                collect("a", client.submit([asked(client, prompts[i % 8])], key="a"), ended)
                for i in range(24)
            ]
            tasks = [asyncio.create_task(one) for one in many]
            assert client.ahead("a")[1] == client.num_open_sequences == 24
            assert client.ahead("b")[1] <= 3
            few = [
                asyncio.create_task(
                    collect("b", client.submit([asked(client, prompts[i])], key="b"), ended)
                )
                for i in range(3)
            ]
            outputs = await asyncio.gather(*tasks, *few)
            assert ended.index("b") <= 4, "after what the engine had already"
            assert len(ended) - 1 - ended[::-1].index("b") <= 9
            for i, output in enumerate(outputs):
                prompt = prompts[i % 8]  # 24 is a multiple of 8
                assert output == generate(
                    model, prompt, max_tokens=LONGEST, params=GREEDY, eos_id=None
                )
            assert (client.num_open_sequences, client.ahead("a")[1]) == (0, 0)

    asyncio.run(scenario())


def test_a_client_that_leaves_the_queue_was_never_at_the_engine(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with engine(checkpoint, num_slots=1) as client:
            generations = [client.submit([asked(client, [1])], key="a") for _ in range(6)]
            for generation in generations[1:]:
                generation.close()
            assert client.num_open_sequences == 1
            assert len(await collect("a", generations[0], [])) == LONGEST
            await wait_in_loop_until(lambda: (client.num_running, client.num_waiting) == (0, 0))

    asyncio.run(scenario())
