"""Counts what each key does, by its name: for bills, and to see who is refused."""

from collections.abc import Collection
from enum import StrEnum

from cluster.metrics.metric_export import Metrics


class KeyRefusal(StrEnum):
    """Why a request of a key got 429."""

    REQUESTS = "requests"  # too many of the key are in flight
    TOKENS_PER_MINUTE = "tokens_per_minute"
    TOKENS_PER_DAY = "tokens_per_day"
    INVALID_BYTES = "invalid_bytes"  # too many bodies of the key were invalid
    OVERLOADED = "overloaded"  # the replica has no room, whoever asks


class NameMetrics:
    """The metrics of one name."""

    def __init__(self, exported: Metrics, name: str) -> None:
        self.requests = exported.of("raymill:key_requests", key=name)
        self.prompt_tokens = exported.of("raymill:key_prompt_tokens", key=name)
        self.generation_tokens = exported.of("raymill:key_generation_tokens", key=name)
        self.refused = {
            reason: exported.of("raymill:key_refused", key=name, reason=reason)
            for reason in KeyRefusal
        }


class KeyMetrics:
    """The metrics of all names. Names come from the key files alone, so there are as many series as
    the files allow."""

    def __init__(self, exported: Metrics) -> None:
        self._exported = exported
        self._by_name: dict[str, NameMetrics] = {}

    def of(self, name: str) -> NameMetrics:
        """Returns the metrics of a valid key's name."""
        if name not in self._by_name:
            self._by_name[name] = NameMetrics(self._exported, name)
        return self._by_name[name]

    def keep(self, names: Collection[str]) -> None:
        """Begins the series of these names, as rates need a first value, and ends all others."""
        for name in names:
            self.of(name)
        for name in self._by_name.keys() - set(names):
            del self._by_name[name]
            self._exported.end(key=name)
