"""What each route declares: whom it answers, and whether it counts against a key's limit."""

from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from cluster.settings.serve import ServeConfig
from serving.api.route_facts import OTHER, Opens, RouteFacts, declares, facts_by_path
from serving.proxy.front_door import COUNTED_PATHS
from serving.proxy.http_bounds import PROBED_PATHS
from serving.proxy.key_check import ASKED_PATH, OWN_RIGHTS
from tests.serving.endpoint_parts import all_routes_of


async def answer(_: Request) -> Response:
    return Response()


@pytest.mark.parametrize("trace", [None, "data"])
def test_every_route_of_a_replica_declares_its_facts(trace: str | None, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys")
    routes = all_routes_of(ServeConfig(trace=trace, api_key_file=keys)).routes
    facts = facts_by_path(routes)
    assert facts["/v1/completions"].is_metered and not facts["/v1/models"].is_metered
    for path, declared in facts.items():
        assert (declared.opens is Opens.TO_ADMINS) == path.startswith("/admin/"), path


def test_the_proxy_has_the_same_facts() -> None:
    facts = facts_by_path(all_routes_of(ServeConfig()).routes)
    own = {path for path, declared in facts.items() if declared.opens is Opens.TO_TRACERS}
    assert own == set(OWN_RIGHTS)
    assert facts[ASKED_PATH].is_read_by_pages
    assert all(facts[path].is_metered for path in COUNTED_PATHS)
    assert all(facts[path].opens is Opens.TO_ALL for path in facts.keys() & set(PROBED_PATHS))


def test_a_route_without_facts_is_refused() -> None:
    app = FastAPI(openapi_url=None)
    app.add_route("/new", answer)
    with pytest.raises(TypeError, match="/new declares no"):
        facts_by_path(app.routes)


@pytest.mark.parametrize("path", ["/new", "/new/{name}"])
def test_a_route_whose_facts_would_not_be_found_is_refused(path: str) -> None:
    async def other(_: Request) -> Response:
        return Response()

    app = FastAPI(openapi_url=None)
    app.add_route(path, declares(OTHER)(answer))
    app.add_route(path, declares(RouteFacts(Opens.TO_ALL, is_metered=True))(other))
    with pytest.raises(TypeError, match="cannot have"):
        facts_by_path(app.routes)
