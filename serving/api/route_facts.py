"""Decisions about a request before its route runs: whom the route answers, and whether it counts
against a key's limit. Each route declares it where it stands."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, TypeVar

from starlette.routing import BaseRoute, Route

_FACTS = "route_facts"
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class Opens(Enum):
    """Whom a route answers; `AccessRules` say who has which key."""

    TO_ALL = auto()  # probes and navigation, which have no key
    TO_USERS = auto()  # who may ask the model
    TO_ADMINS = auto()
    INSIDE_PAGE = auto()  # to all, unless nobody may look inside a query
    INSIDE = auto()  # who may look inside a query
    TO_TRACERS = auto()  # who may see what the model was trained on


@dataclass(frozen=True)
class RouteFacts:
    """A route's declarations."""

    opens: Opens
    is_metered: bool
    """Counts against a key's limit, and is refused while the endpoint drains."""
    is_read_by_pages: bool = False
    """The pages of an operator ask it with the operator's one key."""


OTHER = RouteFacts(Opens.TO_USERS, is_metered=False)
"""The facts of paths without a route, and of routes whose path has a parameter."""


def declares(facts: RouteFacts) -> Callable[[Endpoint], Endpoint]:
    """Declares the facts of the route that a function answers."""

    def declared(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _FACTS, facts)
        return endpoint

    return declared


def facts_by_path(routes: Iterable[BaseRoute]) -> Mapping[str, RouteFacts]:
    """Returns what the routes declare. Raises `TypeError` for a route without facts, for one with a
    parameter that has others than `OTHER`, and for two of one path that differ."""
    found: dict[str, RouteFacts] = {}
    for route in routes:
        assert isinstance(route, Route), f"{route} is no route of Starlette"
        facts = getattr(route.endpoint, _FACTS, None)
        if facts is None:
            raise TypeError(f"{route.path} declares no RouteFacts")
        if facts != found.get(route.path, facts) or ("{" in route.path and facts != OTHER):
            raise TypeError(f"{route.path} cannot have {facts}")
        found[route.path] = facts
    return found
