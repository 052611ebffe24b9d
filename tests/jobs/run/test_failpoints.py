"""A crash at any point of saving: a fresh process finds a whole checkpoint, never an older one, and
ends with the same bits."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.settings.code_folders import CODE_FOLDERS
from model.files.failpoints import VARIABLE, failpoint, pause
from tests.fault_seeds import fault_seeds
from tests.paced_steps import paced
from tests.repository import REPOSITORY

pytestmark = pytest.mark.more

CODE = [path.read_text() for folder in CODE_FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]
OF_SHARDS = {"mid_shard", "after_shard"}  # whose test is that of sharded checkpoints
ALL = {name for text in CODE for name in re.findall(r'\bfailpoint\("(\w+)"\)', text)}
OF_MESSAGES = {"before_message", "in_message"}  # where the tests of hangs stop a worker
FAILPOINTS = ALL - OF_SHARDS - OF_MESSAGES
LOCAL = FAILPOINTS - {"before_upload_complete"}


def check_crashes(storage_uri: str, folder: Path, *, num_seeds: int, places: set[str]) -> None:
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY)}
    arguments = [storage_uri, str(folder / "tokens"), str(num_seeds), *sorted(places)]
    command = [sys.executable, "-m", "tests.jobs.failpoint_runs", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY, check=True
    )
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    undisturbed, *crashed = found
    assert undisturbed["code"] == undisturbed["ended"] == 0
    for crash in crashed:
        print(crash)
        assert crash["ended"] == 0
        assert crash["code"] == 137
        assert crash["damaged"] == []
        assert max(crash["published"], crash["complete"]) <= crash["went_on_from"]
        assert crash["went_on_from"] % 2 == 0
        assert crash["steps"], "the ledger has each step: no checkpoint was ahead of it"
        assert crash["hash"] == undisturbed["hash"]
        assert crash["left"] == []
    assert {crash["failpoint"] for crash in crashed} == places
    assert any(crash["went_on_from"] > 0 for crash in crashed)


def test_a_crash_anywhere(tmp_path: Path) -> None:
    assert len(FAILPOINTS) == 12
    assert ALL > OF_SHARDS | OF_MESSAGES
    check_crashes(str(tmp_path / "storage"), tmp_path, num_seeds=1, places=LOCAL)


@pytest.mark.more
def test_a_crash_on_the_way_to_object_storage(s3_bucket: str, tmp_path: Path) -> None:
    places = {"before_upload_complete", "before_manifest", "mid_delete"}
    check_crashes(f"s3://{s3_bucket}/storage", tmp_path, num_seeds=1, places=places)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("is_remote", [False, True])
def test_crashes_of_several_seeds(s3_bucket: str, tmp_path: Path, is_remote: bool) -> None:
    uri = f"s3://{s3_bucket}/storage" if is_remote else str(tmp_path / "storage")
    check_crashes(
        uri, tmp_path, num_seeds=len(fault_seeds(4)), places=FAILPOINTS if is_remote else LOCAL
    )


def test_an_unarmed_failpoint_does_nothing_and_an_armed_one_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    failpoint("before_file")
    monkeypatch.setenv(VARIABLE, "before_file:3:raise")
    failpoint("before_file")
    failpoint("after_file")
    failpoint("before_file")
    with pytest.raises(OSError, match="failpoint before_file"):
        failpoint("before_file")
    failpoint("before_file")


def test_a_place_that_is_paced_waits_each_time_until_it_is_no_longer(tmp_path: Path) -> None:
    def seconds_of(name: str) -> float:
        start_s = time.monotonic()
        pause(name)
        return time.monotonic() - start_s

    with paced(tmp_path) as pace:
        with pace.slow(30):
            assert seconds_of("another") < 30
        with pace.slow(0.2):
            assert min(seconds_of("step"), seconds_of("step")) >= 0.2
        with pace.slow(30):
            pass
        assert seconds_of("step") < 30
    assert not list(tmp_path.iterdir())
