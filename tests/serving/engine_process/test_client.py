"""The replica's side of the engine process: whom it hands tokens to, and an engine that sends what it
should not."""

import asyncio
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.settings.serve import EngineConfig
from model.generation.generate import generate
from model.generation.sampling_params import SamplingParams
from model.gpt import GPT
from serving.engine.messages import (
    Admission,
    Candidates,
    FinishReason,
    MetricFamily,
    SequenceRequest,
    StepReport,
    TokenEvent,
    encode_message,
)
from serving.engine_process.client import EngineClient, EngineDiedError
from serving.engine_process.report_reader import MessageError, parse_message
from tests.serving.engine_processes import engine

GREEDY = SamplingParams(temperature=0.0)
REPORT = StepReport([TokenEvent(3, 7, None, None, None)], 1, 0, 0.5, 4)
OTHERS: dict[str, object] = {
    "a token that is no number": REPORT._replace(
        events=[REPORT.events[0]._replace(token_id="seven")]
    ),
    "an unknown end": REPORT._replace(events=[REPORT.events[0]._replace(finish_reason="tired")]),
    "a token without its sequence": REPORT._replace(events=[(7,)]),
    "a sequence of another kind": REPORT._replace(events=[("three", 7, "length")]),
    "an end of another kind": REPORT._replace(events=[(3, 7, ["length"])]),
    "no list of events": [3, *REPORT[1:]],
    "too few figures": REPORT[:3],
    "a share that is a text": REPORT._replace(kv_cache_usage="half"),
    "a time that is a text": REPORT._replace(steps_s=("long",)),
    "a time that is no list": [*REPORT[:-1], 0.5],
    "another kind": {"tokens": [1, 2]},
    "an admission of texts": {"admission": [["one"], 1, 0]},
    "a number": 5,
}

SENDS_GARBAGE = """#!{python}
import json, socket, sys
engine = socket.socket(fileno=json.loads(sys.argv[3])["socket"])
engine.recv(1 << 16)
engine.sendall(b'{{"ready": ["float32", 4, 64]}}\\n')
engine.recv(1 << 16)
engine.sendall(b'[[[0, "seven", null, null, null, null]], 1, 0, 0.5, 4, 0, 0, 0, [0.5]]\\n')
engine.recv(1 << 16)
"""


def sequence(client: EngineClient, *, max_tokens: int = 20) -> SequenceRequest:
    return SequenceRequest(client.next_seq_id(), [1, 2], max_tokens, GREEDY)


def test_messages_of_an_engine_are_told_apart() -> None:
    assert parse_message(encode_message(REPORT)) == REPORT
    admission = Admission([3], 1, 0, [16])
    assert parse_message(encode_message({"admission": admission})) == admission
    ended = [
        TokenEvent(4, 2, FinishReason.LENGTH),
        TokenEvent(5, None, FinishReason.ERROR),
        TokenEvent(6, 1, None, Candidates(-math.inf, [(1, -math.inf)], 9), [None], "AA=="),
    ]
    for events in ([], REPORT.events + ended[:1], REPORT.events + ended):
        report = REPORT._replace(events=events)
        assert parse_message(encode_message(report)) == report
        assert all(type(event) is TokenEvent for event in report.events)
    families = [MetricFamily("vllm:n", "counter", "of", [("vllm:n_total", {"a": "b"}, 1.0)])]
    assert parse_message(encode_message({"metrics": families})) == families


@pytest.mark.parametrize("message", OTHERS.values(), ids=OTHERS.keys())
def test_a_message_of_another_shape_is_refused(message: object) -> None:
    with pytest.raises(MessageError, match="a message of"):
        parse_message(encode_message(message))
    with pytest.raises(MessageError, match="no JSON"):
        parse_message(b'{"admission": [[1]')


def test_an_engine_that_cannot_be_understood_is_ended_with_a_sentence(tmp_path: Path) -> None:
    script = tmp_path / "engine"
    script.write_text(SENDS_GARBAGE.format(python=sys.executable))
    script.chmod(0o700)
    config = EngineConfig(backend="vllm", vllm_python=str(script))

    async def scenario() -> None:
        client = await EngineClient.start(tmp_path, config=config, eos_id=None, threads=1)
        generation = client.submit([sequence(client)])
        with pytest.raises(EngineDiedError, match=r"it was ended.*valid integer"):
            await generation.next()
        assert not client.alive and client.num_open_sequences == 0
        await client.close()

    asyncio.run(scenario())


def test_tokens_are_handed_over_until_the_end_or_an_error(checkpoint: Path, model: GPT) -> None:
    async def scenario() -> None:
        async with engine(checkpoint) as client:
            tokens: list[int | None] = []
            await client.submit([sequence(client), sequence(client)]).hand_to(
                lambda events: tokens.extend(event.token_id for event in events)
            )
            alone = generate(model, [1, 2], max_tokens=20, params=GREEDY, eos_id=None)
            assert sorted(map(str, tokens)) == sorted(map(str, alone * 2))

            def fail(events: Iterator[TokenEvent]) -> None:
                raise ConnectionError(f"after {len(list(events))}")

            failing = client.submit([sequence(client, max_tokens=100)])
            with pytest.raises(ConnectionError, match="after"):
                await failing.hand_to(fail)
            failing.close()
            assert client.num_open_sequences == 0

            endless = client.submit([sequence(client, max_tokens=120) for _ in range(50)])
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(EngineDiedError):
                await endless.hand_to(lambda events: tokens.extend(e.token_id for e in events))

    asyncio.run(scenario())
