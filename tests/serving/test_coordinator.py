"""The coordinator outlives itself: its state is in the storage, a folder or S3, or it says that it is not."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest

from cluster.config import StorageConfig
from cluster.registry import served_checkpoints
from cluster.serve_config import ServeConfig
from cluster.storage import Storage, open_storage
from serving.coordinator import Coordinator
from serving.promotion import DeliveryError, Phase, ReplicaReport, SlotReport, SlotStatus, Terms, Version

OLD, NEW = (Version(checkpoint=f"/{name}", version=name) for name in ("old", "new"))
READY = SlotReport(SlotStatus.READY)


@dataclass(frozen=True)
class Root:
    """A storage, and a way to lose it."""

    uri: str
    lose: Callable[[], None]

    @property
    def storage(self) -> Storage:
        return open_storage(self.uri)


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "folder":

        def replace_by_a_file() -> None:
            (tmp_path / "endpoints").rename(tmp_path / "away")
            (tmp_path / "endpoints").write_text("a file where the folder should be")

        return Root(str(tmp_path), replace_by_a_file)
    server, bucket = request.getfixturevalue("s3_server"), request.getfixturevalue("s3_bucket")

    def delete_the_bucket() -> None:
        found = boto3.resource("s3", endpoint_url=server).Bucket(bucket)
        found.objects.all().delete()
        found.delete()

    return Root(f"s3://{bucket}/serving", delete_the_bucket)


def coordinator(root: Root, deployment: str = "one") -> Coordinator:
    return Coordinator(ServeConfig(storage=StorageConfig(uri=root.uri)), deployment=deployment)


async def promoted(one: Coordinator) -> None:
    """From the first replica's begin to the watch."""
    assert (await one.exchange("one", ReplicaReport("r"))).delivery is None
    await one.begin("tiny", OLD)
    await one.promote(NEW, Terms(watch_s=1000))
    reply = await one.exchange("one", ReplicaReport("r", 1, {1: READY, 2: READY}))
    assert reply.is_ours and reply.delivery is not None and reply.delivery.phase is Phase.WATCHING


def test_what_was_promoted_is_known_after_the_death_of_the_coordinator(root: Root) -> None:
    async def check() -> None:
        await promoted(coordinator(root))
        assert served_checkpoints(root.storage) == {"/old", "/new"}
        again = coordinator(root)
        reply = await again.exchange("one", ReplicaReport("another"))
        assert reply.delivery is not None and reply.delivery.live.version == "new"
        assert (await again.roll_back("why")).live.version == "old"
        assert (await coordinator(root).status())["delivery"]["live"]["version"] == "old"

    asyncio.run(check())


def test_a_canary_and_the_history_are_known_too(root: Root) -> None:
    async def check() -> None:
        one = coordinator(root)
        await promoted(one)
        await one.roll_back("too slow")
        await one.promote(NEW, Terms(watch_s=1000, canary_percent=12.5))
        await one.exchange("one", ReplicaReport("r", 1, {1: READY, 3: READY}))
        state = (await coordinator(root).status())["delivery"]
        assert state["phase"] == "canary" and state["terms"]["canary_percent"] == 12.5
        assert state["candidate"]["serial"] == 3
        assert [(ended["version"]["serial"], ended["result"], ended["reason"]) for ended in state["history"]] == [
            (2, "rolled_back", "too slow")
        ]

    asyncio.run(check())


def test_an_endpoint_that_is_started_anew_serves_what_it_is_told(root: Root) -> None:
    async def check() -> None:
        old = coordinator(root)
        await promoted(old)
        new = coordinator(root, "two")
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
        [entry] = root.storage.list("endpoints/")
        stored = json.loads(root.storage.read_bytes(entry.key))
        assert stored["delivery"]["deployment"] == "two", "the old one no longer writes"

    asyncio.run(check())


def test_a_storage_that_takes_nothing_refuses_a_promotion_but_not_a_rollback(root: Root) -> None:
    async def check() -> None:
        one = coordinator(root)
        await promoted(one)
        root.lose()
        assert (await one.roll_back("why")).live.version == "old"
        assert (await one.status())["is_stored"] is False
        with pytest.raises(DeliveryError, match="could not be stored"):
            await one.promote(NEW, Terms(watch_s=0))
        assert (await one.status())["delivery"]["phase"] == "steady"

    asyncio.run(check())


def test_a_promotion_that_is_not_stored_does_not_begin(root: Root) -> None:
    async def check() -> None:
        one = coordinator(root)
        await one.begin("tiny", OLD)
        root.lose()
        with pytest.raises(DeliveryError, match="could not be stored"):
            await one.promote(NEW, Terms(watch_s=0))
        status = await one.status()
        assert status["delivery"]["phase"] == "steady" and status["is_stored"] is True

    asyncio.run(check())
