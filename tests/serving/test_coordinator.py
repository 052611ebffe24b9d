"""The coordinator outlives itself: its state is in the storage, or it says that it is not."""

import asyncio
import json
from pathlib import Path

import pytest

from cluster.config import StorageConfig
from cluster.registry import served_checkpoints
from cluster.serve_config import ServeConfig
from cluster.storage import open_storage
from serving.coordinator import Coordinator
from serving.promotion import DeliveryError, Phase, ReplicaReport, SlotReport, SlotStatus, Terms, Version

OLD, NEW = (Version(checkpoint=f"/{name}", version=name) for name in ("old", "new"))
READY = SlotReport(SlotStatus.READY)


def coordinator(root: Path, deployment: str = "one") -> Coordinator:
    return Coordinator(ServeConfig(storage=StorageConfig(uri=str(root))), deployment=deployment)


async def promoted(one: Coordinator) -> None:
    """From the first replica's begin to the watch."""
    assert (await one.exchange("one", ReplicaReport("r"))).delivery is None
    await one.begin("tiny", OLD)
    await one.promote(NEW, Terms(watch_s=1000))
    reply = await one.exchange("one", ReplicaReport("r", 1, {1: READY, 2: READY}))
    assert reply.is_ours and reply.delivery is not None and reply.delivery.phase is Phase.WATCHING


def test_what_was_promoted_is_known_after_the_death_of_the_coordinator(tmp_path: Path) -> None:
    async def check() -> None:
        await promoted(coordinator(tmp_path))
        assert served_checkpoints(open_storage(str(tmp_path))) == {"/old", "/new"}
        again = coordinator(tmp_path)
        reply = await again.exchange("one", ReplicaReport("another"))
        assert reply.delivery is not None and reply.delivery.live.version == "new"
        assert (await again.roll_back("why")).live.version == "old"
        assert (await coordinator(tmp_path).status())["delivery"]["live"]["version"] == "old"

    asyncio.run(check())


def test_an_endpoint_that_is_started_anew_serves_what_it_is_told(tmp_path: Path) -> None:
    async def check() -> None:
        old = coordinator(tmp_path)
        await promoted(old)
        new = coordinator(tmp_path, "two")
        stranger = await new.exchange("one", ReplicaReport("r"))
        assert not stranger.is_ours and stranger.delivery is None, "a replica of the deployment before asks on"
        with pytest.raises(DeliveryError, match="no replica has started"):
            await new.promote(NEW, Terms(watch_s=0))
        await old.drain(True)  # the last word of the old one is in the storage now
        assert (await new.begin("tiny", OLD)).live.version == "old"
        assert (await new.begin("tiny", NEW)).live.version == "old", "the first replica's word counts"
        with pytest.raises(DeliveryError, match="could not be stored"):
            await old.roll_back("why")
            await old.promote(NEW, Terms(watch_s=0))
        stored = json.loads(next(tmp_path.glob("endpoints/*.json")).read_bytes())
        assert stored["delivery"]["deployment"] == "two", "the old one no longer writes"

    asyncio.run(check())


def test_a_storage_that_takes_nothing_refuses_a_promotion_but_not_a_rollback(tmp_path: Path) -> None:
    async def check() -> None:
        one = coordinator(tmp_path)
        await promoted(one)
        folder = tmp_path / "endpoints"
        folder.rename(tmp_path / "away")
        folder.write_text("a file where the folder should be")
        assert (await one.roll_back("why")).live.version == "old"
        assert (await one.status())["is_stored"] is False
        with pytest.raises(DeliveryError, match="could not be stored"):
            await one.promote(NEW, Terms(watch_s=0))
        assert (await one.status())["delivery"]["phase"] == "steady"

    asyncio.run(check())


def test_a_promotion_that_is_not_stored_does_not_begin(tmp_path: Path) -> None:
    async def check() -> None:
        one = coordinator(tmp_path)
        await one.begin("tiny", OLD)
        (tmp_path / "endpoints").rename(tmp_path / "away")
        (tmp_path / "endpoints").write_text("a file where the folder should be")
        with pytest.raises(DeliveryError, match="could not be stored"):
            await one.promote(NEW, Terms(watch_s=0))
        status = await one.status()
        assert status["delivery"]["phase"] == "steady" and status["is_stored"] is True

    asyncio.run(check())
