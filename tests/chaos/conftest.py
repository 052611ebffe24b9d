"""Fixtures of `make test-chaos`, and its last line: one JSON object that sums up all cells."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import LocalCluster
from tests.chaos.arena import Arena

NUM_NODES = 3  # that carry workers

_SUMMARY = pytest.StashKey[dict]()


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Arena]:
    with LocalCluster(num_nodes=NUM_NODES + 1, cpus_per_node=1) as cluster:
        arena = Arena(cluster, tmp_path_factory.mktemp("chaos"))
        yield arena
        tally = arena.tally
        request.config.stash[_SUMMARY] |= {
            "median_recovery_s": round(statistics.median(tally.recoveries_s), 2) if tally.recoveries_s else None,
            "max_recovery_s": max(tally.recoveries_s, default=None),
            "max_lost_steps": max(tally.lost_steps, default=None),
            "goodput": round(tally.useful_s / tally.wall_s, 3) if tally.wall_s else None,
        }


@pytest.fixture(scope="session")
def summary(request: pytest.FixtureRequest) -> dict:
    """Cells may add figures of their own."""
    return request.config.stash[_SUMMARY]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SUMMARY] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    cells = [
        report
        for outcome in ("passed", "failed", "error")
        for report in terminalreporter.getreports(outcome)
        if "tests/chaos/" in report.nodeid and getattr(report, "when", "call") in ("call", "setup")
    ]
    cells = [report for report in cells if report.when == "call" or report.failed]
    if cells and config.stash[_SUMMARY]:
        failed = sum(report.failed for report in cells)
        config.stash[_SUMMARY] |= {"cells": len(cells), "failed": failed}


def pytest_unconfigure(config: pytest.Config) -> None:
    if "cells" in config.stash[_SUMMARY]:
        print(json.dumps(config.stash[_SUMMARY]))  # behind pytest's own last line
