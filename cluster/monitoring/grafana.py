"""Grafana through the `grafana-api` package: data source, folder, dashboards, annotations.

Everything has a uid of raymill's and may be pushed again at any time. The package is unmaintained:
its calls by numeric ids, which Grafana 13 has dropped, are not used; it fails to parse an answer
without a body, and an error page in HTML may give a TypeError.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import requests
from grafana_api.grafana_api import GrafanaClientError, GrafanaException
from grafana_api.grafana_face import GrafanaFace

from cluster.metrics.annotation import Annotation
from cluster.monitoring.files import Json, data_source
from cluster.output.progress import say
from cluster.settings.parser import ConfigError
from raymill.errors import UserError

URL_VARIABLE, TOKEN_VARIABLE, TOKEN_FILE_VARIABLE = (
    "GRAFANA_URL",
    "GRAFANA_TOKEN",
    "GRAFANA_TOKEN_FILE",
)
FOLDER = "raymill"  # its uid and its title
TIMEOUT_S = 10.0
RETRIES_AFTER_S = (0.5, 2.0, 5.0)

Answer = TypeVar("Answer")


class GrafanaError(UserError):
    """Grafana cannot be reached, or refuses a request."""


class GrafanaAwayError(GrafanaError):
    """Grafana did not answer, and may later."""


def _retried(ask: Callable[[], Answer]) -> Answer:
    """Asks again where Grafana did not answer."""
    for wait_s in RETRIES_AFTER_S:
        try:
            return ask()
        except GrafanaAwayError:
            time.sleep(wait_s)
    return ask()


class Grafana:
    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"{URL_VARIABLE}={url!r}: expected a URL such as https://grafana.example.org"
            )
        prefix = parts.path.strip("/")
        self._url = url
        self._face = GrafanaFace(
            auth=token,
            protocol=parts.scheme,
            host=parts.netloc,
            url_path_prefix=f"{prefix}/" if prefix else "",
            timeout=TIMEOUT_S,
        )

    @classmethod
    def from_environment(cls) -> Self:
        """Reads `GRAFANA_URL` and `GRAFANA_TOKEN`, or the file in `GRAFANA_TOKEN_FILE`. Raises
        `ConfigError`."""
        url, token = os.environ.get(URL_VARIABLE), os.environ.get(TOKEN_VARIABLE)
        if not token and (path := os.environ.get(TOKEN_FILE_VARIABLE)):
            try:
                token = Path(path).read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigError(f"{TOKEN_FILE_VARIABLE}={path}: {error.strerror}") from None
        if not url or not token:
            raise ConfigError(
                f"set {URL_VARIABLE}, and {TOKEN_VARIABLE} or {TOKEN_FILE_VARIABLE}, to a Grafana and the token of a "
                "service account there that may edit dashboards, folders and data sources"
            )
        return cls(url, token)

    def push_data_source(self, prometheus_url: str) -> str:
        """Pushes and returns `created`, `updated` or `unchanged`, like the other methods that
        push."""
        wanted = data_source(prometheus_url)
        path = f"/datasources/uid/{wanted['uid']}"
        found = self._ask("GET", path)
        request = ("POST", "/datasources") if found is None else ("PUT", path)
        return self._pushed(wanted, found, *request, wanted)

    def push_folder(self) -> str:
        if self._ask("GET", f"/folders/{FOLDER}") is not None:
            return "unchanged"
        self._ask("POST", "/folders", {"uid": FOLDER, "title": FOLDER})
        return "created"

    def push_dashboard(self, dashboard: Json) -> str:
        body = {
            "dashboard": dashboard,
            "folderUid": FOLDER,
            "overwrite": True,
            "message": "raymill dashboards",
        }
        return self._pushed(
            dashboard, self.dashboard(dashboard["uid"]), "POST", "/dashboards/db", body
        )

    def _pushed(self, wanted: Json, found: Json | None, method: str, path: str, body: Json) -> str:
        if found is not None and not differences(wanted, found):
            return "unchanged"
        self._ask(method, path, body)
        return "created" if found is None else "updated"

    def dashboard(self, uid: str) -> Json | None:
        found = self._ask("GET", f"/dashboards/uid/{uid}")
        return None if found is None else dict(found["dashboard"])

    def annotate(self, annotation: Annotation) -> str:
        """Annotates once, even if the same is asked again or an answer was lost."""
        return _retried(lambda: self._annotate(annotation))

    def _annotate(self, annotation: Annotation) -> str:
        time_ms = round(annotation.time_s * 1000)
        tags = ["raymill", annotation.kind, annotation.subject]
        tagged = "&".join(f"tags={quote(tag)}" for tag in tags)
        found = self._ask_once("GET", f"/annotations?from={time_ms}&to={time_ms}&{tagged}")
        if any(there["text"] == annotation.text for there in found):
            return "unchanged"
        self._ask_once(
            "POST", "/annotations", {"time": time_ms, "tags": tags, "text": annotation.text}
        )
        return "created"

    def _ask(self, method: str, path: str, body: Json | None = None) -> Any:
        return _retried(lambda: self._ask_once(method, path, body))

    def _ask_once(self, method: str, path: str, body: Json | None = None) -> Any:
        """Returns the answer's JSON, an empty object if it has no body, and None for what is not
        there."""
        try:
            return getattr(self._face.api, method)(path, json=body)
        except requests.JSONDecodeError as error:
            if not error.doc:
                return {}
            raise GrafanaError(
                f"{self._url} answered {method} {path} with something else than JSON ({error.doc[:80]!r}); is "
                f"{URL_VARIABLE} the address of a Grafana?"
            ) from None
        except GrafanaClientError as error:
            if error.status_code == requests.codes.not_found and method == "GET":
                return None
            kind, does = (
                (GrafanaAwayError, "does not answer")
                if error.status_code == 429
                else (GrafanaError, "refused")
            )
            raise kind(f"{self._url} {does} {method} {path}: {error.message}") from None
        except (GrafanaException, TypeError, requests.RequestException) as error:
            raise GrafanaAwayError(
                f"{self._url} does not answer {method} {path}: {error}"
            ) from None


class Annotator:
    """Annotates from a thread, so that Grafana never delays what is annotated."""

    def __init__(self, grafana: Grafana) -> None:
        self._grafana = grafana
        self._waiting: queue.SimpleQueue[Annotation | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="annotations", daemon=True)
        self._thread.start()

    @classmethod
    def from_environment(cls) -> Self | None:
        """Returns None if no Grafana is named, or, with a message, if it cannot be used."""
        if not os.environ.get(URL_VARIABLE):
            return None
        try:
            return cls(Grafana.from_environment())
        except ConfigError as error:
            say(f"nothing is annotated: {error}")
            return None

    def add(self, annotation: Annotation) -> None:
        self._waiting.put(annotation)

    def close(self) -> None:
        """Waits some seconds for what is left to annotate."""
        self._waiting.put(None)
        self._thread.join(timeout=2 * TIMEOUT_S)

    def _work(self) -> None:
        has_failed = False
        while (annotation := self._waiting.get()) is not None:
            try:
                self._grafana.annotate(annotation)
                has_failed = False
            except GrafanaError as error:
                if not has_failed:
                    say(f"not annotated: {error}")
                has_failed = True


def differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Returns the places where `found` lacks what is wanted, ignoring what Grafana has added."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [
            place
            for key, value in wanted.items()
            for place in differences(value, found.get(key), f"{where}.{key}" if where else key)
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return [
            place for number, pair in pairs for place in differences(*pair, f"{where}[{number}]")
        ]
    return [] if wanted == found else [where]
