"""The request log's lines: whole, in order, soon, and bounded; where they go, and what happens if
they cannot."""

import asyncio
import itertools
import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving.proxy import request_log
from serving.proxy.request_log import FIELDS, RequestLog
from tests.repository import REPOSITORY
from tests.time_limits import limit_s
from tests.waiting import wait_in_loop_until


def test_a_line_has_every_field_and_comes_soon(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"

    async def scenario() -> None:
        log = RequestLog(str(path))
        for round_number in range(3):
            for i in range(40):
                log.add(request_id=f"{round_number}-{i}", status=200)
            await wait_in_loop_until(
                lambda n=round_number: (
                    path.exists() and path.read_text().count("\n") == 40 * (n + 1)
                )
            )

    asyncio.run(scenario())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == [
        f"{n}-{i}" for n in range(3) for i in range(40)
    ]
    assert lines[0] == dict.fromkeys(FIELDS) | {"request_id": "0-0", "status": 200}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_large_file_is_put_aside_with_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "requests.jsonl"
    monkeypatch.setattr(request_log, "MAX_FILE_BYTES", 2_000)
    monkeypatch.setattr(request_log, "WRITE_AFTER_S", 0.0)

    async def scenario() -> None:
        log = RequestLog(str(path))
        for i in range(30):
            log.add(request_id=str(i))
            await wait_in_loop_until(lambda: log._writing is None)

    asyncio.run(scenario())
    files = [tmp_path / "requests.jsonl.1", path]
    assert files[0].stat().st_size < 3_000 and sorted(tmp_path.iterdir()) == sorted(
        filter(Path.exists, files)
    )
    kept = [
        json.loads(line)["request_id"]
        for file in files
        if file.exists()
        for line in file.read_text().splitlines()
    ]
    assert kept == [str(i) for i in range(30 - len(kept), 30)] and len(kept) > 5


def test_proxies_of_one_machine_put_their_file_aside_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two have opened it when the first one puts it aside: the second one's lines are in the next
    file."""
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"x" * 1_000)
    monkeypatch.setattr(request_log, "MAX_FILE_BYTES", 1_000)
    both_are_open, calls, open_file = threading.Barrier(2), itertools.count(), os.open

    def slow_open(*arguments: Any) -> int:
        file = open_file(*arguments)
        if next(calls) < 2:
            both_are_open.wait(limit_s(10))
        return file

    monkeypatch.setattr(request_log.os, "open", slow_open)
    with ThreadPoolExecutor(2) as pool:
        for written in [pool.submit(request_log._write, str(path), b"line\n") for _ in range(2)]:
            written.result()
    assert (tmp_path / "requests.jsonl.1").read_bytes() == b"x" * 1_000 + b"line\n"
    assert path.read_bytes() == b"line\n"


def test_lines_that_cannot_be_written_are_counted_and_later_ones_are_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "MAX_WAITING_LINES", 5)
    folder = tmp_path / "later"

    async def scenario() -> None:
        log = RequestLog(str(folder / "requests.jsonl"))
        for _ in range(8):
            log.add()
        await wait_in_loop_until(lambda: "lines of the request log are lost" in caplog.text)
        await wait_in_loop_until(lambda: log._writing is None)
        folder.mkdir()
        log.add(request_id="now")
        await wait_in_loop_until((folder / "requests.jsonl").exists)
        await wait_in_loop_until(lambda: log._writing is None)

    asyncio.run(scenario())
    assert "5 lines of the request log are lost: [Errno 2]" in caplog.text
    assert "3 lines of the request log are lost" in caplog.text and "is too slow" in caplog.text
    assert json.loads((folder / "requests.jsonl").read_text())["request_id"] == "now"


PROGRAM = """
import asyncio, sys
from serving.proxy.request_log import RequestLog

async def main():
    log = RequestLog(sys.argv[1])
    log.add(request_id="one")
    log.add(request_id="two")
    while log._writing is not None:
        await asyncio.sleep(0.01)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "target",
    ["-", "/proc/{pid}/fd/1"],
    ids=["its own output", "that of another process, as a pod's"],
)
def test_lines_go_to_a_pipe(target: str) -> None:
    """A pod's first process has the container's log as its output, and Ray's proxies do not."""
    read, write = os.pipe()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, stdout=write
    )
    try:
        target = target.format(pid=holder.pid)
        output = write if target == "-" else subprocess.DEVNULL
        subprocess.run(
            [sys.executable, "-c", PROGRAM, target], stdout=output, check=True, cwd=REPOSITORY
        )
    finally:
        os.close(write)
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait()
    with os.fdopen(read) as lines:
        assert [json.loads(line)["request_id"] for line in lines] == ["one", "two"]
