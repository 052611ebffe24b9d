"""Promotion as an operator sees it: requests to a running endpoint, and waiting for the outcome."""

import time
from typing import Any

import httpx

from cluster.endpoint.endpoint import Endpoint, message_of, raise_for
from cluster.output.progress import say
from cluster.storage.registry import LATEST
from cluster.storage.uris import absolute_uri
from raymill.errors import UserError

POLL_S = 0.5
SAY_S = 10.0
ANSWER_TIMEOUT_S = 600.0  # the endpoint fetches and verifies a checkpoint first
AWAY_S = 60.0  # an endpoint whose replica or coordinator is being replaced


class OrderRefusedError(UserError):
    """The endpoint refused the checkpoint, or rolled it back."""


class EndpointAwayError(UserError):
    """No endpoint answers, or it cannot at the moment."""


class Operator:
    """The operator of one endpoint, through its /admin routes: of its model, or of one `adapter`
    beside it. The states that its methods return are of that one."""

    def __init__(self, endpoint: Endpoint, *, adapter: str | None = None) -> None:
        self._endpoint = endpoint
        self._adapter = adapter

    def require_access(self) -> None:
        """Raises an error if no endpoint answers, or if it may not be changed with this key."""
        self._ask("GET", "/admin/status", None)

    def promote(
        self, checkpoint: str, *, terms: dict[str, Any], gate: dict[str, Any]
    ) -> dict[str, Any]:
        """Starts the promotion. Raises `OrderRefusedError`."""
        reference = checkpoint if checkpoint == LATEST else absolute_uri(checkpoint)
        given = {name: value for name, value in (terms | gate).items() if value is not None}
        return self._order("promote", {"checkpoint": reference, **given})

    def finish(self) -> dict[str, Any]:
        return self._order("finish", {})

    def roll_back(self) -> dict[str, Any]:
        return self._order("rollback", {})

    def wait(self, *, until: tuple[str, ...] = ("steady",)) -> dict[str, Any]:
        """Returns the delivery's state once its phase is one of `until`. Reports each phase on the
        way, and every ten seconds how long it still lasts. Raises `OrderRefusedError` with the reason of
        a refusal or rollback."""
        phase, said_s = "", 0.0
        while True:
            status = self._status()
            state, phase_s = self._part_of(status["delivery"]), status["phase_s"]
            if self._adapter is not None:
                phase_s = status["adapters_phase_s"][self._adapter]
            if state["phase"] != phase or time.monotonic() - said_s > SAY_S:
                phase, said_s = state["phase"], time.monotonic()
                say(progress_of(state, phase_s=phase_s))
            outcome = state["outcome"]
            if outcome is not None and outcome["result"] != "promoted":
                what = outcome["result"].replace("_", " ")
                raise OrderRefusedError(
                    f"{outcome['version']['checkpoint']} was {what}: {outcome['reason']}"
                )
            if phase in until:
                return dict(state)
            time.sleep(POLL_S)

    def wait_until_steady(self) -> dict[str, Any]:
        """Returns the delivery's state once no promotion is in progress, for any outcome of the
        last one."""
        while (state := self._part_of(self._status()["delivery"]))["phase"] != "steady":
            time.sleep(POLL_S)
        return state

    def _order(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        subject = {} if self._adapter is None else {"adapter": self._adapter}
        return self._part_of(self._ask("POST", f"/admin/{name}", body | subject))

    def _part_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the part of the endpoint's state that is about what this operator delivers.
        Raises `UserError` for an unknown adapter."""
        if self._adapter is None:
            return dict(state)
        known = state.get("adapters", {})
        if self._adapter not in known:
            served = ", ".join(known) or "none by a name of its own"
            raise UserError(f"no adapter is called {self._adapter}; this endpoint serves {served}")
        return dict(known[self._adapter])

    def _status(self) -> dict[str, Any]:
        """Returns the status, waiting for a replica or a coordinator that is being replaced."""
        deadline_s = time.monotonic() + AWAY_S
        while True:
            try:
                return self._ask("GET", "/admin/status", None)
            except EndpointAwayError:
                if time.monotonic() > deadline_s:
                    raise
            time.sleep(POLL_S)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        url, headers = self._endpoint.url, self._endpoint.admin_headers
        settings: dict[str, Any] = {
            "timeout": ANSWER_TIMEOUT_S,
            "trust_env": self._endpoint.asks_proxies,
        }
        try:
            response = httpx.request(method, url + path, json=body, headers=headers, **settings)
        except httpx.TransportError as error:
            raise EndpointAwayError(
                f"no endpoint answers at {url} ({error}): start one with `raymill serve`"
            ) from None
        if response.status_code in (400, 409):
            raise OrderRefusedError(message_of(response))
        if response.status_code >= 500:
            raise EndpointAwayError(
                f"{response.url} answered {response.status_code}: {message_of(response)}"
            )
        raise_for(response)
        return dict(response.json())


def progress_of(state: dict[str, Any], *, phase_s: float) -> str:
    """Says what an endpoint is doing for its promotion, and for how much longer."""
    live = state["live"]["checkpoint"]
    candidate = (state["candidate"] or state["live"])["checkpoint"]
    terms = state["terms"] or {}
    left = f"{max(0.0, terms.get('watch_s', 0.0) - phase_s):.0f} s more"
    match state["phase"]:
        case "loading":
            return f"loading: each replica loads and tests {candidate}, for {phase_s:.0f} s so far; {live} serves"
        case "canary":
            share = f"{terms['canary_percent']:g}% of the clients (an API key keeps its version)"
            return f"canary: {candidate} serves {share}, and is watched for {left}"
        case "watching":
            return f"watching: {live} serves; for {left}, errors or slowness roll it back"
    return f"{state['phase']}: {live} serves"
