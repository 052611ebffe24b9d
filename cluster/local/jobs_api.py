"""Ray's Jobs API as raymill uses it: a probe of the address and the token, then jobs and nodes.

It uses plain HTTP with deadlines: Ray's own client silently retries a wrong token for 22 s (Ray
2.60).
"""

import os
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from raymill.errors import UserError

_TOKEN, _TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_RAYS_PLACE = ".ray/auth_token"  # in the home folder, where Ray itself looks for its token
_TIMEOUT_S, _STATE_TIMEOUT_S = 10.0, 30.0
# The most that the state API sends unless configured; without a limit it sends 100
_MAX_ROWS = 10_000


class ClusterError(UserError):
    """A cluster cannot be started or reached."""


@dataclass(frozen=True)
class Token:
    """A cluster's token, and its source for messages; the value itself is never shown."""

    value: str = field(repr=False)
    source: str


def ray_token(file: Path | None = None) -> Token | None:
    """Returns the token in the file, else in the one that RAY_AUTH_TOKEN_PATH names, else in
    RAY_AUTH_TOKEN, else in the one where Ray looks itself. Raises `ClusterError` if a file is named
    and holds no token."""
    named, source = (file, "--token-file") if file else (os.environ.get(_TOKEN_PATH), _TOKEN_PATH)
    if not named:
        value = os.environ.get(_TOKEN, "").strip()
        if value:
            return Token(value, _TOKEN)
        named, source = Path.home() / _RAYS_PLACE, "Ray"
        if not named.is_file():
            return None
    try:
        value = Path(named).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(
            f"no token can be read from {named}, which {source} names: {error}"
        ) from None
    if not value or not value.isascii() or len(value.split()) > 1:
        raise ClusterError(
            f"{named}, which {source} names, holds no token; expected one word of ASCII"
        )
    return Token(value, f"{named} ({source})")


class JobsApi:
    """The Jobs API at `url`, such as http://127.0.0.1:8265."""

    def __init__(self, url: str, token: Token | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterError(
                f"{url.rpartition('@')[2]!r} is no address of a Jobs API; expected http://HOST:8265, with http://"
            )
        if parts.username or parts.password:
            raise ClusterError(
                f"the address of {parts.hostname} holds a password, which others can read; leave it out"
            )
        self.url, self._token = url.rstrip("/"), token

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token.value}"} if self._token else {}

    def probe(self) -> None:
        """Raises `ClusterError` unless a Ray of a fitting version answers and accepts the token."""
        version = self._ask("GET", "/api/version").get("ray_version")
        ours = metadata.version("ray")
        if version is None:
            raise self._is_no_dashboard()
        if version.split(".")[:2] != ours.split(".")[:2]:
            raise ClusterError(
                f"Ray {version} runs at {self.url}, and here {ours}: jobs need the same minor version"
            )

    def job(self, name: str) -> dict[str, Any] | None:
        """Returns the job, or None if the cluster does not know it."""
        return self._ask("GET", f"/api/jobs/{name}", missing_is_none=True)

    def stop(self, name: str) -> None:
        """Asks the job to end, without waiting for it; a job that has ended is left alone."""
        self._ask("POST", f"/api/jobs/{name}/stop", missing_is_none=True)

    def alive_nodes(self) -> list[dict[str, Any]]:
        """Returns the rows of Ray's state API for nodes that are alive."""
        query = f"filter_keys=state&filter_predicates=%3D&filter_values=ALIVE&detail=true&limit={_MAX_ROWS}"
        answer = self._ask("GET", f"/api/v0/nodes?{query}", timeout_s=_STATE_TIMEOUT_S)
        return list(answer["data"]["result"]["result"])

    def has_autoscaler(self) -> bool:
        # Null where nothing ever reported
        status = self._ask("GET", "/api/cluster_status")["data"]["clusterStatus"]
        return bool(status and status.get("autoscalingStatus"))

    def _ask(
        self,
        method: str,
        path: str,
        *,
        missing_is_none: bool = False,
        timeout_s: float = _TIMEOUT_S,
    ) -> Any:
        try:
            answer = httpx.request(method, self.url + path, headers=self.headers, timeout=timeout_s)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise ClusterError(
                f"no Ray Jobs API answers at {self.url} ({reason}): check address and port"
            ) from None
        if answer.status_code == 401:
            raise ClusterError(
                f"{self.url} asks for a token: put it into ~/{_RAYS_PLACE}, or into a file that {_TOKEN_PATH} names"
            )
        if answer.status_code == 403:
            sent = (
                f"the token from {self._token.source}"
                if self._token
                else "a request without a token"
            )
            raise ClusterError(f"{self.url} refuses {sent}: it is another cluster's, or an old one")
        if answer.status_code == 404 and missing_is_none:
            return None
        if not answer.is_success:
            raise ClusterError(
                f"{self.url} answered {answer.status_code} to {method} {path.partition('?')[0]}"
            )
        try:
            return answer.json()
        except ValueError:
            raise self._is_no_dashboard() from None

    def _is_no_dashboard(self) -> ClusterError:
        return ClusterError(
            f"what answers at {self.url} is no Ray dashboard: its port is 8265 unless changed"
        )
