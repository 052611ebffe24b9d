"""Every door of an endpoint asks for the floor: its start, its live version and adapters, a promotion,
and each replica that loads one."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.run import StorageConfig
from cluster.settings.serve import ServeConfig
from cluster.storage.registry import publish
from cluster.storage.uris import open_storage
from jobs.proof.sign_checkpoint import sign_checkpoint
from model.files.checkpoint_folder import MANIFEST
from model.signing.signature import SigningKey
from raymill.errors import UserError
from serving import app
from serving.api.admin_routes import _read_candidate
from serving.delivery.follower import _read_version
from serving.delivery.loaded_version import LoadedVersion
from serving.protocol.errors import ApiError
from tests.serving.delivery_parts import served
from tests.signing_keys import made_keys

Door = Callable[[str, ServeConfig], Awaitable[Any]]


async def _start(reference: str, config: ServeConfig) -> Any:
    return app.run(config)


async def _begin(reference: str, config: ServeConfig) -> Any:
    return _read_version(reference, config)


async def _promote(reference: str, config: ServeConfig) -> Any:
    live: Any = None  # a candidate that is refused is not compared with it
    return await _read_candidate(reference, live, config)


async def _load(reference: str, config: ServeConfig) -> Any:
    asked = served(Path(config.checkpoint), 1).model_copy(update={"checkpoint": reference})
    return await LoadedVersion.load(asked, name="tiny", config=config)


REFUSALS = (UserError, ApiError)
DOORS = [_start, _begin, _promote, _load]


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> ServeConfig:
    """An endpoint with a signed checkpoint of step 7, which is published."""
    private, public = made_keys(tmp_path, "ours")
    storage = open_storage(str(tmp_path / "mill"))
    place = tmp_path / "run" / checkpoint.name
    shutil.copytree(checkpoint, place)
    sign_checkpoint(str(place), SigningKey(private), storage_uri=storage.uri)
    publish(storage, str(place))
    return ServeConfig(
        checkpoint=str(place),
        storage=StorageConfig(uri=storage.uri, signed_by=str(public)),
    )


@pytest.mark.parametrize("door", DOORS)
def test_a_signed_checkpoint_below_the_floor_enters_by_no_door(
    config: ServeConfig, door: Door
) -> None:
    storage = config.storage.model_copy(update={"signed_from_step": 8})
    refusing = config.model_copy(update={"storage": storage})
    with pytest.raises(
        REFUSALS, match=r"is of step 7, and storage\.signed_from_step asks for step 8"
    ):
        asyncio.run(door(config.checkpoint, refusing))


@pytest.mark.parametrize("door", [_begin, _promote])
def test_a_damaged_latest_enters_by_no_door(config: ServeConfig, door: Door) -> None:
    older = Path(config.checkpoint)
    newer = older.with_name("newer")
    shutil.copytree(older, newer)
    storage = open_storage(config.storage.uri)
    publish(storage, str(older))
    publish(storage, str(newer))
    (newer / MANIFEST).unlink()
    with pytest.raises(REFUSALS, match=r"newer is not valid: .*no older one takes its place"):
        asyncio.run(door("latest", config))


def test_what_the_floor_allows_is_served(config: ServeConfig) -> None:
    storage = config.storage.model_copy(update={"signed_from_step": 7})
    taking = config.model_copy(update={"storage": storage})
    for reference in (config.checkpoint, "latest"):
        assert asyncio.run(_begin(reference, taking)).checkpoint == config.checkpoint
