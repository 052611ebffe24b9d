"""A replica that serves outlives whatever fails in the control plane: it is away for a while, and
nothing else."""

import asyncio
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.settings.serve import ServeConfig
from raymill.errors import CheckpointError
from serving.delivery.coordinator import Reply
from serving.delivery.follower import CoordinatorAwayError, Follower, answer_of
from serving.delivery.promotion import Delivery, DeliveryError, version_of
from serving.limits.usage_report import Account, QuotaKind
from serving.protocol.served_model import read_served_model
from tests.waiting import wait_in_loop_until


@pytest.fixture(autouse=True)
def _reports_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.delivery.follower.POLL_S", 0.01)


def failed_task(cause: Exception) -> RayTaskError:
    """As Ray gives an exception of an actor's method to whoever has called it."""
    return RayTaskError("exchange", f"Traceback …\n{cause!r}", cause).as_instanceof_cause()


class Handle:
    """Of a coordinator that gives `answer()`; each method can be called."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer
        self.num_asked = 0
        self.last_asked: tuple[Any, ...] = ()
        self.exchange = self.begin = self.begin_adapters = SimpleNamespace(remote=self._remote)

    async def _remote(self, *arguments: Any) -> Any:
        self.num_asked += 1
        self.last_asked = arguments
        return self.answer()


def raises(error: BaseException) -> Callable[[], Any]:
    def answer() -> Any:
        raise error

    return answer


FAILURES = {
    "a defect": lambda: raises(failed_task(KeyError("delivery"))),
    "a damaged state": lambda: raises(failed_task(DeliveryError("the state is damaged"))),
    "its process died": lambda: raises(ActorDiedError()),
    "it is deployed again": lambda: raises(DeploymentUnavailableError(None)),
    "a reply of other code": lambda: raises(AttributeError("no attribute 'Reply'")),
    "its process ended at work": lambda: raises(asyncio.CancelledError()),
    "no reply at all": lambda: lambda: None,
}


def follower_of(handle: Handle, checkpoint: Path) -> tuple[Follower, Delivery]:
    live = version_of(read_served_model(checkpoint, name=None), checkpoint=str(checkpoint))
    config = ServeConfig(checkpoint=str(checkpoint))
    follower = Follower(config, handle, deployment="d", replica="r", on_live_death=print)  # type: ignore[arg-type]
    return follower, Delivery(deployment="d", model_name="tiny", live=live)


@pytest.mark.more
def test_a_coordinator_that_fails_touches_no_replica_that_serves(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        handle = Handle(lambda: None)
        follower, state = follower_of(handle, checkpoint)
        handle.answer = lambda: Reply(is_ours=True, delivery=state)
        await follower.start()
        try:
            for name, failure in FAILURES.items():
                caplog.clear()
                handle.answer, seen = failure(), handle.num_asked
                await wait_in_loop_until(lambda seen=seen: handle.num_asked > seen + 5)  # type: ignore[misc]
                follower.versions.check_health()
                assert follower.away_s > 0, name
                assert (
                    follower.versions.live.engine.alive
                    and follower.versions.live.model.version == state.live.version
                )
                state = state.model_copy(update={"draining": not state.draining})
                handle.answer = lambda state=state: Reply(is_ours=True, delivery=state)  # type: ignore[misc]
                await wait_in_loop_until(lambda: follower.away_s == 0)
                assert follower.versions.delivery == state, name
                said = [
                    record
                    for record in caplog.records
                    if record.name == "serving.delivery.follower"
                ]
                assert [record.levelname for record in said] == ["ERROR", "WARNING"], (name, said)
                assert (
                    "without the coordinator" in said[0].message
                    and "answers again" in said[1].message
                )
        finally:
            await follower.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())


def test_a_replica_that_starts_waits_for_a_coordinator_that_fails(checkpoint: Path) -> None:
    async def scenario() -> None:
        handle = Handle(lambda: None)
        follower, state = follower_of(handle, checkpoint)
        handle.answer = raises(ActorDiedError())
        starting = asyncio.create_task(follower.start())
        for name in FAILURES.keys() - {"no reply at all"}:
            handle.answer, seen = FAILURES[name](), handle.num_asked
            await wait_in_loop_until(lambda seen=seen: handle.num_asked > seen + 3)  # type: ignore[misc]
            assert not starting.done(), name
        handle.answer = lambda: Reply(is_ours=True, delivery=state)
        await asyncio.wait_for(starting, 60)
        follower.versions.check_health()
        await follower.close()

    asyncio.run(scenario())


def test_a_replica_that_cannot_start_can_be_closed(checkpoint: Path, tmp_path: Path) -> None:
    """Ray Serve closes it then, and an error there would hide the reason."""

    async def scenario() -> None:
        follower, _ = follower_of(Handle(lambda: Reply(is_ours=True, delivery=None)), checkpoint)
        follower.config = ServeConfig(checkpoint=str(tmp_path / "missing"))
        with pytest.raises(CheckpointError, match="unknown checkpoint"):
            await follower.start()
        await follower.close()

    asyncio.run(scenario())


def test_a_replica_begins_the_adapters_of_the_settings_that_have_not_begun(
    checkpoint: Path, tmp_path: Path
) -> None:
    """By their exact checkpoint, also where the settings name a run."""
    newest = tmp_path / "runs/sql/checkpoints/step-000000007"
    shutil.copytree(checkpoint, newest)

    async def scenario() -> None:
        handle = Handle(lambda: None)
        follower, state = follower_of(handle, checkpoint)
        places = {"support": "elsewhere", "sql": str(tmp_path / "runs/sql")}
        follower.config = follower.config.model_copy(update={"adapters": places})
        state = state.having(adapters={"support": state.having(deployment="elsewhere")})
        asked = await follower._with_adapters(state)
        assert asked is None and handle.num_asked == 1
        named, versions = handle.last_asked
        assert named == places and list(versions) == ["sql"]
        assert versions["sql"].checkpoint == str(newest)

    asyncio.run(scenario())


def test_a_replica_that_ends_tells_what_keys_were_charged_last(checkpoint: Path) -> None:
    async def scenario() -> None:
        handle = Handle(lambda: None)
        follower, state = follower_of(handle, checkpoint)
        handle.answer = lambda: Reply(is_ours=True, delivery=state)
        await follower.start()
        charged = Account("alice", QuotaKind.TOKENS_PER_DAY)
        follower.usage.charge(charged, 7.0)
        await follower.close()
        _, report, used = handle.last_asked
        assert report.is_leaving and used.charges_s == {charged: 7.0}

    asyncio.run(scenario())


def test_an_operator_hears_what_was_wrong_with_the_order_and_else_that_nobody_answers() -> None:
    async def asked(error: BaseException) -> None:
        await answer_of(Handle(raises(error)).exchange.remote())

    with pytest.raises(DeliveryError, match="a promotion is on"):
        asyncio.run(asked(failed_task(DeliveryError("a promotion is on"))))
    with pytest.raises(CoordinatorAwayError, match="KeyError"):
        asyncio.run(asked(failed_task(KeyError("delivery"))))


def test_a_caller_that_is_cancelled_stays_cancelled() -> None:
    async def scenario() -> None:
        async def never() -> None:
            await asyncio.Event().wait()

        task = asyncio.create_task(answer_of(never()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
