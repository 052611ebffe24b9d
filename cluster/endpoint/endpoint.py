"""The endpoint as clients on this machine see it: deployed, remembered, asked for a completion."""

import ipaddress
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from cluster.endpoint.local_end import cut, entrance_of
from cluster.output.progress import say
from cluster.settings.parser import ConfigError
from cluster.storage.uris import StorageError, open_storage
from raymill.errors import UserError

if TYPE_CHECKING:
    from cluster.settings.serve import ServeConfig
    from cluster.stages.stage import Connection

_FILE = "endpoint.json"
_HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
_DONE = b"[DONE]"
_ALL_ADDRESSES = ("0.0.0.0", "::")  # noqa: S104 - asked here, of a server that listens on all
_MAX_TOKENS = 64  # of a completion without `max_tokens`


@dataclass(frozen=True)
class Endpoint:
    """An endpoint's address, and the files with the keys that it asks for."""

    url: str
    model: str
    api_key_file: str | None
    admin_key_file: str | None = None

    @classmethod
    def load(
        cls,
        storage_uri: str,
        *,
        url: str | None,
        api_key_file: Path | None = None,
        admin_key_file: Path | None = None,
    ) -> "Endpoint":
        """Returns the endpoint at `url`, else the last one served from this storage. Raises
        `UserError` without one."""
        if url is not None:
            return cls(
                url.rstrip("/"),
                "",
                *(str(path) if path else None for path in (api_key_file, admin_key_file)),
            )
        if (content := open_storage(storage_uri).find_bytes(_FILE)) is None:
            raise UserError(
                f"no endpoint has answered from {storage_uri} yet: run `raymill serve latest`, and wait until that "
                "says `serving`; or give --url"
            )
        return cls(**json.loads(content))

    @property
    def asks_proxies(self) -> bool:
        """Whether a proxy that the environment names is asked for it: never for an endpoint on this
        machine."""
        host = httpx.URL(self.url).host
        return not is_loopback(host) and host not in _ALL_ADDRESSES

    @property
    def headers(self) -> dict[str, str]:
        return (
            {}
            if self.api_key_file is None
            else _bearer(Path(self.api_key_file), flag="--api-key-file")
        )

    @contextmanager
    def client(self, *, timeout_s: float) -> Iterator[httpx.Client]:
        """Gives a client with the endpoint's key. Raises `UserError` where nothing answers."""
        try:
            with httpx.Client(
                base_url=self.url,
                headers=self.headers,
                timeout=timeout_s,
                trust_env=self.asks_proxies,
            ) as client:
                yield client
        except httpx.TransportError as error:
            raise UserError(
                f"no endpoint answers at {self.url} ({error}): start one with `raymill serve`, and wait until that "
                "says `serving`"
            ) from None

    @property
    def admin_headers(self) -> dict[str, str]:
        if self.admin_key_file is None:
            raise UserError(
                f"{self.url} asks for an admin key: give --admin-key-file here and to `raymill serve`"
            )
        return _bearer(Path(self.admin_key_file), flag="--admin-key-file")


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be any address
        return False


def require_key(config: "ServeConfig") -> None:
    """Raises `ConfigError` for an endpoint that others can reach, and that asks for no key."""
    if not is_loopback(config.host) and config.api_key_file is None:
        raise ConfigError(
            f"host is {config.host}, which others can reach, and api_key_file is unset: name a key file, "
            "or listen on 127.0.0.1"
        )


def _bearer(path: Path, *, flag: str) -> dict[str, str]:
    # A byte order mark is no part of a key.
    keys = path.read_text(encoding="utf-8-sig").split() if path.is_file() else []
    if not keys:
        raise UserError(
            f"no API key is in {path}: name the key file of `raymill serve` with {flag}"
        )
    return {"Authorization": f"Bearer {keys[0]}"}


def require_ray_proxies() -> None:
    """Raises `UserError` if HAProxy replaces Ray Serve's proxies, which run
    serving/proxy/front_door.py."""
    if os.environ.get(_HAPROXY_VARIABLE) == "1":
        raise UserError(
            f"{_HAPROXY_VARIABLE}=1 makes HAProxy replace Ray Serve's proxies: the endpoint's "
            "bounds on clients, its retries and its error counts would be missing. Unset it where Ray is started"
        )


def deploy(connection: "Connection", config: "ServeConfig") -> Endpoint:
    """Deploys the checkpoint on the cluster, waits until it answers, and remembers where it is. If
    that is interrupted, answers that are under way end with an error event."""
    from cluster.stages.stage import run_stage  # noqa: PLC0415 - imports Ray, which `raymill complete` does without

    try:
        result = run_stage(connection, "serving.app", config)
    except BaseException:
        if connection.local is not None:  # a cluster that ends now; its first replica may answer
            cut(entrance_of(config.host, config.port))
        raise
    endpoint = Endpoint(result["url"], result["model"], config.api_key_file, config.admin_key_file)
    try:
        open_storage(config.storage.uri).write_bytes(_FILE, json.dumps(asdict(endpoint)).encode())
    except StorageError as error:  # it serves all the same
        say(
            f"where the endpoint is could not be stored, so `raymill complete` needs --url: {error}"
        )
    return endpoint


def stream_completion(
    endpoint: Endpoint, request: dict[str, Any], *, on_text: Callable[[str], None]
) -> dict[str, Any]:
    """Asks for one completion, calls `on_text` as text comes, and returns all of it with its timing
    in seconds. Without `max_tokens` in the request it is 64, or as many as fit after the prompt."""
    start = time.perf_counter()
    texts: list[str] = []
    result: dict[str, Any] = {"model": endpoint.model, "prompt": request["prompt"], "ttft_s": None}
    with endpoint.client(timeout_s=120) as client:
        if not endpoint.model:
            models = client.get("/v1/models")
            raise_for(models)
            result["model"] = models.json()["data"][0]["id"]
        if request["max_tokens"] is None:
            request = request | {
                "max_tokens": _what_fits(client, result["model"], request["prompt"])
            }
        body = {
            "model": result["model"],
            "stream": True,
            "stream_options": {"include_usage": True},
        } | request
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.is_error:
                response.read()
            raise_for(response)
            for line in _lines(response):
                data = line.removeprefix(b"data: ")
                if not data or data == _DONE:
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise UserError(f"the endpoint stopped: {chunk['error']['message']}")
                result |= {"usage": chunk["usage"]} if chunk.get("usage") else {}
                for choice in chunk["choices"]:
                    result["ttft_s"] = result["ttft_s"] or round(time.perf_counter() - start, 4)
                    result["finish_reason"] = choice["finish_reason"]
                    texts.append(choice["text"])
                    on_text(choice["text"])
    return result | {"text": "".join(texts), "total_s": round(time.perf_counter() - start, 4)}


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yields the lines of a stream. httpx ends them at U+2028 and the like too, which JSON may hold
    as they are."""
    rest = b""
    for data in response.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)
    yield rest


def _what_fits(client: httpx.Client, model: str, prompt: str) -> int:
    response = client.post("/tokenize", json={"model": model, "prompt": prompt})
    if response.status_code == httpx.codes.NOT_FOUND:  # not raymill's, with OpenAI's routes alone
        return _MAX_TOKENS
    raise_for(response)
    counted = response.json()
    return max(1, min(_MAX_TOKENS, counted["max_model_len"] - counted["count"]))


def raise_for(response: httpx.Response) -> None:
    """Raises `UserError` with the endpoint's own words."""
    if response.is_error:
        raise UserError(f"{response.url} answered {response.status_code}: {message_of(response)}")


def message_of(response: httpx.Response) -> str:
    """Returns the message of an error, or the front of an answer that is not in OpenAI's shape."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(response.text[:200].split())
