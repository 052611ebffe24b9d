"""The processor seconds of tests are those of all their processes."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.processor_seconds import ProcessorSeconds, Row, own_s, running_s, summary
from tests.waiting import wait_until

SPIN = "import time\nwhile time.process_time() < 0.6: pass"


def spin() -> None:
    until_s = time.process_time() + 0.6
    while time.process_time() < until_s:
        pass


def test_a_process_counts_itself_and_its_children_while_they_run_and_after() -> None:
    before_s = own_s()
    spin()
    assert own_s() >= before_s + 0.6
    with subprocess.Popen([sys.executable, "-S", "-c", f"{SPIN}\ninput()"], stdin=-1) as child:
        wait_until(lambda: running_s() >= 0.5)  # ticks are rounded
        before_s = own_s()
        child.communicate(b"\n")
    assert own_s() >= before_s + 0.5


def test_a_file_has_a_row_and_so_has_a_test_that_takes_long(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    measured = ProcessorSeconds(str(path))
    quick: Any = SimpleNamespace(nodeid="tests/a/test_b.py::test_quick")
    long: Any = SimpleNamespace(nodeid="tests/a/test_b.py::test_long")
    for item, following, work in ((quick, long, lambda: None), (long, None, spin)):
        call = measured.pytest_runtest_call(item)
        next(call)
        work()
        with suppress(StopIteration):
            call.send(None)
        teardown = measured.pytest_runtest_teardown(item, following)
        next(teardown)
        with suppress(StopIteration):
            teardown.send(None)
    rows = [Row.parse(line) for line in path.read_text().splitlines()]
    assert [(row.phase, row.name) for row in rows] == [
        ("test", long.nodeid),
        ("file", "tests/a/test_b.py"),
    ]
    assert all(row.seconds >= 0.5 and row.peak_mb > 5 for row in rows)


def test_a_summary_has_sums_by_folder_and_file() -> None:
    rows = [
        Row(2.0, 300, "imports", "tests/a/test_b.py"),
        Row(3.0, 400, "file", "tests/a/test_b.py"),
        Row(4.0, 500, "file", "tests/a/test_c.py"),
        Row(4.0, 500, "test", "tests/a/test_c.py::test_d"),
    ]
    total, _, folder, _, *files = summary(rows)
    assert total == "    7.0 s in tests, 2.0 s in imports, 500 MB"
    assert folder == "    7.0 s  tests/a"
    assert files == ["    4.0 s  tests/a/test_c.py", "    3.0 s  tests/a/test_b.py"]
