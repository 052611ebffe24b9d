"""Messages between replicas and the coordinator about the use of keys: by the keys' names, and
never the keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class QuotaKind(StrEnum):
    TOKENS_PER_MINUTE = "tokens_per_minute"  # of prompts and answers
    TOKENS_PER_DAY = "tokens_per_day"
    INVALID_BYTES = "invalid_bytes"  # of bodies that were read in vain


class Account(NamedTuple):
    """One bucket of one key's name."""

    name: str
    kind: QuotaKind


@dataclass(frozen=True)
class UsageReport:
    """One replica's report."""

    number: int = 0  # of this report; a report that comes twice counts once
    answered: int = 0  # number of the last report to which the replica got an answer
    # Whether the replica has had no answer for a while, and estimates the debts
    is_alone: bool = False
    # Requests of each name on this replica
    running: Mapping[str, int] = field(default_factory=dict)
    # Since the report that was answered
    charges_s: Mapping[Account, float] = field(default_factory=dict)
    # Of the whole endpoint, as the replica knows them
    debts_s: Mapping[Account, float] = field(default_factory=dict)


@dataclass(frozen=True)
class UsageAnswer:
    """The coordinator's answer."""

    num_replicas: int
    elsewhere: Mapping[str, int]  # running requests of each name on the other replicas
    debts_s: Mapping[Account, float]
