"""Replica and engine process: whichever is stopped, the other ends it within seconds."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from model.generation.sampling_params import SamplingParams
from serving.engine.messages import SequenceRequest
from serving.engine_process import health
from serving.engine_process.client import EngineClient, EngineDiedError
from serving.engine_process.health import HealthCheck
from serving.engine_process.peer_watchdog import BEAT_S, SILENT_S, STOPPED_S, Silence, is_hung
from tests.serving.engine_processes import START, engine
from tests.time_limits import limit_s
from tests.waiting import wait_in_loop_until

NOTICED_S = 5.0


def test_a_process_that_computes_is_given_more_time_than_one_that_is_stopped() -> None:
    assert is_hung(silent_s=STOPPED_S + 0.5, idle_s=STOPPED_S)  # stopped in the middle of its work
    assert not is_hung(silent_s=STOPPED_S + 0.5, idle_s=STOPPED_S - 0.1)
    assert is_hung(silent_s=SILENT_S, idle_s=0) and not is_hung(silent_s=SILENT_S - 0.1, idle_s=0.5)


def test_silence_counts_only_the_time_in_which_we_listened() -> None:
    now_s = 0.0
    silence = Silence(lambda: now_s)

    def look(after_s: float, *, sign: bool) -> float:
        nonlocal now_s
        now_s += after_s
        silence.observe(sign=sign)
        return silence.seconds

    assert look(BEAT_S, sign=False) == BEAT_S
    assert look(3600, sign=False) == 3 * BEAT_S  # the machine slept
    assert look(BEAT_S, sign=True) == 0
    assert look(BEAT_S, sign=False) == BEAT_S


def test_a_stopped_replica_is_killed_by_its_engine(checkpoint: Path) -> None:
    replica = subprocess.Popen(
        [sys.executable, "-c", START, checkpoint], stdout=subprocess.PIPE, text=True
    )
    assert replica.stdout is not None
    child = psutil.Process(int(replica.stdout.readline()))
    os.kill(replica.pid, signal.SIGSTOP)
    stopped_s = time.monotonic()
    assert replica.wait(timeout=limit_s(20)) == -signal.SIGKILL
    assert STOPPED_S - 2 * BEAT_S < time.monotonic() - stopped_s < limit_s(NOTICED_S)
    child.wait(timeout=limit_s(10))
    replica.stdout.close()


def open_request(client: EngineClient) -> SequenceRequest:
    return SequenceRequest(
        client.next_seq_id(), [1], 127, SamplingParams(temperature=0.0), ignore_eos=True
    )


@pytest.mark.parametrize("idle", [True, False])
def test_a_stopped_engine_is_killed_by_its_replica(checkpoint: Path, idle: bool) -> None:
    async def scenario() -> None:
        async with engine(checkpoint) as client:
            notices: list[str] = []
            client.on_death = notices.append
            # Before the request, which it would otherwise soon have answered
            os.kill(client.pid, signal.SIGSTOP)
            generation = None if idle else client.submit([open_request(client)])
            await wait_in_loop_until(lambda: bool(notices), timeout_s=NOTICED_S)
            assert "-9" in notices[0]
            if generation is not None:
                with pytest.raises(EngineDiedError):
                    [event async for event in generation]

    asyncio.run(scenario())


def test_an_engine_that_beats_and_makes_no_progress_is_killed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with engine(checkpoint) as client:
            check = HealthCheck(client, prompt_ids=[0])
            monkeypatch.setattr(health, "STALLED_S", 0.2)
            await asyncio.sleep(0.3)
            check.check()  # idle is no stall
            os.kill(client.pid, signal.SIGSTOP)  # well within what the watchdog allows for
            client.submit([open_request(client)])
            check.check()
            await asyncio.sleep(0.5)
            check.check()
            await wait_in_loop_until(lambda: not client.alive, timeout_s=1)

    asyncio.run(scenario())
