"""Sets up every test: one compute thread, no AWS key of the machine's own, an S3 server, time
limits that fit the machine, and an order in which files that share something follow each other.
"""

import ctypes
import gc
import os
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.cluster.fault_proxy import FaultProxy, running_proxy
from tests.lanes import LaneScheduling, place
from tests.slices import Slice, SlicePlugin, TimeLimit
from tests.time_limits import slowness

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
slowness()  # measured here once, before the session's other processes start

# A limit on one example would judge the machine.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", metavar="K/N", type=Slice.parse, help="one slice, see slices.py")
    parser.addoption(
        "--limit-s", type=float, help="end the session after these seconds, and say in which test"
    )
    parser.addoption(
        "--processor-seconds",
        metavar="FILE",
        type=os.path.abspath,
        help="append what each test file uses, see processor_seconds.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (chosen := config.getoption("--slice")) is not None:
        config.pluginmanager.register(SlicePlugin(chosen))
    if (path := config.getoption("--processor-seconds")) is not None:
        from tests.processor_seconds import ProcessorSeconds

        config.pluginmanager.register(ProcessorSeconds(path))


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    if (seconds := session.config.getoption("--limit-s")) is not None:
        say = plugins.getplugin("terminalreporter").write_line
        plugins.register(TimeLimit(seconds, say=say))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place(item.nodeid.split("::")[0]))


def pytest_collection() -> None:
    gc.disable()  # what is imported stays


def pytest_collection_finish() -> None:
    """Has the garbage collector leave alone what was imported: it takes a second to go through its
    million objects, as each training does."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Gives freed memory back to the system behind each file: a process that has trained keeps up
    to 1 GiB of it (`keep_freed_memory`), and several processes test at a time."""
    yield
    if sys.platform == "linux" and (nextitem is None or nextitem.path != item.path):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LaneScheduling | None:
    return LaneScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 server, and the environment that leads to it: Ray workers started later inherit it.
    Gives its URL."""
    from tests.moto_server import moto_server

    with moto_server() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-never-shown")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield url


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """A new bucket's name."""
    import boto3

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return name


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, which all of the test's clients take for the server."""
    with running_proxy(s3_server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running
