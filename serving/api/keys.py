"""Key files: a key on each line, which may have a name, an expiry and limits of its own."""

import codecs
import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from raymill.errors import UserError
from serving.limits.token_bucket import Quota
from serving.limits.usage_report import QuotaKind

NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
LIMITS = ("max_requests", "tokens_per_minute", "tokens_per_day")
TRACE = "trace"
FIELDS = ("name", "expires", "may", *LIMITS)
EXPECTED = (
    "a key, and after it any of name=NAME (letters, digits, . _ @ -), expires=2027-01-01, max_requests=8, "
    "tokens_per_minute=20000, tokens_per_day=1000000 and may=trace"
)
MINUTE_S, DAY_S = 60.0, 86_400.0


@dataclass(frozen=True)
class ApiKey:
    """The facts about a key. Keys of one name share their limits and their turns in the queue."""

    hash: str  # SHA-256; the key itself is in no state and no log
    name: str
    expires_s: float | None = None  # Unix time from which it opens nothing
    max_requests: int | None = None  # in flight, on all replicas together
    tokens_per_minute: int | None = None  # of prompts and answers, on all replicas together
    tokens_per_day: int | None = None
    may_trace: bool = False  # may see what the model was trained on

    @classmethod
    def read(cls, line: str) -> "ApiKey":
        """Reads a line, such as `sk-… name=alice expires=2027-01-01 tokens_per_minute=20000`. A key
        without a name has one made from its hash. Raises `ValueError`."""
        key, *words = line.split()
        if key.startswith("#"):
            raise ValueError("a comment would be a key that is easily guessed")
        fields = dict(word.split("=", 1) for word in words)
        digest = hashlib.sha256(key.encode()).hexdigest()
        name = fields.get("name", f"key-{digest[:8]}")
        if len(fields) != len(words) or not fields.keys() <= set(FIELDS):
            raise ValueError("a word is unknown, or there twice")
        if not NAME.fullmatch(name):
            raise ValueError("a value is impossible")
        expires_s = None
        if "expires" in fields:
            expires = datetime.fromisoformat(fields["expires"])
            expires_s = (expires if expires.tzinfo else expires.replace(tzinfo=UTC)).timestamp()
        if fields.get("may", TRACE) != TRACE:
            raise ValueError("a right is unknown")
        limits = {limit: _count(fields[limit]) for limit in LIMITS if limit in fields}
        return cls(digest, name, expires_s, **limits, may_trace="may" in fields)

    @property
    def token_quotas(self) -> dict[QuotaKind, Quota]:
        quotas = {}
        if self.tokens_per_minute is not None:
            quotas[QuotaKind.TOKENS_PER_MINUTE] = Quota(self.tokens_per_minute, MINUTE_S)
        if self.tokens_per_day is not None:
            quotas[QuotaKind.TOKENS_PER_DAY] = Quota(self.tokens_per_day, DAY_S)
        return quotas


def _count(word: str) -> int:
    """Returns a limit's number. Raises `ValueError`."""
    if not word.isdecimal() or int(word) == 0:
        raise ValueError("a value is impossible")
    return int(word)


def make_key_file(path: Path) -> None:
    """Writes a file with a fresh key if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"sk-{secrets.token_urlsafe(32)}\n")


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Returns the file's keys as hashes; replicas get nothing else, so that no key is in the
    cluster's state or logs. Raises `UserError`, which names the line and quotes none of it."""
    keys = []
    for number, encoded in enumerate(
        path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1
    ):
        try:
            line = encoded.decode("utf-8")
            keys += [ApiKey.read(line)] if line.strip() else []
        except ValueError:
            raise UserError(
                f"the API key file {path}, line {number}: expected {EXPECTED}"
            ) from None
    if not keys:
        raise UserError(
            f"the API key file {path} is empty: write one key on each line, or delete the file to have one created"
        )
    return tuple(keys)
