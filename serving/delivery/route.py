"""Which version a request goes to, as replicas and proxies tell each other in a header."""

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Self

ROUTE_HEADER = "x-route"


@dataclass(frozen=True)
class Route:
    """Says which version a request goes to."""

    epoch: int
    primary: int  # serial
    canary: int = 0  # serial, 0 for none
    percent: float = 0.0
    # That of the `Delivery`; epochs and serials of different origins are not comparable
    origin: str = ""

    def is_newer_than(self, other: "Route") -> bool:
        return self.origin == other.origin and self.epoch > other.epoch

    def serial_for(self, key: str | None) -> int:
        """Returns a version's serial: the same one for the same key, a random one without a key."""
        if not self.canary:
            return self.primary
        digest = hashlib.sha256(f"{self.canary}:{key}".encode()).digest()
        place = random.random() if key is None else int.from_bytes(digest[:8]) / 2**64
        return self.canary if place * 100 < self.percent else self.primary

    def to_header(self) -> str:
        return self._header

    @cached_property
    def _header(self) -> str:
        return f"{self.epoch}:{self.primary}:{self.canary}:{self.percent}:{self.origin}"

    @classmethod
    @lru_cache(maxsize=64)  # each request has the same
    def from_header(cls, text: str) -> Self | None:
        """Returns None if `text` is not a route."""
        try:
            epoch, primary, canary, percent, origin = text.split(":")
            return cls(int(epoch), int(primary), int(canary), float(percent), origin)
        except ValueError:
            return None
