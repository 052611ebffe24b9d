"""The coordinator outlives itself: its state is in the storage, a folder or S3, or it says that it
is not."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from cluster.settings.run import StorageConfig
from cluster.settings.serve import DeliveryConfig, ServeConfig
from cluster.storage.registry import served_checkpoints
from cluster.storage.uris import Storage, StorageError, open_storage
from raymill.errors import UserError
from serving.app import run
from serving.delivery import coordinator as coordinator_module
from serving.delivery.coordinator import Coordinator
from serving.delivery.promotion import (
    Delivery,
    DeliveryError,
    Phase,
    ReplicaReport,
    SlotReport,
    SlotStatus,
    Terms,
    Version,
)
from serving.delivery.version_stats import VersionStats
from tests.time_limits import limit_s
from tests.waiting import wait_in_loop_until

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
    assert (
        reply.is_ours
        and reply.delivery is not None
        and reply.delivery.phase is Phase.WATCHING
        and reply.is_stored
    )


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


@pytest.mark.parametrize("is_leaving", [True, False])
def test_a_replica_that_ends_with_new_weights_in_its_only_engine_is_their_fault_unless_it_leaves(
    is_leaving: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        one = Coordinator(ServeConfig(storage=StorageConfig(uri=str(tmp_path))), deployment="one")
        await promoted(one)
        slots = {1: READY, 2: SlotReport(SlotStatus.READY, in_place=True)}
        await one.exchange("one", ReplicaReport("other", 2, slots, is_leaving=is_leaving))
        assert len((await one.status())["replicas"]) == (1 if is_leaving else 2)
        monkeypatch.setattr("serving.delivery.coordinator.REPLICA_LOST_S", 0.05)
        await asyncio.sleep(0.1)
        reply = await one.exchange("one", ReplicaReport("r", 2, {1: READY, 2: READY}))
        assert reply.delivery is not None
        assert reply.delivery.phase is (Phase.WATCHING if is_leaving else Phase.STEADY)

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
        assert [
            (ended["version"]["serial"], ended["result"], ended["reason"])
            for ended in state["history"]
        ] == [(2, "rolled_back", "too slow")]

    asyncio.run(check())


def test_an_endpoint_that_is_started_anew_serves_what_it_is_told(root: Root) -> None:
    async def check() -> None:
        old = coordinator(root)
        await promoted(old)
        new = coordinator(root, "two")
        stranger = await new.exchange("one", ReplicaReport("r"))
        assert not stranger.is_ours and stranger.delivery is None, (
            "a replica of the deployment before asks on"
        )
        with pytest.raises(DeliveryError, match="no replica has started"):
            await new.promote(NEW, Terms(watch_s=0))
        await old.drain(True)  # the last word of the old one is in the storage now
        assert (await new.begin("tiny", OLD)).live.version == "old"
        assert (await new.begin("tiny", NEW)).live.version == "old", (
            "the first replica's word counts"
        )
        with pytest.raises(DeliveryError, match="could not be stored"):
            await old.roll_back("why")
            await old.promote(NEW, Terms(watch_s=0))
        assert stored(root)["delivery"]["deployment"] == "two", "the old one no longer writes"

    asyncio.run(check())


def test_a_storage_that_takes_nothing_refuses_a_promotion_but_not_a_rollback(root: Root) -> None:
    async def check() -> None:
        one = coordinator(root)
        await promoted(one)
        root.lose()
        assert (await one.roll_back("why")).live.version == "old"
        assert (await one.status())["is_stored"] is False
        assert not (await one.exchange("one", ReplicaReport("r"))).is_stored
        with pytest.raises(DeliveryError, match="could not be stored"):
            await one.promote(NEW, Terms(watch_s=0))
        assert (await one.status())["delivery"]["phase"] == "steady"

    asyncio.run(check())


def test_a_promotion_that_is_not_stored_does_not_begin(root: Root) -> None:
    async def check() -> None:
        one = coordinator(root)
        await one.begin("tiny", OLD)
        root.lose()
        with pytest.raises(DeliveryError, match=r"could not be stored.*The reason: \S"):
            await one.promote(NEW, Terms(watch_s=0))
        status = await one.status()
        assert status["delivery"]["phase"] == "steady" and status["is_stored"] is True

    asyncio.run(check())


def with_adapters(root: Root, **named: str) -> Coordinator:
    """Its replicas have places for three adapters."""
    settings = {
        "storage": {"uri": root.uri},
        "adapters": NAMED | named,
        "engine": {"backend": "vllm", "max_adapters": 3},
    }
    return Coordinator(ServeConfig.model_validate(settings), deployment="one")


NAMED = {"support": "runs/support", "sql": "runs/sql"}


def adapter(place: str) -> Version:
    return Version(checkpoint=place, version=place, lineage={"run_id": "r", "base_hash": "old"})


def replica(name: str = "r", **adapters: tuple[int, dict[int, SlotReport]]) -> ReplicaReport:
    """Its report; of each adapter the epoch and the slots."""
    parts = {of_one: ReplicaReport(name, *part) for of_one, part in adapters.items()}
    return ReplicaReport(name, 1, {1: READY}, adapters=parts)


async def serving(one: Coordinator) -> None:
    await one.begin("tiny", OLD)
    await one.begin_adapters(NAMED, {name: adapter(f"/{name}/1") for name in NAMED})


def test_an_adapter_is_promoted_by_its_name_and_known_after_a_restart(root: Root) -> None:
    async def check() -> None:
        one = with_adapters(root)
        await serving(one)
        assert served_checkpoints(root.storage) == {"/old", "/support/1", "/sql/1"}
        await one.promote(adapter("/support/2"), Terms(watch_s=1000), "support")
        with pytest.raises(DeliveryError, match="need places for 4 adapters, and have 3"):
            await one.promote(adapter("/sql/2"), Terms(watch_s=0), "sql")
        both = {1: READY, 2: READY}
        await one.exchange("one", replica("late", sql=(1, {1: READY})))
        reply = await one.exchange("one", replica(support=(1, both), sql=(1, {1: READY})))
        assert reply.delivery is not None and reply.delivery.phase is Phase.STEADY
        assert reply.delivery.adapters["support"].phase is Phase.LOADING, "not all replicas can"
        reply = await one.exchange("one", replica("late", support=(1, both)))
        assert reply.delivery is not None and reply.is_stored
        assert reply.delivery.adapters["support"].live.version == "/support/2"
        assert reply.delivery.adapters["sql"].live.version == "/sql/1"

        again = with_adapters(root)
        state = await again.begin_adapters(NAMED, {"support": adapter("/support/3")})
        assert state.adapters["support"].live.version == "/support/2"
        pinned = {"/old", "/support/2", "/support/1", "/sql/1"}
        assert served_checkpoints(root.storage) == pinned
        state = await again.roll_back("why", "support")
        assert state.adapters["support"].live.version == "/support/1"
        with pytest.raises(DeliveryError, match="no earlier version to return to"):
            await again.roll_back("why", "sql")
        with pytest.raises(DeliveryError, match="'help'; this endpoint serves support, sql"):
            await again.roll_back("why", "help")
        status = await again.status()
        assert status["adapters_phase_s"].keys() == NAMED.keys()
        assert status["delivery"]["adapters"]["support"]["outcome"]["result"] == "rolled_back"

        named = NAMED | {"sql": "runs/sql@9"}
        changed = with_adapters(root, **named)
        reply = await changed.exchange("one", ReplicaReport("new"))
        assert reply.delivery is not None and list(reply.delivery.adapters) == ["support"]
        state = await changed.begin_adapters(named, {"sql": adapter("/sql/9")})
        assert {name: line.live.version for name, line in state.adapters.items()} == {
            "support": "/support/1",
            "sql": "/sql/9",
        }
        assert served_checkpoints(root.storage) == {"/old", "/support/1", "/sql/9"}

    asyncio.run(check())


def test_an_adapter_that_one_replica_cannot_load_is_served_by_none(tmp_path: Path) -> None:
    async def check() -> None:
        one = with_adapters(Root(str(tmp_path), lambda: None))
        await serving(one)
        await one.promote(adapter("/support/2"), Terms(watch_s=0), "support")
        bad = SlotReport(SlotStatus.FAILED, "it has rank 128")
        await one.exchange("one", replica("bad", support=(1, {1: READY})))
        await one.exchange("one", replica("good", support=(1, {1: READY, 2: READY})))
        reply = await one.exchange("one", replica("bad", support=(1, {1: READY, 2: bad})))
        assert reply.delivery is not None
        line = reply.delivery.adapters["support"]
        assert (line.phase, line.live.version, line.epoch) == (Phase.STEADY, "/support/1", 1)
        assert line.outcome is not None and line.outcome.reason == "it has rank 128"

    asyncio.run(check())


READY_ALL = ReplicaReport("r", 1, {1: READY, 2: READY})


def state_key(root: Root) -> str:
    [key] = [entry.key for entry in root.storage.list("endpoints/") if "last-good" not in entry.key]
    return key


def stored(root: Root) -> dict[str, Any]:
    return dict(json.loads(root.storage.read_bytes(state_key(root))))


def damage(root: Root, content: bytes) -> None:
    root.storage.write_bytes(state_key(root), content)


def test_a_stale_coordinator_adopts_what_a_newer_one_has_stored(root: Root) -> None:
    """As the two clusters of a RayService do, which call themselves by the same deployment."""

    async def check() -> None:
        stale = coordinator(root)
        await stale.begin("tiny", OLD)
        newer = coordinator(root)
        await newer.promote(NEW, Terms(watch_s=0))
        for _ in range(2):
            await newer.exchange("one", READY_ALL)
        assert stored(root)["delivery"]["phase"] == "steady"
        assert (await stale.exchange("one", ReplicaReport("old"))).delivery.live.version == "old", (
            "it knows of nothing"
        )

        assert (await stale.drain(True)).live.version == "new"
        found = stored(root)
        assert (
            found["delivery"]["live"]["version"] == "new" and found["delivery"]["draining"] is True
        )
        assert served_checkpoints(root.storage) == {"/old", "/new"}
        assert (await stale.exchange("one", ReplicaReport("old"))).delivery.live.version == "new"
        assert (await coordinator(root).exchange("one", READY_ALL)).delivery.live.version == "new"

        with pytest.raises(
            DeliveryError, match="another coordinator of this endpoint has changed the state"
        ):
            await newer.roll_back("why")
        assert stored(root)["delivery"]["live"]["version"] == "new", (
            "the order was for a state that is no more"
        )
        assert (await newer.roll_back("why")).phase is Phase.LOADING

    asyncio.run(check())


def test_a_decision_of_a_stale_coordinator_changes_nothing(root: Root) -> None:
    """Its watch ends after the newer one has rolled back."""

    async def check() -> None:
        stale = coordinator(root)
        await stale.begin("tiny", OLD)
        await stale.promote(NEW, Terms(watch_s=0))
        await stale.exchange("one", READY_ALL)
        newer = coordinator(root)
        assert (await newer.roll_back("it is wrong")).live.version == "old"
        reply = await stale.exchange("one", READY_ALL)
        assert reply.delivery is not None and reply.delivery.live.version == "old"
        assert stored(root)["delivery"]["live"]["version"] == "old"
        assert served_checkpoints(root.storage) == {"/old"}

    asyncio.run(check())


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no object": lambda data: b"[]",
    "nothing in it": lambda data: b"{}",
    "no deployment": lambda data: data.replace(b'"deployment"', b'"employment"'),
    "no text": lambda data: b"\xff\xfe" + data,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_the_last_good_state_outlives_a_damaged_file(how: str, tmp_path: Path) -> None:
    root = Root(str(tmp_path), lambda: None)

    async def check() -> None:
        running = coordinator(root)
        await promoted(running)
        [file] = (tmp_path / "endpoints").glob("[!.]*.json")
        damaged = DAMAGES[how](file.read_bytes())

        file.write_bytes(damaged)
        if how != "no deployment":  # what it pins can still be read
            assert served_checkpoints(root.storage) == {"/old", "/new"}, (
                "retention keeps what the copy names"
            )
        again = coordinator(root)
        reply = await again.exchange("one", ReplicaReport("r"))
        assert reply.delivery is not None and reply.delivery.live.version == "new"
        assert reply.delivery.phase is Phase.WATCHING
        assert stored(root)["delivery"]["live"]["version"] == "new", "the damaged file was replaced"

        file.write_bytes(damaged)
        assert (await again.roll_back("why")).live.version == "old"
        assert stored(root)["delivery"]["live"]["version"] == "old"
        assert (await again.status())["is_stored"] is True

    asyncio.run(check())


def test_a_damaged_state_without_a_copy_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.delivery.coordinator.RETRY_STORING_S", 0.0)
    root = Root(str(tmp_path), lambda: None)
    advice = r"endpoints/.*\.json is damaged .*restore the file from a backup, or delete it"

    async def check() -> None:
        await promoted(coordinator(root))
        good = stored(root)
        [copy] = (tmp_path / "endpoints" / "last-good").glob("[!.]*.json")
        copy.unlink()
        damage(root, b"{")
        with pytest.raises(
            StorageError, match="the checkpoints that its endpoint needs are not known: restore"
        ):
            served_checkpoints(root.storage)
        one = coordinator(root)
        for asked in (
            one.exchange("one", READY_ALL),
            one.begin("tiny", OLD),
            one.promote(NEW, Terms(watch_s=0)),
            one.status(),
        ):
            with pytest.raises(DeliveryError, match=advice):
                await asked
        [file] = (tmp_path / "endpoints").glob("[!.]*.json")
        assert file.read_bytes() == b"{", "it does not invent a state"
        damage(root, json.dumps(good).encode())
        reply = await one.exchange("one", READY_ALL)
        assert reply.delivery is not None and reply.delivery.live.version == "new", (
            "it goes on once that is done"
        )

    with caplog.at_level(logging.ERROR):
        asyncio.run(check())
    assert sum("is damaged" in record.message for record in caplog.records) == 1


def test_an_endpoint_is_not_started_over_a_damaged_state(tmp_path: Path, checkpoint: Path) -> None:
    """Whose coordinator would wait for somebody to restore it, and say so in a log alone."""
    (tmp_path / "endpoints").mkdir()
    (tmp_path / "endpoints" / "mine.json").write_text("{")
    delivery = DeliveryConfig(endpoint="mine")
    config = ServeConfig(
        checkpoint=str(checkpoint), storage=StorageConfig(uri=str(tmp_path)), delivery=delivery
    )
    with pytest.raises(
        UserError, match=r"mine\.json is damaged .*restore the file from a backup, or delete it"
    ):
        run(config)


def test_an_endpoint_that_starts_drained_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Root(str(tmp_path), lambda: None)

    async def check() -> None:
        one = coordinator(root)
        await one.begin("tiny", OLD)
        await one.drain(True)
        with caplog.at_level(logging.WARNING):
            coordinator(root)

    asyncio.run(check())
    assert "was drained before this start" in caplog.text and '{"drain": false}' in caplog.text


class HangingWrites:
    """A storage that swallows writes until it is let go."""

    def __init__(self, one: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_end = threading.Event()
        self.num_at_once = self.most_at_once = 0
        self._write = one._file.write
        monkeypatch.setattr(one._file, "write", self.write)

    def write(self, state: Delivery) -> None:
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        assert self.may_end.wait(limit_s(60))
        self._write(state)
        self.num_at_once -= 1


def failing(num_sequences: int) -> ReplicaReport:
    bad = SlotReport(SlotStatus.READY, stats=VersionStats(num_sequences, num_sequences))
    return ReplicaReport("r", 2, {1: READY, 2: bad})


def test_a_storage_that_hangs_holds_up_no_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the old code no replica heard anything before the storage had answered, and one that gave
    up undid it."""
    monkeypatch.setattr(coordinator_module, "STORING_S", 0.2)

    async def check() -> None:
        one = coordinator(Root(str(tmp_path), lambda: None))
        await promoted(one)
        storage = HangingWrites(one, monkeypatch)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):  # a replica that gives up
                await one.exchange("one", failing(100))
        for _ in range(3):
            async with asyncio.timeout(limit_s(5)):
                reply = await one.exchange("one", failing(100))
            assert reply.delivery is not None and reply.delivery.live.version == "old"
            assert not reply.is_stored
        assert (await one.drain(True)).draining
        monkeypatch.setattr(coordinator_module, "STORING_S", limit_s(30))
        storage.may_end.set()
        await wait_in_loop_until(lambda: one._writing is None)
        await wait_in_loop_until(lambda: storage.num_at_once == 0)
        reply = await one.exchange("one", failing(100))
        assert reply.is_stored and storage.most_at_once == 1
        state = (await coordinator(Root(str(tmp_path), lambda: None)).status())["delivery"]
        assert state["live"]["version"] == "old" and state["draining"]

    asyncio.run(check())


def test_a_promotion_waits_for_a_slow_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "STORING_S", 0.1)
    monkeypatch.setattr(coordinator_module, "PROMOTING_S", limit_s(60))

    async def check() -> None:
        one = coordinator(Root(str(tmp_path), lambda: None))
        await one.begin("tiny", OLD)
        storage = HangingWrites(one, monkeypatch)
        await one.drain(True)  # is written late
        promoting = asyncio.create_task(one.promote(NEW, Terms(watch_s=0)))
        await asyncio.sleep(0.5)
        assert not promoting.done()
        storage.may_end.set()
        assert (await promoting).candidate is not None
        status = await one.status()
        assert status["is_stored"] and status["delivery"]["draining"]

    asyncio.run(check())


def test_reports_are_answered_while_an_order_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_module, "STORING_S", limit_s(30))

    async def check() -> None:
        one = coordinator(Root(str(tmp_path), lambda: None))
        await promoted(one)
        storage = HangingWrites(one, monkeypatch)
        draining = asyncio.create_task(one.drain(True))
        await wait_in_loop_until(lambda: storage.num_at_once == 1)
        async with asyncio.timeout(limit_s(5)):
            reply = await one.exchange("one", ReplicaReport("r", 2, {1: READY, 2: READY}))
        assert reply.delivery is not None and not reply.delivery.draining and not draining.done()
        storage.may_end.set()
        assert (await draining).draining

    asyncio.run(check())
