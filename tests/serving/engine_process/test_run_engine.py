"""The engine process: same tokens through the socket, and its death and its replica's are noticed
by the other."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.settings.serve import EngineConfig
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from raymill.errors import UserError
from serving.engine.block_pool import BlockPool
from serving.engine.engine import Engine
from serving.engine.messages import (
    Candidates,
    FinishReason,
    SequenceRequest,
    StepReport,
    TokenEvent,
    encode_message,
    parse_request,
)
from serving.engine.runner import Reading
from serving.engine.scheduler import Scheduler
from serving.engine.torch_runner import TorchRunner
from serving.engine_process.client import EngineClient, EngineDiedError, submission
from serving.engine_process.generation import Generation
from serving.engine_process.report_reader import parse_report
from serving.engine_process.run_engine import Channel, build_engine, run_engine, warm_up
from tests.repository import REPOSITORY
from tests.serving.engine_processes import START, engine
from tests.time_limits import limit_s
from tests.waiting import wait_in_loop_until

GREEDY = SamplingParams(temperature=0.0)


def request(
    client: EngineClient, prompt_ids: list[int], *, max_tokens: int = 20
) -> SequenceRequest:
    return SequenceRequest(client.next_seq_id(), prompt_ids, max_tokens, GREEDY)


async def collect(generation: Generation) -> list[int | None]:
    return [event.token_id async for event in generation]


def test_messages_arrive_whole_however_they_are_cut() -> None:
    messages = [{"a": [1, None, "é"]}, [], {"b": "x" * 1000}]
    stream = b"".join(encode_message(message) for message in messages)
    for size in (1, 3, 7, len(stream)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            channel, arrived = Channel(theirs), []
            for start in range(0, len(stream), size):
                ours.sendall(stream[start : start + size])
                arrived += channel.receive(wait=True)
        assert arrived == messages


def test_messages_survive_the_wire() -> None:
    sampling = SamplingParams(temperature=0.5, logit_bias=((3, -1.5), (7, 2.0)), seed=2**63 - 1)
    sent = SequenceRequest(
        1,
        [1, 2],
        3,
        sampling,
        ignore_eos=True,
        stop_token_ids=(5, 6),
        min_tokens=2,
        num_logprobs=2,
        embed=True,
    )
    [line, rest] = submission(sent).split(b"\n")
    assert parse_request(json.loads(line)["submit"]) == sent and not rest
    event = TokenEvent(
        1,
        5,
        FinishReason.STOP,
        Candidates(-0.5, [(5, -0.5)], 1),
        [None, Candidates(-1.0, [], 7)],
        "AACAPw==",
    )
    report = StepReport([event], 1, 2, 0.25, 30, 31, 40, 16, (0.5,))
    assert parse_report(encode_message(report)) == report
    assert parse_report(encode_message(report)).events[0].finish_reason is FinishReason.STOP


@pytest.mark.more
def test_tokens_equal_generate_and_cancel_frees_the_slot(
    checkpoint: Path, model: GPT, prompts: list[list[int]]
) -> None:
    async def scenario() -> None:
        async with engine(checkpoint) as client:
            generations = [client.submit([request(client, prompt)]) for prompt in prompts]
            for prompt, output in zip(
                prompts, await asyncio.gather(*map(collect, generations)), strict=True
            ):
                assert output == generate(model, prompt, max_tokens=20, params=GREEDY, eos_id=None)
            assert client.num_open_sequences == 0

            few = client.submit([request(client, prompt) for prompt in prompts], at_once=2)
            most, outputs = 0, {}
            async for event in few:
                most = max(most, client.num_open_sequences)
                outputs.setdefault(event.seq_id, []).append(event.token_id)
            assert most == 2 and client.num_open_sequences == 0
            expected = [
                generate(model, prompt, max_tokens=20, params=GREEDY, eos_id=None)
                for prompt in prompts
            ]
            assert [outputs[seq_id] for seq_id in sorted(outputs)] == expected
            left = client.submit([request(client, [1]) for _ in range(50)], at_once=2)
            await anext(aiter(left))
            left.close()
            assert client.num_open_sequences == 0 and not left.unsent

            endless = client.submit([request(client, [1], max_tokens=127) for _ in range(5)])
            assert client.num_open_sequences == 5 and client.ahead("")[:2] == (1, 5)
            async for _event in endless:
                break
            endless.close()
            assert client.num_open_sequences == 0
            await wait_in_loop_until(lambda: (client.num_running, client.num_waiting) == (0, 0))
            assert await collect(client.submit([request(client, prompts[3])])) == generate(
                model, prompts[3], max_tokens=20, params=GREEDY, eos_id=None
            )

    asyncio.run(scenario())


def test_a_killed_engine_ends_open_requests_and_is_no_longer_alive(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with engine(checkpoint, num_slots=1) as client:
            requests = [client.submit([request(client, [1], max_tokens=127)]) for _ in range(8)]
            await anext(aiter(requests[0]))
            assert client.alive
            os.kill(client.pid, signal.SIGKILL)
            outcomes = await asyncio.gather(*map(collect, requests), return_exceptions=True)
            assert all(isinstance(outcome, EngineDiedError) for outcome in outcomes[1:])
            assert not client.alive
            assert "-9" in client.death_notice
            with pytest.raises(EngineDiedError):
                client.submit([request(client, [1])])

    asyncio.run(scenario())


def test_the_engine_ends_with_its_replica(checkpoint: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", START, checkpoint], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    assert psutil.pid_exists(child_pid)
    child = psutil.Process(child_pid)
    parent.kill()
    parent.wait()
    child.wait(timeout=limit_s(10))
    parent.stdout.close()


def test_an_unusable_checkpoint_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        asyncio.run(
            EngineClient.start(
                tmp_path, config=EngineConfig(max_num_seqs=1), eos_id=None, threads=1
            )
        )


class Recorded:
    """A connection that keeps what is sent together."""

    def __init__(self, connection: socket.socket) -> None:
        self.sent: list[list[Any]] = []
        self.fileno, self.recv, self._sendall = (
            connection.fileno,
            connection.recv,
            connection.sendall,
        )

    def sendall(self, data: bytes) -> None:
        self.sent.append([json.loads(line) for line in data.splitlines()])
        self._sendall(data)


@pytest.mark.parametrize(
    ("held_s", "steps"), [(1000.0, [1, 3, 1, 9]), (0.0, [1] * 14)], ids=["held", "at once"]
)
def test_steps_that_are_alike_are_reported_together_unless_a_sequence_begins_or_ends(
    model: GPT, monkeypatch: pytest.MonkeyPatch, held_s: float, steps: list[int]
) -> None:
    """`steps`: how many each report has."""
    monkeypatch.setattr("serving.engine_process.run_engine.HELD_S", held_s)
    pool, runner = BlockPool(64, keep_prefixes=True), TorchRunner(model, num_blocks=64)
    target = Engine(
        runner, Scheduler(pool, max_num_seqs=1, prefill_tokens_per_step=96, eos_id=None)
    )
    ours, theirs = socket.socketpair()
    ours.settimeout(limit_s(60))
    connection = Recorded(theirs)

    def run() -> None:
        with theirs, contextlib.suppress(EOFError, ConnectionError):
            run_engine(target, Channel(connection))  # type: ignore[arg-type]

    with ours, ours.makefile("rb") as file:
        for seq_id, max_tokens in enumerate((4, 10)):
            ours.sendall(submission(SequenceRequest(seq_id, [seq_id, 2], max_tokens, GREEDY)))
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        lines = [file.readline() for _ in range(2 + len(steps))]
    thread.join(limit_s(60))
    assert connection.sent == [[json.loads(line)] for line in lines]
    reports = [parse_report(line) for line in lines if line.startswith(b"[")]
    assert [len(report.steps_s) for report in reports] == steps
    events = [event for report in reports for event in report.events]
    for seq_id, max_tokens in enumerate((4, 10)):
        tokens = [event.token_id for event in events if event.seq_id == seq_id]
        assert tokens == generate(
            model, [seq_id, 2], max_tokens=max_tokens, params=GREEDY, eos_id=None
        )


def test_one_report_tells_only_of_steps_that_drew_a_token_for_the_same_sequences() -> None:
    events = [TokenEvent(1, 5), TokenEvent(2, 6)]
    step = StepReport(events, 2, 0, 0.5, 0, num_tokens=2, steps_s=(0.25,))
    later = step._replace(num_waiting=3, steps_s=(0.5,))
    assert later.is_like(step) and later.is_like(step.after(step))
    assert later.after(step) == later._replace(events=events * 2, steps_s=(0.25, 0.5))
    others: list[dict[str, Any]] = [
        {"events": events[::-1]},
        {"events": events[:1], "num_tokens": 1},
        {"events": [events[0], TokenEvent(2, None, FinishReason.ERROR)]},
        {"num_tokens": 16},  # and a piece of a prompt
        {"num_prompt_tokens": 3},
    ]
    for fields in others:
        assert not later._replace(**fields).is_like(step)


class HeldRunner(TorchRunner):
    """Computes only once it may."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model, num_blocks=64)
        self.may_compute = threading.Event()

    def forward(self, readings: Sequence[Reading]) -> torch.Tensor:
        assert self.may_compute.wait(limit_s(60))
        return super().forward(readings)


def test_what_a_step_begins_with_is_told_before_it_computes(model: GPT) -> None:
    """On a slow processor a step takes longer than `engine.max_queue_s`, which must not look like a
    wait."""
    runner = HeldRunner(model)
    pool = BlockPool(64, keep_prefixes=True)
    target = Engine(
        runner, Scheduler(pool, max_num_seqs=2, prefill_tokens_per_step=96, eos_id=None)
    )
    ours, theirs = socket.socketpair()
    ours.settimeout(limit_s(60))

    def run() -> None:
        with theirs, contextlib.suppress(EOFError, ConnectionError):
            run_engine(target, Channel(theirs))

    with ours:
        for seq_id in range(3):
            ours.sendall(submission(SequenceRequest(seq_id, [seq_id, 2, 3], 1, GREEDY)))
        threading.Thread(target=run, daemon=True).start()
        lines = ours.makefile("rb")
        assert json.loads(lines.readline()) == {"admission": [[0, 1], 2, 1, [0, 0]]}
        runner.may_compute.set()
        assert [event.seq_id for event in parse_report(lines.readline()).events] == [0, 1]


def test_a_warm_up_leaves_nothing_behind(model: GPT) -> None:
    engine = build_engine(model, EngineConfig(max_num_seqs=2), eos_id=None, threads=1)
    warm_up(engine)
    assert not engine.has_work
    engine.submit(SequenceRequest(0, [1, 2, 3], 4, GREEDY))
    drawn = [event.token_id for _ in range(5) for event in engine.step().events]
    assert drawn == generate(model, [1, 2, 3], max_tokens=4, params=GREEDY)


WITHOUT_MEMORY = """
import resource, sys
import psutil
from cluster.settings.serve import EngineConfig
from model.config import GPTConfig
from raymill.errors import UserError
from model.gpt import GPT
from serving.engine_process.run_engine import build_engine

gpt = GPT(GPTConfig(vocab_size=64, n_positions=64, n_layer=4, n_head=4, n_embd=256))
gpt.init_weights(1)
limit = psutil.Process().memory_info().vms + (600 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    build_engine(gpt, EngineConfig(kernels=sys.argv[1], kv_cache_tokens=1 << 18), eos_id=None, threads=1)
except UserError as error:
    print(error)
"""


@pytest.mark.more
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_without_memory_for_the_cache_an_error_names_its_bytes(kernels: str) -> None:
    """On the old code the native kernels ended the process without a word."""
    command = [sys.executable, "-c", WITHOUT_MEMORY, kernels]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit_s(60), check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no memory for the weights and a KV cache of 262144 tokens, 2.00 GiB" in done.stdout


@pytest.mark.more
def test_no_setting_of_vllm_is_in_a_command_line(checkpoint: Path) -> None:
    """They may hold tokens, and every user of the machine sees command lines."""

    async def check() -> None:
        async with engine(checkpoint) as client:
            words = " ".join(psutil.Process(client.pid).cmdline())
            assert "vllm_args" not in words and str(checkpoint) in words

    asyncio.run(check())
