"""Ray's Jobs API as raymill asks it: all nodes of a large cluster are seen."""

from typing import Any

import httpx
import pytest
from ray.util.state.common import DEFAULT_LIMIT, RAY_MAX_LIMIT_FROM_API_SERVER

from cluster.local.jobs_api import JobsApi

NUM_NODES = 250


def test_the_nodes_of_a_large_cluster_are_all_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_method: str, url: str, **_arguments: Any) -> httpx.Response:
        """Answers as Ray's state API does, with as many rows as are asked for."""
        limit = int(httpx.URL(url).params.get("limit", DEFAULT_LIMIT))
        assert limit <= RAY_MAX_LIMIT_FROM_API_SERVER, "Ray refuses more"
        nodes = [{"node_id": str(number)} for number in range(NUM_NODES)]
        return httpx.Response(200, json={"data": {"result": {"result": nodes[:limit]}}})

    monkeypatch.setattr("cluster.local.jobs_api.httpx.request", answer)
    assert len(JobsApi("http://127.0.0.1:8265", token=None).alive_nodes()) == NUM_NODES
