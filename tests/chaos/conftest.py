"""Fixtures of `make test-chaos`, and its last line: one JSON object that sums up all cells.

A cell is a test with the marker `chaos`: those of this folder, on one local cluster, and those of
single parts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from cluster.settings.run import ClusterConfig
from cluster.stages.stage import connected
from raymill.state.shard import Shard
from tests.chaos.arena import Arena
from tests.paced_steps import paced

NUM_NODES = 3  # that carry workers

_SUMMARY = pytest.StashKey[dict]()


@pytest.fixture(scope="session")
def arena(
    s3_server: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Arena]:
    """The cluster starts after the S3 server, whose keys its nodes inherit."""
    folder = tmp_path_factory.mktemp("chaos")
    with (
        paced(folder) as pace,
        connected(ClusterConfig(num_nodes=NUM_NODES + 1), cpus_per_node=1) as connection,
    ):
        compute = request.config.getoption("--compute", default="cpu")
        shard = request.config.getoption("--shard", default="none")
        arena = Arena(connection, folder, pace, compute=compute, shard=shard)
        yield arena
        request.config.stash[_SUMMARY]["max_lost_steps"] = max(arena.lost_steps, default=None)


@pytest.fixture(scope="session")
def summary(request: pytest.FixtureRequest) -> dict:
    """Cells may add figures of their own."""
    return request.config.stash[_SUMMARY]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compute",
        default="cpu",
        choices=["cpu", "plain", "compiled"],
        help="how the runs compute",
    )
    parser.addoption(
        "--shard", default="none", choices=get_args(Shard), help="what the runs' workers divide"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SUMMARY] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.chaos)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    reports = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.getreports(outcome)
    ]
    cells = [
        report
        for report in reports
        if isinstance(report, pytest.TestReport)  # and not of a file that could not be imported
        and "chaos" in report.keywords
        and (report.when == "call" or report.failed)
    ]
    if config.stash[_SUMMARY]:
        failed = sum(report.failed for report in cells)
        config.stash[_SUMMARY] |= {"cells": len(cells), "failed": failed}


def pytest_unconfigure(config: pytest.Config) -> None:
    if "cells" in config.stash[_SUMMARY]:
        print(json.dumps(config.stash[_SUMMARY]))  # behind pytest's own last line
