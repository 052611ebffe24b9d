"""Key files: a key on each line, which may have a name, an expiry and a limit of its own."""

import codecs
import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from model.errors import UserError

NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
FIELDS = ("name", "expires", "max_requests")
EXPECTED = "a key, and after it any of name=NAME (letters, digits, . _ @ -), expires=2027-01-01 and max_requests=8"


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key. Keys of one name share their limit and their turns in the queue."""

    hash: str  # SHA-256; the key itself is in no state and no log
    name: str
    expires_s: float | None = None  # Unix time from which it opens nothing
    max_requests: int | None = None  # in flight on a replica

    @classmethod
    def read(cls, line: str) -> "ApiKey":
        """Reads a line, such as `sk-… name=alice expires=2027-01-01 max_requests=8`. A key without a name has one made
        from its hash. Raises `ValueError`."""
        key, *words = line.split()
        if key.startswith("#"):
            raise ValueError("a comment would be a key that is easily guessed")
        fields = dict(word.split("=", 1) for word in words)
        digest = hashlib.sha256(key.encode()).hexdigest()
        name, limit = fields.get("name", f"key-{digest[:8]}"), fields.get("max_requests", "1")
        if len(fields) != len(words) or not fields.keys() <= set(FIELDS):
            raise ValueError("a word is unknown, or there twice")
        if not NAME.fullmatch(name) or not limit.isdecimal() or int(limit) == 0:
            raise ValueError("a value is impossible")
        expires_s = None
        if "expires" in fields:
            expires = datetime.fromisoformat(fields["expires"])
            expires_s = (expires if expires.tzinfo else expires.replace(tzinfo=UTC)).timestamp()
        return cls(digest, name, expires_s, int(limit) if "max_requests" in fields else None)


def make_key_file(path: Path) -> None:
    """Writes a file with a fresh key if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"sk-{secrets.token_urlsafe(32)}\n")


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Returns the file's keys as hashes; replicas get nothing else, so that no key is in the cluster's state or logs.
    Raises `UserError`, which names the line and quotes none of it."""
    keys = []
    for number, encoded in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            line = encoded.decode("utf-8")
            keys += [ApiKey.read(line)] if line.strip() else []
        except ValueError:
            raise UserError(f"the API key file {path}, line {number}: expected {EXPECTED}") from None
    if not keys:
        raise UserError(
            f"the API key file {path} is empty: write one key on each line, or delete the file to have one created"
        )
    return tuple(keys)
