"""API keys: the file that holds them, and the check of a request's key against their hashes."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError


def read_key_hashes(path: Path) -> tuple[str, ...]:
    """SHA-256 of each key in the file, one key a line; the file is made with a fresh key where it is missing. Only
    the hashes are handed to replicas, so that no key stands in the cluster's state or logs."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"sk-{secrets.token_urlsafe(32)}\n")
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise UserError(f"the API key file {path} is empty: write one key a line, or delete it to have one made")
    return tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def is_authorized(headers: Sequence[tuple[bytes, bytes]], key_hashes: Sequence[str]) -> bool:
    """Whether the one Authorization header carries a known key. Takes the same time for any wrong key."""
    values = [value for name, value in headers if name == b"authorization"]
    scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    presented = hashlib.sha256(key.strip()).hexdigest()
    known = [hmac.compare_digest(presented, key_hash) for key_hash in key_hashes]
    return scheme.lower() == b"bearer" and any(known)
