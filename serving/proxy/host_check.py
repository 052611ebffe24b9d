"""Refuses requests whose `Host` header is missing, doubled, or of another endpoint.

An endpoint without keys listens on the loopback interface and trusts everybody there. A web page in
a browser of the same machine is there too, once its own name stands for 127.0.0.1 (DNS rebinding).
Its requests still carry that name as their `Host`, by which they are known.
"""

from starlette.types import Scope

from cluster.endpoint.endpoint import is_loopback
from serving.protocol.errors import ApiError, error_of


def require_host(scope: Scope, *, only_loopback: bool) -> None:
    """Raises `ApiError`: 400 unless there is one `Host`, which HTTP/1.0 may lack, and 421 for a
    name that is not this machine's loopback interface if `only_loopback` is set."""
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
        message = f"The request has {len(hosts)} Host headers; expected one"
        # Its body is not read
        raise ApiError(message, code="invalid_host", headers={"Connection": "close"})
    if only_loopback and hosts and not is_loopback(name_in(hosts[0])):
        raise error_of("foreign_host", host=hosts[0].decode("latin-1")[:64])


def name_in(host: bytes) -> str:
    """Returns the name or address in a `Host`, in small letters, without a port and brackets."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]
